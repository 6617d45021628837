"""The law of path decoding, exactly: every image of a model with few codes has its probability.

The images of many seeds are counted against the joint law of full forwards without a cache. Faults
that were made on purpose must fail the same test.
"""

import pytest
import torch

from emu3.cache import KeyValueCache
from emu3.config import BYTE_VOCABULARY
from emu3.generate import Sampling, Window, generate_images
from emu3.generate.path import PathDecoder
from emu3.generate.window import Paths
from emu3.prompt import generation_document, generation_prompt
from emu3.text import ByteTokenizer
from tests.model.tiny import tiny_model
from tests.sampling.test_sample_guided import p_value

IDS = BYTE_VOCABULARY.model_copy(update={"num_visual": 6})
TEXT = ByteTokenizer(IDS)
GRID, NUM = (2, 3), 6
HOW = Sampling(guidance=2.0, top_k=2, temperature=1.5)
WINDOW = Window(8, 2)
"""Holds a whole image and one sibling, which is right wherever the chain is not."""


SMALL = {"hidden_size": 32, "intermediate_size": 32, "head_dim": 8, "init_std": 0.35}


@pytest.fixture(scope="module")
def model():
    return tiny_model(seed=1, vocabulary=IDS, **SMALL)


@pytest.fixture(scope="module")
def law(model):
    """The probability of each image by its :func:`number`: two codes may follow any others."""
    images, logs = torch.zeros(1, NUM, dtype=torch.int64), torch.zeros(1, dtype=torch.float64)
    for place in range(NUM):
        codes, steps = likely_codes(model, images, place)
        images, logs = images.repeat_interleave(2, 0), (logs[:, None] + steps).flatten()
        images[:, place] = codes.flatten()
    found = torch.zeros(IDS.num_visual**NUM, dtype=torch.float64)
    found[number(images)] = logs.exp()
    return found


@torch.no_grad()
def likely_codes(model, images, place):
    """The two codes that may come at a place, and the logarithms of their probabilities."""
    pair = []
    for words in ("a seven", HOW.negative):
        last = len(generation_prompt(words, GRID, TEXT)) - 1 + place + place // GRID[1]
        rows = [generation_document(words, image.view(GRID), TEXT) for image in images]
        hidden = model(torch.tensor(rows)[:, : last + 1])[:, -1]
        pair.append(model.logits(hidden, slice(IDS.visual_start, IDS.size)).double())
    best = (pair[1] + HOW.guidance * (pair[0] - pair[1])).topk(2)
    return best.indices, (best.values / HOW.temperature).log_softmax(-1)


def number(images):
    return (images.flatten(1) * IDS.num_visual ** torch.arange(NUM).flip(0)).sum(1)


def count(model, num_images, batch=1000):
    counts = torch.zeros(IDS.num_visual**NUM)
    for first in range(0, num_images, batch):
        asked = ["a seven"] * batch, GRID, HOW, first
        drawn = number(generate_images(model, TEXT, *asked, window=WINDOW))
        counts += drawn.bincount(minlength=len(counts))
    return counts


def agreement(model, law, num_images):
    """The p value of the images of ``num_images`` seeds; 0 if one of them is impossible."""
    counts = count(model, num_images)
    return 0.0 if counts[law == 0].any() else p_value(counts, num_images * law)


@pytest.mark.parametrize(
    "num_images", [2_000, pytest.param(40_000, marks=pytest.mark.e2e)], ids=str
)
def test_images_have_the_probabilities_of_plain_decoding(model, law, num_images):
    assert law.sum() == pytest.approx(1)
    assert (law > 0).sum() == 2**NUM
    assert agreement(model, law, num_images) > 1e-4


def no_compaction(monkeypatch):
    monkeypatch.setattr(KeyValueCache, "move", lambda *_: None)


def one_row_moved(monkeypatch):
    move = KeyValueCache.move

    def half(cache, source, target):
        first = torch.arange(len(source)) < len(source) // 2
        move(cache, source * first, target * first)

    monkeypatch.setattr(KeyValueCache, "move", half)


def slots_as_positions(monkeypatch):
    replace(monkeypatch, lambda of: {"depths": torch.arange(WINDOW.size).expand_as(of.depths)})


def causal_words(monkeypatch):
    words = torch.tensor([(2 << i) - 1 for i in range(WINDOW.size)])
    replace(monkeypatch, lambda of: {"mask": words.expand_as(of.mask)})


def replace(monkeypatch, change):
    nodes = Paths.nodes
    monkeypatch.setattr(Paths, "nodes", lambda paths: (n := nodes(paths))._replace(**change(n)))


def logits_before_the_end_of_a_row(monkeypatch):
    """Of the last code of a row, in place of those of its EOL."""
    draw, nodes, ends = PathDecoder._draw, Paths.nodes, []

    def remember(paths):
        found = nodes(paths)
        ends[:] = [found.tokens == IDS.eol]
        return found

    def shifted(decoder, hidden, *rest):
        if hidden.shape[1] > 1:
            hidden = torch.where(ends[0].repeat(2, 1)[..., None], hidden.roll(1, 1), hidden)
        return draw(decoder, hidden, *rest)

    monkeypatch.setattr(Paths, "nodes", remember)
    monkeypatch.setattr(PathDecoder, "_draw", shifted)


def drafts_kept_untested(monkeypatch):
    """The draft of the next code is final whatever is drawn."""
    walk = Paths.walk

    def trusting(paths, nodes, picks):
        at = nodes.fork.clamp(max=nodes.drafts.shape[1] - 2)
        picks = picks.clone()
        picks[..., 0].scatter_(1, at, nodes.drafts.gather(1, at + 1))
        return walk(paths, nodes, picks)

    monkeypatch.setattr(Paths, "walk", trusting)


FAULTS = no_compaction, one_row_moved, slots_as_positions, causal_words
FAULTS += logits_before_the_end_of_a_row, drafts_kept_untested


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_the_law_shows_a_fault(model, law, fault, monkeypatch):
    fault(monkeypatch)
    assert agreement(model, law, 1_000) < 1e-9

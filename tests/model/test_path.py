"""Path decoding gives the codes of plain decoding; windows alone are tested in test_window.py."""

from fractions import Fraction
from math import prod

import pytest
import torch

from emu3.cache import KeyValueCache
from emu3.generate import Forwards, Sampling, Window, generate_clips, generate_images, path, visual
from emu3.generate.batch import Generation
from emu3.generate.common import new_cache
from emu3.generate.path import PathDecoder
from emu3.prompt import generation_prompt
from emu3.text import ByteTokenizer
from emu3_kernels import use_backend
from emu3_kernels.testing.launches import recorded_launches
from tests.model.tiny import TINY, tiny_model
from tests.recorded_graph import RecordedOps, recorded_graphs

TEXT = ByteTokenizer(TINY.vocabulary)
IDS = TINY.vocabulary
CAPTIONS = ["a red seven", "an orange one", ""]
WINDOWS = [Window(2), Window(3, 2), Window(5, 3), Window(16, 1), Window(16, 8), Window(64)]


@pytest.mark.parametrize("grid", [(3, 4), (6, 1), (5, 2), (1, 7), (2, 7)], ids=str)
@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("top_k", [1, 5, None])
def test_images_of_any_window_equal_those_of_plain_decoding(grid, guidance, top_k):
    """Prompts of unequal lengths in one batch; the random model follows few drafts."""
    model, how = tiny_model(), Sampling(guidance=guidance, top_k=top_k)
    plain = generate_images(model, TEXT, CAPTIONS, grid, how, 5)
    for window in WINDOWS:
        assert generate_images(model, TEXT, CAPTIONS, grid, how, 5, window=window).equal(plain)


def test_a_window_draws_the_same_image_alone_and_in_any_batch():
    model, how, window = tiny_model(), Sampling(top_k=3), Window(16)
    together = generate_images(model, TEXT, CAPTIONS, (3, 4), how, [3, 2**63, 11], window=window)
    for words, seed, image in zip(CAPTIONS, [3, 2**63, 11], together, strict=True):
        alone = generate_images(model, TEXT, [words], (3, 4), how, seed, window=window)
        assert alone[0].equal(image)


@pytest.mark.parametrize("given", [0, 1])
def test_clips_of_any_window_equal_those_of_plain_decoding(given):
    """A frame ends in EOL and EOF, which are two forced tokens."""
    model, how, fps = tiny_model(), Sampling(top_k=2), Fraction(8)
    known = torch.full((2, given, 2, 3), 7)
    asked = model, TEXT, ["up", "down there"], (3, 2, 3), fps, how, [7, 8]
    plain = generate_clips(*asked, given=known)
    for window in [Window(3), Window(5, 3), Window(16, 4), Window(64)]:
        assert generate_clips(*asked, given=known, window=window).equal(plain)
    with pytest.raises(ValueError, match="a window must be 1 or 3 to 64 tokens, got 2"):
        generate_clips(*asked, window=Window(2))


def decoder_of(model, captions, grids, how, window, first_seed=0):
    generations = []
    for seed, (words, grid) in enumerate(zip(captions, grids, strict=True), first_seed):
        sides = [words] if how.guidance == 1 else [words, how.negative]
        prompts = [generation_prompt(one, grid, TEXT) for one in sides]
        generations.append(Generation(prompts, prod(grid), grid, how, seed))
    return PathDecoder(model, IDS, generations, [(1, *grid) for grid in grids], window, graph=False)


def test_images_of_several_grids_share_forwards():
    model, how, grids = tiny_model(), Sampling(guidance=1, top_k=4), [(3, 4), (2, 2), (1, 9)]
    seen = []
    decoder = decoder_of(model, CAPTIONS, grids, how, Window(12, 3))
    images = decoder.run(spent := Forwards(), lambda codes: seen.append([*map(len, codes)]))
    for seed, (words, grid, image) in enumerate(zip(CAPTIONS, grids, images, strict=True)):
        assert image.equal(generate_images(model, TEXT, [words], grid, how, seed))
    again = generate_images(model, TEXT, CAPTIONS, grids, how, window=Window(12, 3))
    assert all(one.equal(image[0]) for one, image in zip(again, images, strict=True))
    assert spent.codes == [11, 3, 8]
    assert [*spent.forwards] == [sum(n[i] < n_i for n in seen) for i, n_i in enumerate(seen[-1])]
    assert seen[0] == [1, 1, 1]
    assert seen[-1] == [12, 4, 9]


@pytest.mark.parametrize("window", [Window(7, 3), Window(12, 1)])
@torch.no_grad()
def test_kept_slots_are_those_of_a_causal_call_and_no_other_is_read(window):
    """NaN in the slots of drafts, before each forward, would reach every logit."""
    grid, how, captions = (4, 3), Sampling(top_k=3), CAPTIONS[:2]
    model = tiny_model()
    prompts = [generation_prompt(words, grid, TEXT) for words in (*captions, "", "")]
    decoder = decoder_of(model, captions, [grid] * 2, how, window, 5)
    cache, paths = decoder.cache, decoder.paths
    decoder.start()
    while (paths.known < 12).any():
        for row, length in enumerate(cache.lengths.tolist()):
            cache.keys[:, row, length:] = cache.values[:, row, length:] = torch.nan
        decoder.step()
        for row, prompt in enumerate(prompts):
            codes = paths.codes[row % 2, : paths.known[row % 2]] + IDS.visual_start
            image = [id_ for part in codes.split(3) for id_ in (*part.tolist(), IDS.eol)]
            ids = [*prompt, *image][: cache.lengths[row]]
            again = new_cache(model, 1, len(ids))
            model(torch.tensor([ids]), again)
            for kept, causal in ((cache.keys, again.keys), (cache.values, again.values)):
                assert (kept[:, row, : len(ids)] - causal[:, 0]).abs().max() < 1e-4
    plain = generate_images(model, TEXT, captions, grid, how, 5)
    assert paths.codes[:, :12].equal(plain.flatten(1))


@pytest.mark.parametrize(("size", "fork"), [(7, 1), (9, 3), (64, 8)])
def test_a_model_that_always_draws_the_same_code_takes_full_windows(size, fork):
    model, grid = tiny_model(), (3, 5)
    with torch.no_grad():
        model.embedding.weight[:] = 1.0
    how, chain = Sampling(guidance=1, top_k=1), size - fork + 1
    spent = Forwards()
    window = Window(size, fork)
    generate_images(model, TEXT, ["x"], grid, how, window=window, spent=spent)
    code, num_forwards = 1, 0
    while code < 15:
        slots = range(code - 1 + (code - 1) // 5, 999)[:chain]  # that the window feeds
        code, num_forwards = 1 + sum((s + 1) % 6 != 5 for s in slots) + code - 1, num_forwards + 1
    assert spent.forwards == [num_forwards]
    assert spent.codes_per_forward == 14 / num_forwards


def test_replayed_windows_draw_the_same_images(monkeypatch):
    model, how, grid = tiny_model(), Sampling(top_k=3), (3, 4)
    monkeypatch.setattr(visual, "uses_graph", lambda model, asked: bool(asked))
    asked = model, TEXT, CAPTIONS, grid, how, 5
    with recorded_graphs(monkeypatch) as counts:
        spent = Forwards()
        images = generate_images(*asked, window=Window(8, 3), spent=spent, cuda_graph=True)
        assert images.equal(generate_images(*asked))
    assert counts.captures == 1
    assert counts.replays == max(spent.forwards) - 1


@torch.no_grad()
def test_the_triton_path_of_a_window_reads_nothing_from_the_gpu(monkeypatch):
    """Its kernels are recorded and do not run, so codes are put in place of what they draw."""
    model, grid = tiny_model(), (2, 3)
    draw = path.sample_guided
    monkeypatch.setattr(path, "sample_guided", lambda *a, **k: torch.zeros_like(draw(*a, **k)))
    with use_backend("triton"), recorded_launches() as launches:
        decoder = decoder_of(model, ["x"], [grid], Sampling(top_k=3), Window(6, 2))
        decoder.start()
        decoder.step()
        launches.clear()
        with RecordedOps():
            decoder.step()
    assert launches


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_logits_of_a_window_that_are_not_finite_end_in_one_line(value):
    model = tiny_model()
    with torch.no_grad():
        model.head.weight[IDS.visual_start + 3] = value
    with pytest.raises(ValueError, match="generate: logits must be finite, got NaN or infinity"):
        generate_images(model, TEXT, CAPTIONS, (3, 4), window=Window(8))


def test_a_caption_fits_beside_an_image_with_any_window():
    """Drafts beyond the last position are those that no image has."""
    room = len(generation_prompt("", (3, 4), TEXT)) + 5 + 3 * 5 - 2
    model, how = tiny_model(max_position_embeddings=room), Sampling(top_k=3)
    plain = generate_images(model, TEXT, ["12345"], (3, 4), how, 1)
    for window in WINDOWS:
        assert generate_images(model, TEXT, ["12345"], (3, 4), how, 1, window=window).equal(plain)
        with pytest.raises(ValueError, match="a caption may have 5 tokens beside its image"):
            generate_images(model, TEXT, ["123456"], (3, 4), how, 1, window=window)


def test_a_tree_beyond_the_slots_of_the_cache_is_refused():
    cache = KeyValueCache(TINY, 1, 10, dtype=torch.float32)
    cache.longest = 5
    with pytest.raises(ValueError, match="KeyValueCache: 11 slots exceed its 10"):
        cache.place(6, tree=True)

"""The decode loop against the slow and obvious one: no cache, no batch, the whole head."""

from fractions import Fraction

import pytest
import torch

from emu3.generate import (
    Sampling,
    generate_captions,
    generate_clips,
    generate_images,
    generate_text,
)
from emu3.prompt import Clip, document, forced_token, generation_prompt, understanding_prompt
from emu3.templates import Turn, chat_prompt
from emu3.text import ByteTokenizer
from emu3_kernels import sample_guided
from tests.model.tiny import TINY, tiny_model

TEXT = ByteTokenizer(TINY.vocabulary)
IDS = TINY.vocabulary
CAPTIONS = ["a red seven", "an orange one", ""]
GRID = 3, 4


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("top_k", [1, 5, None])
def test_images_equal_those_drawn_without_a_cache_token_for_token(guidance, top_k):
    model, how = tiny_model(), Sampling(guidance=guidance, top_k=top_k)
    fast = generate_images(model, TEXT, CAPTIONS, GRID, how, [5, 8, 2**64 - 1])
    slow = draw_without_a_cache(model, how, [5, 8, -1])
    assert fast.equal(slow)


@pytest.mark.parametrize("given", [0, 1, 2])
@torch.no_grad()
def test_clips_equal_those_drawn_without_a_cache_token_for_token(given):
    """From text alone, from a first frame, and from two: each in the form of a document."""
    model, how, fps = tiny_model(), Sampling(guidance=3.0, top_k=5), Fraction(8)
    random = torch.Generator().manual_seed(3)
    known = torch.randint(IDS.num_visual, (2, given, 2, 3), generator=random)
    drawn = generate_clips(
        model, TEXT, ["up", "down there"], (3, 2, 3), fps, how, [7, 8], given=known
    )
    assert drawn[:, :given].equal(known)
    rows = [
        document([words, Clip(one, fps)], TEXT)
        for words, one in zip(("up", "down there"), drawn, strict=True)
    ]
    others = [document([Clip(one, fps)], TEXT) for one in drawn]
    end, place = 3 * (2 * 4 + 1) + 2, 0  # of the document after img_token
    for offset in range(given * 9 + 1, end - 1):
        if forced_token(offset, (2, 3), IDS, 3) is None:
            at = offset - end - 1
            cond, uncond = (
                torch.cat([model.head(model(torch.tensor([ids[:at]])))[:, -1] for ids in prompts])
                for prompts in (rows, others)
            )
            expected = draw(cond, uncond, how, [7, 8], place)
            assert expected == [ids[at] for ids in rows]
            place += 1


@pytest.mark.parametrize(
    ("given", "line"),
    [
        (torch.zeros(1, 3, 2, 3, dtype=torch.int64), "more than the 3 given frames"),
        (torch.zeros(1, 1, 3, 2, dtype=torch.int64), r"must be \[1, s, 2, 3\], got \(1, 1, 3, 2\)"),
    ],
)
def test_frames_that_begin_no_clip_are_refused(given, line):
    with pytest.raises(ValueError, match=line):
        generate_clips(tiny_model(), TEXT, ["x"], (3, 2, 3), Fraction(8), given=given)


def test_answers_follow_prompts_of_several_images_and_turns():
    model, random = tiny_model(), torch.Generator().manual_seed(2)
    codes = torch.randint(IDS.num_visual, (2, 2, 3), generator=random)
    turns = [Turn([codes[0], "a"], "b"), Turn([codes[1], codes[0], "c"])]
    prompts = [chat_prompt(turns, TEXT, system=""), chat_prompt([Turn(["d"])], TEXT, system="")]
    answers = generate_text(model, TEXT, prompts, max_new_tokens=6)
    assert answers == [write_after(model, ids, 6) for ids in prompts]
    with pytest.raises(ValueError, match="a prompt may have 65 tokens before 64 new ones, got"):
        generate_text(model, TEXT, prompts, max_new_tokens=64)


def draw(cond, uncond, how, seeds, place):
    """The tokens that the definition draws from whole rows of logits."""
    settings = {"top_k": how.top_k, "top_p": how.top_p, "temperature": how.temperature}
    codes = sample_guided(
        cond[:, IDS.visual_start :],
        uncond[:, IDS.visual_start :],
        torch.tensor(seeds),
        torch.full((len(cond),), place),
        guidance=how.guidance,
        **settings,
        backend="reference",
    )
    return (codes[:, 0] + IDS.visual_start).tolist()


@pytest.mark.parametrize("how", [Sampling(), Sampling(top_p=0.9, temperature=0.7, guidance=1)])
def test_a_seed_draws_the_same_image_alone_and_in_any_batch(how):
    model, seeds = tiny_model(), [3, 2**63, 11]
    together = generate_images(model, TEXT, CAPTIONS, GRID, how, seeds)
    order = [2, 0, 1]
    shuffled = [CAPTIONS[i] for i in order], GRID, how, [seeds[i] for i in order]
    assert generate_images(model, TEXT, *shuffled).equal(together[order])
    for words, seed, image in zip(CAPTIONS, seeds, together, strict=True):
        assert generate_images(model, TEXT, [words], GRID, how, seed)[0].equal(image)
    counted = generate_images(model, TEXT, CAPTIONS[:2], GRID, how, 2**63)
    assert not counted[0].equal(counted[1])
    assert counted[1].equal(generate_images(model, TEXT, CAPTIONS[1:2], GRID, how, 2**63 + 1)[0])
    with pytest.raises(ValueError, match="seeds must be one or 3, got 2"):
        generate_images(model, TEXT, CAPTIONS, GRID, how, [1, 2])


def test_captions_equal_those_written_without_a_cache():
    model, random = tiny_model(), torch.Generator().manual_seed(2)
    codes = torch.randint(IDS.num_visual, (3, 2, 3), generator=random)
    written = generate_captions(model, TEXT, codes, max_new_tokens=10)
    assert written == [write_without_a_cache(model, one, 10) for one in codes]


def test_under_autocast_keys_and_values_are_kept_narrow():
    model, random = tiny_model(), torch.Generator().manual_seed(2)
    codes = torch.randint(IDS.num_visual, (3, 2, 3), generator=random)
    with torch.autocast("cpu", torch.bfloat16):
        written = generate_captions(model, TEXT, codes, max_new_tokens=10)
        assert written == [write_without_a_cache(model, one, 10) for one in codes]
        sampled = generate_images(model, TEXT, CAPTIONS, GRID, Sampling(top_k=1))
        generate_captions(model.double(), TEXT, codes, max_new_tokens=2)  # which stays as it is
    assert sampled.shape == (3, *GRID)


def test_an_ended_caption_stays_ended_while_others_go_on():
    """EOS wins at once where its head row points along the hidden state of one prompt only."""
    model, codes = tiny_model(), torch.tensor([[[1, 2]], [[400, 17]]])
    with torch.no_grad():
        hidden = [model(torch.tensor([understanding_prompt(one, TEXT)]))[0, -1] for one in codes]
        model.head.weight[IDS.eos] = 100 * (hidden[0] - hidden[1])
    first, second = generate_captions(model, TEXT, codes, max_new_tokens=4)
    assert first == ""
    assert second == write_without_a_cache(model, codes[1], 4)
    assert second


def test_a_model_in_training_mode_is_refused():
    with pytest.raises(ValueError, match="eval mode"):
        generate_images(tiny_model().train(), TEXT, ["x"], GRID)


def test_nothing_to_draw_is_refused():
    with pytest.raises(ValueError, match="empty batch"):
        generate_images(tiny_model(), TEXT, [], GRID)


@torch.no_grad()
def draw_without_a_cache(model, how, seeds):
    rows = [generation_prompt(words, GRID, TEXT) for words in CAPTIONS]
    others = [generation_prompt(how.negative, GRID, TEXT) for _ in CAPTIONS]
    place = 0
    for offset in range(1, GRID[0] * (GRID[1] + 1) + 1):
        token = forced_token(offset, GRID, IDS)
        if token is None:
            cond, uncond = (
                torch.cat([model.head(model(torch.tensor([ids])))[:, -1] for ids in prompts])
                for prompts in (rows, others)
            )
            tokens = draw(cond, uncond, how, seeds, place)
            place += 1
        else:
            tokens = [token] * len(rows)
        for prompts in (rows, others):
            for ids, token in zip(prompts, tokens, strict=True):
                ids.append(token)
    grid = torch.tensor([ids[-GRID[0] * (GRID[1] + 1) :] for ids in rows])
    return grid.unflatten(1, (GRID[0], GRID[1] + 1))[..., :-1] - IDS.visual_start


def write_without_a_cache(model, codes, limit):
    return write_after(model, understanding_prompt(codes, TEXT), limit)


@torch.no_grad()
def write_after(model, prompt, limit):
    ids = list(prompt)
    start = len(ids)
    while len(ids) < start + limit:
        logits = model.head(model(torch.tensor([ids])))[0, -1]
        logits[IDS.num_text :] = torch.where(
            torch.arange(IDS.num_text, IDS.size) == IDS.eos, logits[IDS.num_text :], -torch.inf
        )
        token = int(logits.argmax())
        if token == IDS.eos:
            break
        ids.append(token)
    return TEXT.decode(ids[start:])

"""The decode loop against the slow and obvious one: no cache, no batch, the whole head."""

import pytest
import torch

from emu3.generate import Sampling, generate_captions, generate_images
from emu3.prompt import forced_token, generation_prompt, understanding_prompt
from emu3.sampling import apply_cfg, sample
from emu3.text import ByteTokenizer
from tests.model.tiny import TINY, tiny_model

TEXT = ByteTokenizer(TINY.vocabulary)
IDS = TINY.vocabulary
CAPTIONS = ["a red seven", "an orange one", ""]
GRID = 3, 4


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("top_k", [1, 5, None])
def test_images_equal_those_drawn_without_a_cache_token_for_token(guidance, top_k):
    model, how = tiny_model(), Sampling(guidance=guidance, top_k=top_k)
    fast = generate_images(model, TEXT, CAPTIONS, GRID, how, torch.Generator().manual_seed(5))
    slow = draw_without_a_cache(model, how, torch.Generator().manual_seed(5))
    assert fast.equal(slow)


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
def draw_without_a_cache(model, how, generator):
    rows = [generation_prompt(words, GRID, TEXT) for words in CAPTIONS]
    others = [generation_prompt(how.negative, GRID, TEXT) for _ in CAPTIONS]
    for offset in range(1, GRID[0] * (GRID[1] + 1) + 1):
        token = forced_token(offset, GRID, IDS)
        if token is None:
            cond, uncond = (
                torch.cat([model.head(model(torch.tensor([ids])))[:, -1] for ids in prompts])
                for prompts in (rows, others)
            )
            logits = apply_cfg(cond, uncond, how.guidance)
            logits[:, : IDS.visual_start] = -torch.inf
            sampled = sample(
                logits[:, IDS.visual_start :],
                top_k=how.top_k,
                temperature=how.temperature,
                generator=generator,
            )
            tokens = (sampled + IDS.visual_start).tolist()
        else:
            tokens = [token] * len(rows)
        for prompts in (rows, others):
            for ids, token in zip(prompts, tokens, strict=True):
                ids.append(token)
    grid = torch.tensor([ids[-GRID[0] * (GRID[1] + 1) :] for ids in rows])
    return grid.unflatten(1, (GRID[0], GRID[1] + 1))[..., :-1] - IDS.visual_start


@torch.no_grad()
def write_without_a_cache(model, codes, limit):
    ids = understanding_prompt(codes, TEXT)
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

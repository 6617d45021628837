"""Guided generation of an image beside Hugging Face's ``generate``: same weights, one process.

Theirs runs with its own processors, as Emu3's model card does: guidance by a second cache, the
grammar as a prefix constraint, top-k. Greedy, both draw the same codes, which is checked first.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.harness import clock
from benchmarks.harness.clock import Call
from benchmarks.harness.entries import Entries
from emu3.config import Vocabulary
from emu3.generate import Sampling, generate_images
from emu3.model import Emu3
from emu3.prompt import forced_token, generation_prompt
from emu3.text import TextTokenizer

OURS, THEIRS = "emu3.generate", "Hugging Face"
DIRECTION = "generate"
CAPTION = "a photograph of a red fox in the snow, a deep forest behind it"
NEGATIVE = "lowres, bad anatomy, error, cropped, worst quality, low quality, blurry"
GRID = 24, 24
CHECKED = 2, 3
"""Rows and columns of the image that is drawn greedily to check that both do the same work."""


def entries_of(
    ours: Emu3,
    theirs: nn.Module,
    text: TextTokenizer,
    grid: tuple[int, int] = GRID,
    device: str = "cpu",
) -> Entries:
    """Prepare both on ``grid``; a peer that draws other codes greedily is not timed."""
    ours, theirs = ours.to(device).eval(), theirs.to(device).eval()
    entries, how = Entries(clock=clock.of(device)), Sampling(negative=NEGATIVE)
    greedy = Sampling(top_k=1, negative=NEGATIVE)
    expected = our_codes(ours, text, CHECKED, greedy)().flatten()
    same = codes_of(their_ids(theirs, text, CHECKED, greedy)(), text.vocabulary).equal(expected)
    entries.add(OURS, our_codes(ours, text, grid, how))
    if same:
        few = partial(their_ids, theirs, text, how=how)
        times = grid[0] * (grid[1] + 1) / (CHECKED[0] * (CHECKED[1] + 1))
        entries.add_warm(THEIRS, few(grid=grid), few(grid=CHECKED), times)
    else:
        entries.drop(THEIRS, "greedy, it draws other codes")
    return entries


def our_codes(model: Emu3, text: TextTokenizer, grid: tuple[int, int], how: Sampling) -> Call:
    """Draw one image, ``[1, h, w]`` codes."""
    return partial(generate_images, model, text, [CAPTION], grid, how)


def their_ids(
    model: nn.Module, text: TextTokenizer, grid: tuple[int, int], how: Sampling
) -> Callable[[], Tensor]:
    """Draw the tokens of one image behind ``img_token``, ``[h (w + 1) - 1]`` ids."""
    from transformers import (
        LogitsProcessorList,
        PrefixConstrainedLogitsProcessor,
        UnbatchedClassifierFreeGuidanceLogitsProcessor,
    )

    device = next(model.parameters()).device
    prompt, negative = (
        torch.tensor([generation_prompt(words, grid, text)], device=device)
        for words in (CAPTION, how.negative)
    )
    start, ids = prompt.shape[1], text.vocabulary
    visual = list(range(ids.visual_start, ids.size))
    greedy = {"do_sample": False} if how.top_k == 1 else {"do_sample": True, "top_k": how.top_k}

    def allowed(_: int, so_far: Tensor) -> list[int]:
        forced = forced_token(len(so_far) - start + 1, grid, ids)
        return visual if forced is None else [forced]

    def call() -> Tensor:
        # Guidance comes first: the constraint would leave infinities to subtract.
        constrain = PrefixConstrainedLogitsProcessor(allowed, num_beams=1)
        guide = UnbatchedClassifierFreeGuidanceLogitsProcessor(how.guidance, model, negative)
        torch.manual_seed(0)
        drawn = model.generate(
            prompt,
            logits_processor=LogitsProcessorList([guide, constrain]),
            max_new_tokens=grid[0] * (grid[1] + 1) - 1,
            pad_token_id=ids.pad,
            eos_token_id=ids.eos,
            **greedy,
        )
        return drawn[0, start:]

    return call


def codes_of(tokens: Tensor, ids: Vocabulary) -> Tensor:
    """The codes among ``tokens``, without ends of rows."""
    return tokens[tokens >= ids.visual_start] - ids.visual_start

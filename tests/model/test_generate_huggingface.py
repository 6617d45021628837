"""Guided images beside Hugging Face's model, ``generate`` and logits processors, in float32."""

import pytest
import torch
from torch import Tensor
from transformers import (
    Emu3ForCausalLM,
    LogitsProcessor,
    LogitsProcessorList,
    PrefixConstrainedLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)

from emu3.generate import Sampling, generate_images
from emu3.prompt import forced_token, generation_prompt
from emu3.text import ByteTokenizer
from emu3.weights import official_views
from emu3_kernels.ops.sampling.reference import gumbel
from tests.model.test_model import hugging_face
from tests.model.tiny import TINY, tiny_model

TEXT, IDS = ByteTokenizer(TINY.vocabulary), TINY.vocabulary
CAPTIONS = ["a red seven", "an orange one, wide"]
GRIDS = [(3, 4), (2, 7)]
SEEDS = [7, 2**63 + 5]
WAYS = [
    Sampling(top_k=1, negative="bad"),
    Sampling(top_k=5, negative="bad", temperature=0.7),
    Sampling(top_k=None, top_p=0.8, guidance=2.0),
    Sampling(top_k=40, guidance=1.0),
]


@pytest.mark.parametrize("how", WAYS, ids=["greedy", "top-k", "top-p", "unguided"])
def test_images_equal_those_of_hugging_face_token_for_token(how):
    """Of unequal captions, one after another there and together here."""
    ours = tiny_model()
    theirs, grid = hugging_face(), GRIDS[0]
    theirs.load_state_dict(official_views(ours))
    expected = [
        draw(theirs, words, grid, how, seed) for words, seed in zip(CAPTIONS, SEEDS, strict=True)
    ]
    assert generate_images(ours, TEXT, CAPTIONS, grid, how, SEEDS).equal(torch.stack(expected))


class Noise(LogitsProcessor):
    """Adds the noise of a seed to the codes, so that the greatest score is a draw by that seed."""

    def __init__(self, seed: int, places: list[int]) -> None:
        self.seed, self.places = torch.tensor((seed + 2**63) % 2**64 - 2**63), iter(places)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if (place := next(self.places)) is not None:
            codes = torch.arange(IDS.num_visual)
            noise = gumbel(self.seed, torch.tensor(place), codes, torch.float32)
            scores[:, IDS.visual_start : IDS.size] += noise
        return scores


def draw(
    model: Emu3ForCausalLM, words: str, grid: tuple[int, int], how: Sampling, seed: int
) -> Tensor:
    """An image ``[h, w]`` by ``generate``; processors in the order of Emu3's model card."""
    prompt, negative = (
        torch.tensor([generation_prompt(some, grid, TEXT)]) for some in (words, how.negative)
    )
    height, width = grid
    forced = [forced_token(offset + 1, grid, IDS) for offset in range(height * (width + 1) - 1)]
    before = [sum(one is None for one in forced[:offset]) for offset in range(len(forced))]
    places = [None if one else place for one, place in zip(forced, before, strict=True)]
    visual = list(range(IDS.visual_start, IDS.size))

    def allowed(_: int, so_far: Tensor) -> list[int]:
        token = forced[len(so_far) - prompt.shape[1]]
        return visual if token is None else [token]

    processors = [
        UnbatchedClassifierFreeGuidanceLogitsProcessor(how.guidance, model, negative),
        PrefixConstrainedLogitsProcessor(allowed, num_beams=1),
        TemperatureLogitsWarper(how.temperature),
        *([TopKLogitsWarper(how.top_k)] if how.top_k else []),
        *([TopPLogitsWarper(how.top_p)] if how.top_p else []),
        Noise(seed, places),
    ]
    tokens = model.generate(
        prompt,
        logits_processor=LogitsProcessorList(processors),
        max_new_tokens=len(forced),
        do_sample=False,
        pad_token_id=IDS.pad,
        eos_token_id=IDS.eos,
    )[0, prompt.shape[1] :]
    return (tokens[tokens >= IDS.visual_start] - IDS.visual_start).view(grid)

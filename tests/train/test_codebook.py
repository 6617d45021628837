"""A codebook of running means: one update a step, the same in all processes."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD
from torch.utils.checkpoint import checkpoint

from emu3.config import VisionSettings
from emu3.train.optim import build_optimizer
from emu3.vision import Quantizer, VisionTokenizer
from tests.ranks import Ranks
from tests.train.recipes import tiny_recipe

WORLD = 2
SETTINGS = VisionSettings(
    image_size=16,
    base_channels=8,
    multipliers=(1, 2),
    num_res_blocks=1,
    attention_stages=(),
    temporal_factor=1,
    groups=2,
    num_codes=16,
    code_width=4,
    ema_decay=0.5,
)


@pytest.fixture(scope="module")
def ranks():
    started = Ranks(WORLD)
    yield started
    started.close()


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Small(nn.Module):
    """Latents of a linear layer, and their codebook."""

    def __init__(self, **changes) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 4)
        self.quantize = Quantizer(SETTINGS.model_copy(update=changes))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        quantized, _, commitment = self.quantize(self.layer(x))
        return quantized.square().mean() + commitment

    def state(self) -> torch.Tensor:
        q = self.quantize
        return torch.cat((q.embedding.weight, q.sums, q.cluster_size[:, None]), dim=1).clone()


def on_rank(group, build) -> torch.Tensor:
    torch.manual_seed(100 + group.rank())
    return build(group.rank())


def tokenizer_in_parallel(rank: int, once_a_step: bool) -> torch.Tensor:
    """Two steps, each of two forwards if ``once_a_step``; the codebook and a weight."""
    tokenizer = VisionTokenizer(SETTINGS).train()
    optimizer = SGD([p for p in tokenizer.parameters() if p.requires_grad], 1e-3)
    if once_a_step:
        tokenizer.quantize.update_after(optimizer)
    model = DistributedDataParallel(tokenizer)
    for _ in range(2):
        optimizer.zero_grad()
        for _ in range(1 + once_a_step):
            reconstructed, _, commitment = model(torch.randn(2, 3, 16, 16))
            (reconstructed.square().mean() + commitment).backward()
        optimizer.step()
    weight = tokenizer.encoder.conv_in.weight.detach().flatten()
    return torch.cat((tokenizer.codebook.flatten(), tokenizer.quantize.sums.flatten(), weight))


def one_batch_in_parts(rank: int) -> torch.Tensor:
    model = Small(dead_code_threshold=0.0).train()
    model(drawn(WORLD * 40, 4).chunk(WORLD)[rank])
    return model.state()


def dead_codes_in_parts(rank: int) -> torch.Tensor:
    model = Small(dead_code_threshold=1e6).train()
    model(drawn(WORLD * 40, 4).chunk(WORLD)[rank])
    return model.quantize.embedding.weight.detach()


@pytest.mark.parametrize("once_a_step", [False, True])
def test_all_ranks_keep_one_codebook(once_a_step, ranks):
    """Weights were equal on all ranks, codebooks 0.43 apart after four steps."""
    one, two = ranks.run(on_rank, partial(tokenizer_in_parallel, once_a_step=once_a_step))
    assert one.equal(two)
    torch.manual_seed(100)  # that of rank 0, whose codebook all begin with
    assert not one[: 16 * 4].equal(VisionTokenizer(SETTINGS).codebook.flatten())


def test_the_means_are_those_of_the_latents_of_all_ranks(ranks):
    whole = Small(dead_code_threshold=0.0).train()
    whole(drawn(WORLD * 40, 4))
    for given in ranks.run(on_rank, one_batch_in_parts):
        torch.testing.assert_close(given, whole.state())


def test_dead_codes_move_to_latents_of_every_rank(ranks):
    one, two = ranks.run(on_rank, dead_codes_in_parts)
    assert one.equal(two)
    latents = Small().layer(drawn(WORLD * 40, 4)).detach()
    sources = (one[:, None] - latents).abs().amax(-1).argmin(-1)
    torch.testing.assert_close(one, latents[sources])
    assert set((sources // 40).tolist()) == set(range(WORLD))


def trained(run, steps: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """The codebook after ``steps``, each of which calls ``run(model, x)``, and the gradient."""
    model = Small(dead_code_threshold=0.5).train()
    optimizer = SGD(model.layer.parameters(), 1e-2)
    model.quantize.update_after(optimizer)
    for step in range(steps):
        optimizer.zero_grad()
        run(model, drawn(40, 4, seed=step))
        optimizer.step()
    return model.state(), model.layer.weight.grad


def at_once(model, x):
    model(x).backward()


def accumulated(model, x):
    for part in x.chunk(4):
        (model(part) / 4).backward()


def checkpointed(model, x, use_reentrant: bool):
    checkpoint(model, x.requires_grad_(), use_reentrant=use_reentrant).backward()


def test_forwards_of_one_step_count_as_one_batch():
    """Each moved the codebook and decayed the means: four micro-batches by decay ** 4."""
    (state, grad), (other_state, other_grad) = trained(at_once), trained(accumulated)
    torch.testing.assert_close(other_grad, grad)
    torch.testing.assert_close(other_state, state)
    assert trained(at_once, steps=1)[0].equal(trained(accumulated, steps=1)[0])


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_forward_that_checkpointing_repeats_is_counted_once_with_its_codes(use_reentrant):
    """The repetition counted again, and looked its codes up in a codebook that had moved."""
    state, grad = trained(partial(checkpointed, use_reentrant=use_reentrant))
    expected_state, expected_grad = trained(at_once)
    assert state.equal(expected_state)
    assert grad.equal(expected_grad)


def test_checkpointing_with_an_update_in_every_forward_is_refused():
    model = Small().train()
    loss = checkpoint(model, drawn(40, 4).requires_grad_(), use_reentrant=False)
    with pytest.raises(RuntimeError, match=r"^Quantizer: .* call update_after\(optimizer\)$"):
        loss.backward()


def test_one_forward_a_step_gives_the_bits_of_an_update_in_the_forward():
    model = Small(dead_code_threshold=0.5).train()
    optimizer = SGD(model.layer.parameters(), 1e-2)
    for step in range(2):
        optimizer.zero_grad()
        model(drawn(40, 4, seed=step)).backward()
        optimizer.step()
    assert trained(at_once)[0].equal(model.state())


def test_the_trainer_s_optimizer_updates_the_codebook_and_nothing_is_left_to_the_next(tmp_path):
    recipe = tiny_recipe("vision", tmp_path)
    tokenizer = VisionTokenizer(SETTINGS).train()
    optimizer = build_optimizer(tokenizer, recipe.optim)
    before = tokenizer.codebook.clone()
    for _ in range(2):
        tokenizer(drawn(2, 3, 16, 16))[2].backward()
    assert tokenizer.codebook.equal(before)
    optimizer.step()
    moved = tokenizer.codebook.clone()
    assert not moved.equal(before)
    optimizer.step()
    assert tokenizer.codebook.equal(moved)

"""A decoder on two processes, replicated by DDP or sharded by FSDP, against one process."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel

from emu3_kernels.huggingface import apply
from emu3_kernels.testing.budget import assert_as_accurate
from tests.model.test_model import hugging_face, some_tokens
from tests.model.tiny import tiny_model
from tests.ranks import Ranks

WORLD = 2
TOKENS = some_tokens(WORLD, 29)

Loss = Callable[[Tensor], Tensor]


class WithLoss(nn.Module):
    """Ours with its loss in ``forward``, which is what DDP wraps."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = tiny_model()

    def forward(self, tokens: Tensor) -> Tensor:
        return self.decoder.loss(tokens, torch.ones(tokens.shape))


def alone(dtype: torch.dtype) -> tuple[nn.Module, Loss]:
    model = WithLoss().to(dtype)
    return model.decoder, model


def replicated() -> tuple[nn.Module, Loss]:
    model = WithLoss()
    return model.decoder, DistributedDataParallel(model)


def sharded() -> tuple[nn.Module, Loss]:
    model, mesh = tiny_model(), DeviceMesh("cpu", range(WORLD))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    register_fsdp_forward_method(model, "loss")
    return model, lambda tokens: model.loss(tokens, torch.ones(tokens.shape))


def of_hugging_face(model: nn.Module) -> tuple[nn.Module, Loss]:
    return model, lambda tokens: model(tokens, labels=tokens).loss


def sharded_of_hugging_face() -> tuple[nn.Module, Loss]:
    model, mesh = apply(hugging_face()).train(), DeviceMesh("cpu", range(WORLD))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return of_hugging_face(fully_shard(model, mesh=mesh))


def trained(model: nn.Module, loss: Loss, tokens: Tensor) -> dict[str, Tensor]:
    value = loss(tokens)
    value.backward()
    gradients = {name: weight.grad for name, weight in model.named_parameters()}
    whole = {n: g.full_tensor() if hasattr(g, "full_tensor") else g for n, g in gradients.items()}
    return {"loss": value.detach(), **whole}


def on_rank(group: torch.distributed.ProcessGroup, build: Callable) -> dict[str, Tensor]:
    """Train on a row of the batch that is the rank's own."""
    return trained(*build(), TOKENS[group.rank()][None])


@pytest.fixture(scope="module")
def ranks():
    started = Ranks(WORLD)
    yield started
    started.close()


@pytest.mark.parametrize("build", [replicated, sharded, sharded_of_hugging_face])
def test_gradients_are_the_mean_of_what_the_rows_give_in_one_process(ranks, build):
    given = ranks.run(on_rank, build)
    assert not given[0]["loss"].equal(given[1]["loss"])
    if build is sharded_of_hugging_face:
        low = trained(*of_hugging_face(hugging_face()), TOKENS)
        exact = trained(*of_hugging_face(hugging_face().double()), TOKENS)
    else:
        low, exact = (trained(*alone(dtype), TOKENS) for dtype in (torch.float32, torch.float64))
    mean = {"loss": (given[0]["loss"] + given[1]["loss"]) / WORLD}
    for rank in given:
        assert rank.keys() == exact.keys()
        for name, value in (rank | mean).items():
            assert_as_accurate(name, value, low[name], exact[name])

"""Liger-Kernel's Triton kernels for the ops that we share, compiled and counted like ours.

Its own host code launches them; it chooses the number of warps by the architecture of the GPU, so
that architecture is patched in. These kernels have no contract.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from unittest import mock

import torch

from emu3_kernels.runtime.contracts import Config
from emu3_kernels.testing.codegen import Row, facts_of, recorded, row_of

ARCHITECTURE = {"sm_80": "ampere_ada", "sm_90": "hopper", "sm_100": "blackwell", "gfx942": "cdna3"}
"""Liger's name of each target."""


def rows_of_op(op: str, target: str) -> list[list[Row]]:
    """Return the rows of each config of Liger's for ``op``, one for each kernel."""
    return [list(rows_of(op, name, call, target)) for name, call in CALLS.get(op, {}).items()]


def rows_of(op: str, config: str, call: Callable[[], None], target: str) -> Iterator[Row]:
    _import_all(call)
    with pretending(target), recorded() as launches:
        call()
    kernels = {launch.kernel.__name__: launch for launch in launches}
    bare = Config(config, call, {})
    facts = facts_of(list(kernels.values()), target)
    for (name, launch), of_one in zip(kernels.items(), facts, strict=True):
        yield replace(row_of(op, bare, launch, of_one, target), kernel=f"Liger {name}")


def _import_all(call: Callable[[], None]) -> None:
    with recorded():
        call()


@contextmanager
def pretending(target: str) -> Iterator[None]:
    """Make every module of Liger's detect ``target`` as the GPU of this machine."""
    answers = {
        "is_hip": lambda: target.startswith("gfx"),
        "infer_device_arch": lambda: ARCHITECTURE[target],
    }
    with ExitStack() as patches:
        for module in [m for name, m in sys.modules.items() if name.startswith("liger_kernel")]:
            for name in answers.keys() & vars(module).keys():
                patches.enter_context(mock.patch.object(module, name, answers[name]))
        yield


def _bfloat16(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.bfloat16)


def _rms_norm() -> None:
    from liger_kernel.ops.rms_norm import rms_norm_forward

    rms_norm_forward(_bfloat16(4096, 4096), _bfloat16(4096), 1e-5, 0.0, "llama", None)


def _swiglu() -> None:
    from liger_kernel.ops.swiglu import swiglu_forward

    swiglu_forward(_bfloat16(2048, 14336), _bfloat16(2048, 14336))


def _rope() -> None:
    from liger_kernel.ops.rope import rope_forward

    q, k = (_bfloat16(1, 2048, heads, 128).transpose(1, 2) for heads in (32, 8))
    rope_forward(q, k, torch.empty(1, 2048, 128), torch.empty(1, 2048, 128))


def _cross_entropy() -> None:
    from liger_kernel.ops.cross_entropy import cross_entropy_forward

    logits = _bfloat16(256, 184622).requires_grad_()
    targets = torch.zeros(256, dtype=torch.int64)
    cross_entropy_forward(logits, targets, None, -100, 0.0, 0.0, "mean", None, False)


def _linear_cross_entropy() -> None:
    from liger_kernel.ops.fused_linear_cross_entropy import fused_linear_cross_entropy_forward

    hidden, head = _bfloat16(2, 8).requires_grad_(), _bfloat16(184622, 8).requires_grad_()
    fused_linear_cross_entropy_forward(hidden, head, torch.zeros(2, dtype=torch.int64))


CALLS: dict[str, dict[str, Callable[[], None]]] = {
    "rms_norm": {"4096 x 4096": _rms_norm},
    "swiglu": {"2048 x 14336": _swiglu},
    "rope": {"2048 tokens, 32 + 8 heads": _rope},
    "cross_entropy": {"256 x 184622, both passes": _cross_entropy},
    "linear_cross_entropy": {"2 x 184622, both passes": _linear_cross_entropy},
}

"""Triton kernels executed on the CPU by ttsem, which runs their real TTIR.

It is right in bfloat16, and stops a launch at the line of an access out of bounds or of a race
between programs. For a process in which Triton compiles: see the ``emulating`` fixture.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from ttsem import pidraces, sanitize

from emu3_kernels.ops.loss import triton as loss
from emu3_kernels.runtime import launch
from emu3_kernels.testing.budget import assert_as_accurate
from emu3_kernels.testing.suite import cases, public, truth, value_and_gradients
from tests.gates import faulty

ROUND_TWICE = {"linear_cross_entropy", "attention", "causal_conv3d", "temporal_residual", "conv3x3"}
"""Ops that round on the way: a gradient kept to be scaled later, probabilities and activations
before a product.
"""


@contextmanager
def emulated() -> Iterator[sanitize.Session]:
    """Run every Triton launch of the block through ttsem, on the CPU tensors it is given."""
    find_race = pidraces.find_race
    with (
        mock.patch.object(launch, "DEVICES", {"cpu"}),
        mock.patch.object(pidraces, "find_race", lambda log: find_race(unordered(log))),
        sanitize.session(cuda_is_cpu=False) as session,
    ):
        try:
            yield session
        except (sanitize.KernelFault, sanitize.Unjudged) as stop:
            # ttsem's own exceptions do not survive the way back to the test's process.
            raise AssertionError(str(stop)) from None
    assert not session.races_unchecked, "a launch was too large to be checked for races"


def unordered(log: list | None) -> list | None:
    """Leave out loads of what other programs stored before they counted themselves.

    ttsem knows no order between programs. A program that counts itself by an atomic of acquire and
    release order sees all that is stored by those that did so before it, at the same address. That
    they are before it in every schedule is seen in another order of the programs.
    """
    counted = {}
    for at, (program, kind, op, addresses, *_) in enumerate(log or ()):
        if kind == "a" and "sem = 4" in op:
            counted.setdefault(program, (at, addresses[0]))
    if not counted:
        return log
    kept = []
    for at, entry in enumerate(log):
        counted_at, counter = counted.get(entry[0], (len(log), None))
        if entry[1] == "r" and at > counted_at:
            released = [
                addresses
                for stored_at, (program, kind, _, addresses, *_) in enumerate(log[:counted_at])
                if kind in "ws" and counted.get(program, (0, None))[1] == counter
                if stored_at < counted[program][0] <= counted_at
            ]
            if released and np.isin(entry[3], np.concatenate(released)).all():
                continue
        kept.append(entry)
    return kept


def check_value_and_gradients(
    op: str, size: dict, dtype: torch.dtype, backend: str = "triton", **settings: object
) -> None:
    """Compare a call with the reference; ``settings`` are of the op alone, such as its memory."""
    inputs = cases(op).make(**size, dtype=dtype, device="cpu")
    call = partial(public(op), backend=backend, **settings)
    with emulated() as session:
        actual = value_and_gradients(op, call, inputs)
    tensors = [value for value in inputs.values() if isinstance(value, Tensor)]
    tensors += actual.values()
    assert session.launches or not all(t.numel() for t in tensors), "no kernel was launched"
    low, exact = truth(op, size, dtype)
    for name, value in actual.items():
        assert_as_accurate(name, value, low[name], exact[name])
        # The mean error of few float32 results, such as a loss, is luck.
        if value.dtype == dtype and op not in ROUND_TWICE:
            assert_rounded_once(name, value, low[name], exact[name])


def assert_rounded_once(name: str, actual: Tensor, low: Tensor, exact: Tensor) -> None:
    """Hold the mean error to that of the reference, which computes in float32 and rounds once.

    A product rounded on the way, for want of float32, stays within the budget of the largest
    error, but brings the mean to the root of two times its own; the bound lies halfway.
    """
    if actual.numel():
        error, once = ((value.double() - exact).abs().mean() for value in (actual, low))
        assert error <= 2**0.25 * once, f"{name}: mean error {error:.2e}, rounded once {once:.2e}"


def check_the_sum_is_rounded() -> None:
    add_rms_norm = cases("add_rms_norm")
    inputs = add_rms_norm.make(**add_rms_norm.check[-1], dtype=torch.bfloat16, device="cpu")
    with emulated():
        y, summed = public("add_rms_norm")(**inputs, backend="triton")
        apart = public("rms_norm")(summed, inputs["weight"], backend="triton")
    assert torch.equal(summed, inputs["x"] + inputs["residual"])
    assert torch.equal(y, apart)


def check_a_dropped_row_is_not_read() -> None:
    """The third row does not exist: a read of it would be out of bounds."""
    logits, targets = torch.randn(2, 4133), torch.tensor([1, 2, 3])
    losses, saved = torch.ones(3), torch.ones(2 + 3 * 2)
    options = loss.SUMS_TILE | {"STAGES": 1, "VECTOR": 4, "SMOOTHED": False}
    options |= {"WEIGHTED": True, "NORMALIZED": False}
    with emulated():
        loss.cross_entropy_fwd_kernel[(3,)](
            *(logits, targets, torch.tensor([1.0, 1.0, 0.0]), None, losses, saved),
            *(loss.misalignment_of(logits), 4133, 4133, -100, None, 0.0, 0.0),
            **options,
        )
    assert losses.ne(0).tolist() == saved[2:].view(3, 2).any(dim=1).tolist() == [True, True, False]


def launch_emulated(name: str, order: str = "", **constants: object) -> None:
    """Launch a kernel of ``faulty.py``, its programs in the order that ttsem calls ``order``."""
    with emulated(), mock.patch.dict(os.environ, TTSEM_GRID_ORDER=order):
        faulty.run(name, **constants)


def check_any_order_of_programs(op: str, size: dict) -> None:
    for order in ("reverse", "shuffle:1", "shuffle:2"):
        with mock.patch.dict(os.environ, TTSEM_GRID_ORDER=order):
            check_value_and_gradients(op, size, torch.bfloat16)

"""``torch.compile`` of the language model with Triton: one graph each, traced without a GPU."""

from functools import partial

import pytest
import torch

from emu3.cache import KeyValueCache
from emu3_kernels import use_backend
from emu3_kernels.testing.launches import recorded_launches
from emu3_kernels.testing.suite import cases, differentiable, public
from tests.model.tiny import tiny_model

OPS = ("rms_norm", "add_rms_norm", "swiglu", "swiglu_packed", "rope", "rope_append")
"""The last has no gradient."""


def compiled(function):
    torch.compiler.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager")


def launches_of(op: str, training: bool) -> tuple[list[str], list[str]]:
    """Kernels that a compiled call of ``op`` launches, and those of an eager one."""
    kind = "swiglu" if op == "swiglu_packed" else op
    inputs = cases(kind).make(**cases(kind).check[-1], dtype=torch.float32, device="cpu")
    leaves = [inputs[n].requires_grad_() for n in differentiable(kind, inputs)] if training else []
    function = partial(public(op), backend="triton")
    if op == "swiglu_packed":
        inputs = {"gate_up": torch.cat([inputs["gate"], inputs["up"]], dim=-1)}
    found = []
    with recorded_launches() as launches:
        for call in (compiled(function), function):
            results = call(**inputs)
            results = results if isinstance(results, tuple) else (results,)
            if leaves:
                torch.autograd.grad(results, leaves, [torch.ones_like(r) for r in results])
            found.append(list(launches))
            launches.clear()
    return found[0], found[1]


@pytest.mark.parametrize(
    ("op", "training"), [(op, False) for op in OPS] + [(op, True) for op in OPS[:-1]]
)
def test_an_op_is_one_graph_that_launches_what_an_eager_call_launches(compiling, op, training):
    traced, eager = compiling(launches_of, op, training)
    assert traced == eager
    assert traced


def launches_of_the_model(training: bool, whole: bool) -> tuple[list[str], list[str]]:
    model, tokens = tiny_model(dropout=0.1), torch.ones(2, 7, dtype=torch.int64)
    model.train(training)
    compile_ = partial(torch.compile, fullgraph=True, backend="aot_eager")
    found = []
    torch.compiler.reset()
    with recorded_launches() as launches, use_backend("triton"), torch.set_grad_enabled(training):
        for is_compiled in (False, True):
            if is_compiled and whole:
                model.forward = compile_(model.forward)
            elif is_compiled:
                for block in model.blocks:
                    block.forward = compile_(block.forward)
            hidden = model(tokens)
            if training:
                hidden.sum().backward()
            found.append(list(launches))
            launches.clear()
    return found[1], found[0]


@pytest.mark.parametrize(
    "whole", [True, pytest.param(False, marks=pytest.mark.e2e)], ids=["model", "blocks"]
)
@pytest.mark.parametrize("training", [False, True])
def test_a_model_is_one_graph_as_a_whole_and_block_by_block(compiling, training, whole):
    traced, eager = compiling(launches_of_the_model, training, whole)
    assert sorted(traced) == sorted(eager)


def launches_of_a_decode_step() -> tuple[list[str], list[str]]:
    model, token = tiny_model(), torch.ones(2, 1, dtype=torch.int64)
    step = compiled(model.forward)
    found = []
    with recorded_launches() as launches, use_backend("triton"), torch.no_grad():
        for forward in (model.forward, step):
            cache = KeyValueCache(model.settings, 2, 40, dtype=torch.float32)
            cache.longest = 5
            forward(token, cache)
            found.append(list(launches))
            launches.clear()
    return found[1], found[0]


def test_a_decode_step_is_one_graph(compiling):
    traced, eager = compiling(launches_of_a_decode_step)
    assert traced == eager

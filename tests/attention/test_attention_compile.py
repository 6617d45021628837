"""``torch.compile`` of attention: one graph, also for many first sequences of dropout.

Those of Triton are traced without a GPU, and launches recorded in place of being made.
"""

from contextlib import nullcontext

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from emu3_kernels import Documents, HeadShard, attention
from emu3_kernels.testing.launches import recorded_launches


def launches_of(training: bool, documents: str, dropout_p: float) -> list[list[str]]:
    """Name the kernels that an eager call launches, and those of a compiled one."""

    def call(q, k, v, ids, seed):
        ids = Documents(ids) if documents == "made once" else ids
        settings = {"document_ids": ids, "dropout_p": dropout_p, "seed": seed}
        return attention(q, k, v, **settings, return_lse=True, backend="triton")

    leaves = [torch.randn(1, 40, n, 16, requires_grad=training) for n in (2, 1, 1)]
    ids = torch.arange(40, dtype=torch.int32)[None] // 15 if documents else None
    seed = torch.tensor(1) if dropout_p else None
    torch.compiler.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    found = []
    with recorded_launches() as names:
        for function in (call, compiled):
            results = function(*leaves, ids, seed)
            if training:
                torch.autograd.grad(results, leaves, [torch.ones_like(r) for r in results])
            found.append(list(names))
            names.clear()
    return found


@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
@pytest.mark.parametrize("documents", ["", "ids", "made once"])
@pytest.mark.parametrize("training", [False, True])
def test_a_call_is_one_graph_that_launches_the_same_kernels(
    compiling, training, documents, dropout_p
):
    eager, compiled = compiling(launches_of, training, documents, dropout_p)
    assert compiled == eager
    assert len(eager) == (3 if training else 1)


def graphs_of(backend: str, dynamic: bool | None) -> list[int]:
    """Count the graphs of a step after calls for the sequences 0, 2, 4, 6 and 14."""
    counter, found = CompileCounterWithBackend("aot_eager"), []
    seed = torch.tensor(1)

    def call(q, k, v, first):
        dropout = {"dropout_p": 0.3, "seed": seed, "dropout_heads": HeadShard(2, 0, first)}
        return attention(q, k, v, **dropout, backend=backend)

    torch.compiler.reset()
    compiled = torch.compile(call, fullgraph=True, backend=counter, dynamic=dynamic)
    for first in (0, 2, 4, 6, 14):
        leaves = [torch.randn(2, 9, n, 16, requires_grad=True) for n in (2, 1, 1)]
        with recorded_launches() if backend == "triton" else nullcontext():
            out = compiled(*leaves, first)
            gradients = torch.autograd.grad(out.sum(), leaves)
        if backend != "triton":
            expected = call(*leaves, first)
            torch.testing.assert_close(out, expected)
            torch.testing.assert_close(gradients, torch.autograd.grad(expected.sum(), leaves))
        found.append(counter.frame_count)
    return found


@pytest.mark.parametrize(
    ("backend", "dynamic", "graphs"),
    [("cpu", None, [1, 2, 2, 2, 2]), ("cpu", True, [1] * 5), ("triton", None, [1, 2, 2, 2, 2])],
)
def test_a_graph_with_dropout_serves_any_sequences(compiling, backend, dynamic, graphs):
    """With a graph for each number, micro-batches ended compilation at the eighth."""
    run = compiling if backend == "triton" else lambda function, *args: function(*args)
    assert run(graphs_of, backend, dynamic) == graphs

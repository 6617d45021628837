"""``torch.compile`` of attention with Triton: one graph, traced without a GPU.

Launches are recorded in place of being made.
"""

import pytest
import torch

from emu3_kernels import Documents, attention
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

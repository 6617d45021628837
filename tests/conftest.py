"""Set before anything imports triton: the interpreter where there is no GPU, and NaN poison."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# torch.empty now returns NaN: a kernel that leaves an element unwritten fails its test.
torch.use_deterministic_algorithms(True, warn_only=True)

from importlib.util import find_spec  # noqa: E402

import pytest  # noqa: E402

from tests.compilers import compiling, emulating  # noqa: E402, F401


@pytest.fixture(scope="session", autouse=True)
def exact_products_of_the_interpreter() -> None:
    """Let Triton's interpreter sum products in float64, and so as good as exactly.

    It leaves them to the machine's BLAS, whose float32 sums depend on where in its matrix a row
    stands and on the processor; a GPU's do not.
    """
    if not find_spec("triton"):
        return
    import numpy as np
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        product = np.matmul(a.data, b.data, dtype=np.float64)
        return TensorHandle((product + d.data).astype(d.data.dtype), d.dtype.scalar)

    InterpreterBuilder.create_dot = dot


@pytest.fixture(scope="session")
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"

"""The generic suite with the oldest Triton that we support, interpreted.

The reference's results are shared with the rows of the installed Triton, on disk.
"""

import os
from importlib.util import find_spec

import pytest
import torch

if not find_spec("triton") and "triton" not in os.environ.get("EMU3_REQUIRE", ""):
    pytest.skip("triton is not installed: no version is tested", allow_module_level=True)

from emu3_kernels.ops import OPS
from emu3_kernels.testing.compilers import OLDEST
from emu3_kernels.testing.suite import backends, cases, check_call

pytestmark = pytest.mark.oldest
CALLS = [
    pytest.param(op, size, dtype, id=f"{op}-{i}-{str(dtype).removeprefix('torch.')}")
    for op in OPS
    if "triton" in backends(op)
    for i, size in enumerate(cases(op).check)
    for dtype in (torch.float32, torch.float16)
]


@pytest.mark.parametrize(("op", "size", "dtype"), CALLS)
def test_value_and_gradients(op, size, dtype, interpreting_oldest):
    assert interpreting_oldest(check_call, op, "triton", size, dtype, "cpu") is None


def imported_version() -> str:
    import triton

    return triton.__version__


def test_the_interpreter_is_the_oldest(interpreting_oldest):
    assert interpreting_oldest(imported_version) == OLDEST

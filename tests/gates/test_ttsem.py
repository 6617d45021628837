"""The Triton kernels without a GPU, in bfloat16, which Triton's interpreter gets wrong.

ttsem runs the real TTIR of every launch, as compiled for sm_90, and refuses an access out of bounds
and a race between programs. Neither depends on the dtype, so float32 and float16 are left to the
interpreter. What comes after TTIR is out of its sight: layouts, the copies that a pipelined loop
makes ahead, races between the warps of one program. ``test_codegen`` counts the machine code.
"""

import os
from functools import partial
from importlib.util import find_spec

import pytest
import torch

from emu3_kernels.ops import OPS
from emu3_kernels.testing.suite import backends, cases

if not find_spec("ttsem") and "triton" not in os.environ.get("EMU3_REQUIRE", ""):
    pytest.skip(
        "ttsem is not installed: pip install --no-deps --ignore-requires-python ttsem==0.1.0",
        allow_module_level=True,
    )

from tests.gates import emulated

pytestmark = pytest.mark.emulated
CALLS = [
    pytest.param(op, size, id=f"{op}-{i}")
    for op in OPS
    if "triton" in backends(op)
    for i, size in enumerate(cases(op).check)
]


@pytest.mark.parametrize(("op", "size"), CALLS)
def test_value_and_gradients(op, size, emulating):
    emulating(emulated.check_value_and_gradients, op, size, torch.bfloat16)


@pytest.mark.parametrize("op", ["rms_norm", "add_rms_norm"])
def test_a_row_wider_than_the_registers(op, emulating):
    """Five rows: one more than the programs that sum the gradient of the weight."""
    size = {"num_rows": 5, "width": 16384 + 41}
    emulating(emulated.check_value_and_gradients, op, size, torch.bfloat16)


def test_a_row_of_several_blocks_of_the_token_losses(emulating):
    """Rows start off the 16 bytes of one access; the last block is ragged."""
    size = {"tokens": 3, "classes": 2 * 4096 + 41, "weighted": True, "label_smoothing": 0.1}
    emulating(emulated.check_value_and_gradients, "cross_entropy", size, torch.bfloat16)


def test_a_row_of_weight_zero_is_not_read(emulating):
    """Its loss would be 0 all the same: only the time would tell."""
    emulating(emulated.check_a_dropped_row_is_not_read)


def test_several_products_of_the_head(emulating):
    """Without memory a block has 1,024 classes, and the sums of three are added up."""
    op, size = "linear_cross_entropy", {"tokens": 3, "width": 24, "classes": 2085}
    check = partial(emulated.check_value_and_gradients, memory=0)
    emulating(check, op, size | {"label_smoothing": 0.1}, torch.bfloat16)


def test_the_sum_is_rounded_before_it_is_normalised(emulating):
    """Or the pair would not equal the two steps apart, and its gradients would be another's."""
    emulating(emulated.check_the_sum_is_rounded)


@pytest.mark.parametrize("index", [2, -1])
def test_the_last_program_of_a_decoded_token_may_be_any(index, emulating):
    size = cases("decode_attention").check[index]
    emulating(emulated.check_any_order_of_programs, "decode_attention", size)


@pytest.mark.parametrize(
    ("order", "sem", "counted", "refused"),
    [
        ("", "acq_rel", True, False),
        ("reverse", "acq_rel", True, False),
        ("", "relaxed", True, True),
        ("reverse", "acq_rel", False, True),
    ],
)
def test_a_last_program_that_others_may_follow_is_refused(order, sem, counted, refused, emulating):
    launched = partial(emulated.launch_emulated, order=order, SEM=sem, COUNTED=counted)
    if not refused:
        emulating(launched, "last_sums_kernel")
        return
    with pytest.raises(AssertionError, match="any order and at the same time"):
        emulating(launched, "last_sums_kernel")


@pytest.mark.parametrize(
    ("kernel", "line", "fault"),
    [
        ("unmasked_kernel", r"tl\.store\(y_ptr \+ i, x\)", "writes 32 element.* past the end"),
        ("overread_kernel", r"x = tl\.load\(x_ptr \+ i\)", "reads 32 element.* past the end"),
        ("racy_kernel", r"tl\.store\(y_ptr \+ c, total\)", "any order and at the same time"),
    ],
)
def test_a_fault_is_refused_by_its_line(kernel, line, fault, emulating):
    with pytest.raises(AssertionError, match=rf"(?s){line}.*{fault}"):
        emulating(emulated.launch_emulated, kernel)

"""Values that only a GPU knows are asserted there: it ends the process, so each has its own."""

import subprocess
import sys

import pytest
import torch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU to assert a value")

CHECKED = """
import torch
from emu3_kernels.runtime.checks import check_values
for value in {values}:
    ok = torch.tensor(value, device="cuda") < 8
    check_values("rope", ok, "positions must lie in [0, 8)", lambda: "unused")
torch.cuda.synchronize()
"""


@pytest.mark.parametrize(("values", "status"), [([3, 7], 0), ([3, 9], 1)])
def test_a_value_outside_its_range_ends_the_process_and_no_other_does(values, status):
    command = [sys.executable, "-c", CHECKED.format(values=values)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    assert ("device-side assert" in done.stderr) == bool(status), done.stderr

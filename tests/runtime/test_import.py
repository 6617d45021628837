"""``import emu3_kernels``: no GPU is touched, no optional library is imported, and it is quick."""

from tests import fresh

MOST_CALLS = 245_000
"""Of Python functions: those counted and a tenth for other versions."""
FAKED = """
import sys
import torch

def touched(*args, **kwargs):
    raise AssertionError("the GPU was asked at import")

for name in ("_lazy_init", "current_device", "device_count", "get_device_properties",
             "get_device_capability", "init", "is_available", "set_device", "synchronize"):
    setattr(torch.cuda, name, touched)
torch.cuda.is_initialized = lambda: False
torch.version.cuda = "13.0"
calls = 0

def count(frame, event, arg):
    global calls
    calls += event == "call"

sys.setprofile(count)
import emu3_kernels
sys.setprofile(None)
optional = {"flash_attn", "xformers", "transformers", "faiss", "torch._dynamo"} & set(sys.modules)
print(calls, *optional)
"""


def test_an_import_touches_no_gpu_imports_no_optional_library_and_is_quick():
    """0.5 s of CPU time beside torch's own import, on a quiet machine.

    Held by the calls of Python functions: other processes slow an import by half.
    """
    done = fresh.run(FAKED, TRITON_INTERPRET="0")
    assert done.returncode == 0, done.stderr
    calls, *optional = done.stdout.split()
    assert optional == []
    assert int(calls) <= MOST_CALLS

"""``import emu3_kernels``: no GPU is touched, no optional library is imported, and it is quick."""

from tests import fresh

FAKED = """
import sys, time
import torch

def touched(*args, **kwargs):
    raise AssertionError("the GPU was asked at import")

for name in ("_lazy_init", "current_device", "device_count", "get_device_properties",
             "get_device_capability", "init", "is_available", "set_device", "synchronize"):
    setattr(torch.cuda, name, touched)
torch.cuda.is_initialized = lambda: False
torch.version.cuda = "13.0"
began = time.process_time()
import emu3_kernels
seconds = time.process_time() - began
optional = {"flash_attn", "xformers", "transformers", "faiss", "torch._dynamo"} & set(sys.modules)
print(seconds, *optional)
"""


def test_an_import_touches_no_gpu_imports_no_optional_library_and_is_quick():
    """CPU time beside torch's own import, which other processes do not inflate: at most 0.5 s.

    Half as much again is allowed, for a processor whose clock is low.
    """
    done = fresh.run(FAKED, TRITON_INTERPRET="0")
    assert done.returncode == 0, done.stderr
    seconds, *optional = done.stdout.split()
    assert optional == []
    assert float(seconds) <= 0.75

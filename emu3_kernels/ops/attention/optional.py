"""What the adapters of other libraries share: a library is imported and tried at its first use.

Importing ``emu3_kernels`` imports none.
"""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

INT32_MAX = torch.iinfo(torch.int32).max
WARN, ERROR = 1, 2
"""Of :func:`determinism`: kernels of PyTorch that can add in a fixed order do so under ERROR alone,
which is ``torch.use_deterministic_algorithms(True)``, and not with ``warn_only``."""


def determinism() -> int:
    """Return what ``torch.get_deterministic_debug_mode`` does, in a traced call too."""
    return torch.get_deterministic_debug_mode()


def with_positive_scale(q: Tensor, scale: float) -> tuple[Tensor, float]:
    """Return queries and a positive scale of the same scores.

    Libraries multiply the -inf of a mask by the scale, or take it out of the maximum.
    """
    return (q, scale) if scale > 0 else (q * scale, 1.0)


def aligned(x: Tensor) -> Tensor:
    """Return ``x [B, T, H, K]``, as a copy unless its heads are 16-byte vectors to a kernel.

    A kernel that loads vectors from another address ends the process's use of the GPU. A traced
    call takes the start of the memory to be that of an allocation.
    """
    elements = [x.stride(d) for d in range(3) if x.shape[d] > 1]
    if not torch.compiler.is_compiling():
        elements.append(x.storage_offset())
    if x.stride(3) == 1 and all(n * x.element_size() % 16 == 0 for n in elements):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def extent(x: Tensor) -> int:
    """Count the elements from the first of ``x`` to its last."""
    return sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)) + 1


def failure(call: Callable[..., object], *args: object) -> str | None:
    """Make ``call(*args)`` once in the process; return the reason if it failed, from then on.

    Any failure counts: a missing package or extension, another torch, an unsupported GPU.
    """
    return _failure(call, *args)


# What torch.compiler.assume_constant_result sets, which imports torch._dynamo: seconds. A graph is
# traced again after torch.use_deterministic_algorithms.
determinism._dynamo_marked_constant = failure._dynamo_marked_constant = True


@cache
def _failure(call: Callable[..., object], *args: object) -> str | None:
    try:
        # Also of a first use under torch.inference_mode, which the later ones need not be.
        with torch.inference_mode(False), torch.enable_grad():
            call(*args)
    except ModuleNotFoundError as missing:
        return f"the package {missing.name!r} is not installed"
    except Exception as error:
        return f"its first use failed with {type(error).__name__}: {error}"
    return None

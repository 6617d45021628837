"""What the adapters of optional libraries share: a library is imported and tried at its first use.

Importing ``emu3_kernels`` imports none.
"""

from collections.abc import Callable
from functools import cache


def failure(call: Callable[..., object], *args: object) -> str | None:
    """Make ``call(*args)`` once in the process; return the reason if it failed, from then on.

    Any failure counts: a missing package or extension, another torch, an unsupported GPU.
    """
    return _failure(call, *args)


# What torch.compiler.assume_constant_result sets, which imports torch._dynamo: seconds.
failure._dynamo_marked_constant = True


@cache
def _failure(call: Callable[..., object], *args: object) -> str | None:
    try:
        call(*args)
    except ModuleNotFoundError as missing:
        return f"the package {missing.name!r} is not installed"
    except Exception as error:
        return f"its first use failed with {type(error).__name__}: {error}"
    return None

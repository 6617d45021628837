"""Triton's interpreter, exact in ``tl.dot`` and faster: call :func:`improve` once a process."""

import numpy as np
from triton.runtime import interpreter
from triton.runtime.interpreter import (
    GridExecutor,
    InterpreterBuilder,
    TensorHandle,
)

_patch_language, _launch = interpreter._patch_lang, GridExecutor.__call__
_patched: set[int] = set()


def improve() -> None:
    """Replace functions of the interpreter; what kernels compute stays the same or gets exact."""
    InterpreterBuilder.create_dot = _dot
    interpreter._patch_lang = _patch_language_once
    GridExecutor.__call__ = _launch_anew


def _dot(self, a, b, d, input_precision, max_num_imprecise_acc):
    """Accumulate in float64, which is as good as exact.

    The interpreter calls the BLAS of the machine, whose float32 sums depend on the processor and on
    the position of a row in its matrix; those of a GPU do not.
    """
    product = np.matmul(a.data, b.data, dtype=np.float64)
    return TensorHandle((product + d.data).astype(d.data.dtype), d.dtype.scalar)


def _patch_language_once(fn):
    """Patch ``triton.language`` once in a launch, not at every call of a device function.

    Patching walks all members of the language: half of the time of a program that calls ``tl.sum``.
    """
    if id(fn.__globals__) in _patched:
        return None
    _patched.add(id(fn.__globals__))
    return _patch_language(fn)


def _launch_anew(self, *args, **kwargs):
    _patched.clear()
    return _launch(self, *args, **kwargs)

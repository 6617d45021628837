"""Triton's interpreter, exact in ``tl.dot`` and twice as fast: call :func:`improve` once."""

from dataclasses import replace
from functools import cache

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle

_patch_language, _launch = interpreter._patch_lang, GridExecutor.__call__
_np_dtype, _init_tensor = interpreter._get_np_dtype, tl.core.tensor.__init__
_patch_lang_tensor = interpreter._patch_lang_tensor
_patched: set[int] = set()


def improve() -> None:
    """Replace functions of the interpreter; what a kernel computes stays the same or gets exact."""
    InterpreterBuilder.create_dot = _dot
    interpreter._patch_lang = _patch_language_once
    interpreter._patch_lang_tensor = _patch_tensor
    GridExecutor.__call__ = _launch_anew
    # Overflow is computed at every integer operation, half of the time, for an assertion that is
    # skipped unless options.debug is set.
    builder = interpreter.interpreter_builder
    if not builder.options.debug:
        builder.options = replace(builder.options, sanitize_overflow=False)
    interpreter._get_np_dtype = _np_dtype_of
    tl.core.tensor.__init__ = _init_tensor_of_known_shape


def _dot(self, a, b, d, input_precision, max_num_imprecise_acc):
    """Accumulate in float64, which is as good as exact.

    The interpreter calls the BLAS of the machine, whose float32 sums depend on the processor and on
    the position of a row in its matrix; those of a GPU do not.
    """
    product = np.matmul(a.data, b.data, dtype=np.float64)
    return TensorHandle((product + d.data).astype(d.data.dtype), d.dtype.scalar)


def _patch_language_once(fn):
    """Patch ``triton.language`` once in a launch, not at every call of a device function.

    Patching walks all members of the language: a third of the time of a program that calls
    ``tl.sum``.
    """
    if id(fn.__globals__) in _patched:
        return None
    _patched.add(id(fn.__globals__))
    return _patch_language(fn)


def _patch_tensor(tensor, scope):
    """Make a tensor of one element an integer: Triton 3.6 leaves that to NumPy, which refuses."""
    _patch_lang_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


def _launch_anew(self, *args, **kwargs):
    _patched.clear()
    return _launch(self, *args, **kwargs)


def _np_dtype_of(dtype):
    """Look a scalar dtype up once: the original builds its table of 18 at every call."""
    if isinstance(dtype, tl.pointer_type):
        return _np_dtype(dtype)
    scalar = dtype.element_ty if isinstance(dtype, tl.block_type) else dtype
    return _np_dtype(scalar) if isinstance(scalar, tl.pointer_type) else _np_dtype_by_name(scalar)


@cache
def _np_dtype_by_name(scalar):
    return _np_dtype(scalar)


def _init_tensor_of_known_shape(self, handle, type):
    """Share the shape of a tensor, a tuple of constants, with all others of that shape."""
    shape = tuple(type.shape) if type.is_block() else ()
    if shape not in _shapes:
        _init_tensor(self, handle, type)
        _shapes[shape] = self.numel, self.shape
        return
    self.handle, self.type, self.dtype = handle, type, type.scalar
    self.numel, self.shape = _shapes[shape]


_shapes: dict[tuple, tuple] = {}

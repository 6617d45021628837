"""Triton's interpreter, exact in ``tl.dot`` and over twice as fast: call :func:`improve` once."""

from dataclasses import replace
from functools import cache

import numpy as np
import triton.language as tl
from triton.language import core
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle

_patch_language, _launch = interpreter._patch_lang, GridExecutor.__call__
_np_dtype, _init_tensor = interpreter._get_np_dtype, core.tensor.__init__
_patch_lang_tensor, _unwrap = interpreter._patch_lang_tensor, core._unwrap_if_constexpr
_init_block_type, _equal_dtypes = core.block_type.__init__, core.dtype.__eq__
_broadcast, _constant = TritonSemantic.broadcast_impl_value, TritonSemantic.scalar_constant
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
    interpreter._patch_attr = _patch_attribute
    core.tensor.__init__ = _init_tensor_of_known_shape
    core.block_type.__init__ = _init_known_block_type
    core.dtype.__eq__ = _are_equal_dtypes
    core._unwrap_if_constexpr = _unwrap_unless_plain
    TritonSemantic.broadcast_impl_value = _broadcast_unless_alike
    TritonSemantic.scalar_constant = _known_constant


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
    shape = type.shape if type.is_block() else None
    if id(shape) not in _shapes:
        _init_tensor(self, handle, type)
        _shapes[id(shape)] = self.numel, self.shape, shape  # which keeps the id
        return
    self.handle, self.type, self.dtype = handle, type, type.scalar
    self.numel, self.shape, _ = _shapes[id(shape)]


def _init_known_block_type(self, element_ty, shape):
    """Share the shape of a block, checked once, with all others of that shape."""
    sizes = tuple([d if d.__class__ is int else _unwrap(d) for d in shape])
    if (key := (sizes, element_ty.name)) not in _names:
        _init_block_type(self, element_ty, shape)
        _names[key] = self.name
        self.shape, self.numel = _blocks.setdefault(sizes, (self.shape, self.numel))
        return
    self.element_ty, self.name = element_ty, _names[key]
    self.shape, self.numel = _blocks[sizes]


def _broadcast_unless_alike(self, lhs, rhs):
    left, right = lhs.type, rhs.type
    if left.is_block() and right.is_block() and left.shape is right.shape:
        return lhs, rhs
    return _broadcast(self, lhs, rhs)


def _known_constant(self, value, dtype):
    """Make the tensor of a number once: nothing writes to it."""
    key = value, value.__class__, dtype.name
    if key not in _constants:
        _constants[key] = _constant(self, value, dtype)
    return _constants[key]


def _are_equal_dtypes(self, other):
    return self is other or _equal_dtypes(self, other)


def _unwrap_unless_plain(o):
    return o if o.__class__ in _PLAIN else _unwrap(o)


def _patch_attribute(obj, name, member, builder, scope):
    """Call the function that a builtin wraps, which only checks that there is a ``_semantic``."""
    function = member.__wrapped__ if getattr(member, "__code__", None) is _BUILTIN else member
    semantic = _semantic(builder)

    def call(*args, **kwargs):
        kwargs["_semantic"] = semantic
        return function(*args, **kwargs)

    scope.set_attr(obj, name, call)


_semantic = cache(TritonSemantic)
_BUILTIN = core.builtin(lambda _semantic=None: None).__code__
_PLAIN = {int, float, bool, str, type(None), core.dtype, core.pointer_type, core.block_type}
_shapes: dict[int, tuple] = {}
"""By the id of the shape of a block: its number of elements and the shape of its tensors."""
_blocks: dict[tuple, tuple] = {}
_names: dict[tuple, str] = {}
_constants: dict[tuple, core.tensor] = {}

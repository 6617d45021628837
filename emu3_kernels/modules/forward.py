"""Another forward pass for one module, without a change of its class or of its attributes.

The module becomes an instance of a subclass with the same name, as FSDP and
``torch.nn.utils.parametrize`` do it, so that the module is looked up at the call. A method bound to
it would be copied with its attributes by ``nn.DataParallel`` and ``copy.copy``, and the copy would
compute with the weights of the original.
"""

import copy
import inspect
from collections.abc import Callable
from functools import cache, wraps
from types import MethodType

from torch import nn
from torch.nn.modules.module import _has_any_global_hook
from torch.nn.utils.parametrize import is_parametrized

_originals: dict[Callable, Callable] = {}
"""Every forward pass that replaces one, with the one that it replaces."""


class _Replaced:
    """Base of the subclasses: copies stay of the subclass, a pickle is of ``original_class``."""

    __slots__ = ()

    def __copy__(self):
        other = object.__new__(type(self))
        other.__setstate__(self.__getstate__())
        return other

    def __deepcopy__(self, memo):
        other = memo[id(self)] = object.__new__(type(self))
        # Not self.__getstate__, which raises once the module is parametrized.
        other.__setstate__(copy.deepcopy(nn.Module.__getstate__(self), memo))
        return other

    def __reduce_ex__(self, protocol):
        return object.__new__, (self.original_class,), self.__getstate__()


def replace_forward(module: nn.Module, forward: Callable) -> None:
    """Replace the forward pass of one instance; its name and signature stay those of the class.

    Hooks stay, those of ``accelerate`` too, which call what they find as ``_old_forward``. A
    parametrized module is left alone, since its parameters are properties of its class.
    """
    kind = vars(type(module)).get("original_class", type(module))
    if is_parametrized(module) or kind.forward in _originals:
        return
    module.__class__ = _subclass(kind, forward)
    if "_old_forward" in vars(module):
        module._old_forward = MethodType(type(module).forward, module)
    else:
        vars(module).pop("forward", None)


def check_own_forward(op: str, name: str, module: nn.Module) -> None:
    """Raise if the forward pass of ``module`` was replaced, but not by :func:`replace_forward`."""
    held = vars(module).get("_old_forward", vars(module).get("forward"))
    if held is None or _is_own(held, module):
        return
    found = getattr(held, "__qualname__", type(held).__name__)
    raise ValueError(
        f"{op}: {name or type(module).__name__}.forward must be its class's own, "
        f"got {found}: apply before accelerate's prepare and other patches"
    )


def runs_alone(module: nn.Module, *forwards: Callable) -> bool:
    """Return whether a call of ``module`` is one of ``forwards``, or what replaced it here, alone.

    It is not if hooks run beside it, or if others replaced the forward pass of the class or of the
    instance, as ``accelerate`` does to load weights.
    """
    return class_forward(module) in forwards and not _is_hooked(module)


def class_forward(module: nn.Module) -> Callable:
    """Return the forward pass of the class of ``module``, as before :func:`replace_forward`."""
    own = type(module).forward
    return _originals.get(own, own)


def _is_hooked(module: nn.Module) -> bool:
    held = vars(module).get("forward")
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or _has_any_global_hook()
        or not (held is None or _is_own(held, module))
    )


def _is_own(held: Callable, module: nn.Module) -> bool:
    """Return whether ``held`` is the method of the class, which accelerate leaves on a module."""
    return held == MethodType(type(module).forward, module)


@cache
def _subclass(kind: type[nn.Module], forward: Callable) -> type[nn.Module]:
    @wraps(kind.forward)
    def replaced(self, *args, **kwargs):
        return forward(self, *args, **kwargs)

    # Trainers read the signature; accelerate would unwrap down to the class's own.
    replaced.__signature__ = inspect.signature(kind.forward)
    del replaced.__wrapped__
    _originals[replaced] = kind.forward
    names = ("__module__", "__qualname__", "__doc__")
    members = {name: getattr(kind, name) for name in names}
    members |= {"forward": replaced, "original_class": kind}
    return type(kind.__name__, (kind, _Replaced), members)

"""What inference computes from parameters alone, computed once."""

from collections.abc import Callable

import torch
from torch import Tensor


class Prepared:
    """A function of parameters whose result is kept until one of them changes.

    A change in place and a new storage, as of ``module.to``, are noticed; writes through ``.data``
    are not. With gradients enabled and under ``torch.compile`` the function is called each time.

    Args:
        function: takes tensors, and keyword arguments that are hashable.
    """

    def __init__(self, function: Callable) -> None:
        self.function = function
        # Key and result, and the tensors, so that no other takes their addresses. One attribute:
        # the threads of nn.DataParallel share it.
        self._held: tuple = ((), None)

    def __call__(self, *sources: Tensor, **settings: object) -> object:
        if torch.compiler.is_compiling() or torch.is_grad_enabled():
            return self.function(*sources, **settings)
        if any(source.is_inference() for source in sources):  # which has no version
            return self.function(*sources, **settings)
        storages = tuple(source.untyped_storage() for source in sources)
        of_sources = zip(sources, storages, strict=True)
        key = *((id(t), t._version, s._cdata) for t, s in of_sources), *settings.items()
        held, result, *_ = self._held
        if held != key:
            result = self.function(*sources, **settings)
            self._held = key, result, sources, storages
        return result

    def __deepcopy__(self, memo: dict) -> "Prepared":
        return Prepared(self.function)

    def __reduce__(self) -> tuple:
        return Prepared, (self.function,)

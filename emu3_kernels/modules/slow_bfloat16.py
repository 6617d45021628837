"""The one switch for bfloat16 models on CPUs without AVX-512, where PyTorch's GEMMs are slow."""

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from emu3_kernels.modules.forward import check_own_forward, class_forward, replace_forward
from emu3_kernels.runtime import gemm
from emu3_kernels.runtime.gemm import in_float32_if_slow, linear


def speed_up_bfloat16(model: nn.Module, *kinds: type[nn.Module]) -> nn.Module:
    """Let ``model`` compute bfloat16 fast on an x86 CPU without AVX-512; elsewhere, do nothing.

    There the bfloat16 GEMMs of PyTorch take ten to thirty times as long as those of float32. An
    ``nn.Linear`` of the model then runs our own GEMM, with float32 sums, and an ``nn.Conv2d`` the
    float32 convolution of PyTorch; both round once, to bfloat16. A module of another class that
    calls ``F.linear`` or ``F.conv_transpose2d`` itself is included if it does so through a class
    attribute ``linear`` or ``conv_transpose2d``. Calls in other dtypes run as before.

    The instances alone are changed, in place: their class becomes a subclass of the same name, and
    parameters, state dicts and hooks stay. Copies and replicas are changed too, pickled modules are
    not, and parametrized ones run as before. Call it once, when the model is made or loaded, and
    after ``torch.ao.quantization``, which looks layers up by their exact class.

    Args:
        model: any module.
        kinds: of ``nn.Linear`` and ``nn.Conv2d``, those to change; none is both.

    Returns:
        ``model`` itself.

    Raises:
        ValueError: the forward pass of such a layer was replaced before, by something else.
    """
    if not gemm.SLOW_IN_BFLOAT16:
        return model
    kinds = kinds or tuple(_FORWARDS)
    found = [
        (name, module, kind)
        for name, module in model.named_modules()
        for kind in kinds
        if isinstance(module, kind) and class_forward(module) is kind.forward
    ]
    for name, module, _ in found:
        check_own_forward("speed_up_bfloat16", name, module)
    for _, module, kind in found:
        replace_forward(module, _FORWARDS[kind])
    for module in model.modules():
        for name, function in _FUNCTIONS.items():
            if getattr(type(module), name, None) is getattr(F, name):
                setattr(module, name, function)
    return model


def _linear(self, input: Tensor) -> Tensor:
    return linear(input, self.weight, self.bias)


def _conv2d(self, input: Tensor) -> Tensor:
    return in_float32_if_slow(self._conv_forward, input, self.weight, self.bias)


_FORWARDS: dict[type[nn.Module], Callable] = {nn.Linear: _linear, nn.Conv2d: _conv2d}
_FUNCTIONS = {
    "linear": linear,
    "conv_transpose2d": partial(in_float32_if_slow, F.conv_transpose2d),
}

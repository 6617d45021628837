"""Weights in 8 and 4 bits for generation: the one place where a linear layer is swapped."""

from types import ModuleType
from typing import Literal, get_args

import torch
from torch import nn

from emu3.model import Emu3
from emu3_kernels.modules import QuantizedLinear

Weights = Literal["int8", "int4", "fp8"]
"""int8: a scale for each output. int4: one for 64 inputs, or 32. fp8: e4m3, by torchao."""

_FP8_CAPABILITY = 8, 9
"""Of the first GPUs with fp8."""


def quantize(model: Emu3, weights: Weights) -> Emu3:
    """Store the linear layers of ``model`` in 8 or 4 bits, in place; it can then only generate.

    Embeddings and norms stay. int8 and int4 are those of :func:`emu3_kernels.quantize_weight`, on
    a CPU and on a GPU; int4 has groups of 64 inputs, or of 32 where 64 does not divide them. fp8 is
    that of torchao on a model in bfloat16: activations are rounded to it too, with a scale for each
    row of both, and the head stays as it is.

    Raises:
        ValueError: one line, if the device or the sizes do not allow it.
    """
    check_weights(weights, model.embedding.weight.device)
    quantize_linears(model, weights)
    return model.requires_grad_(False)


def check_weights(weights: str, device: torch.device | str) -> None:
    """Raise unless linear layers on ``device`` can be stored as ``weights``."""
    if weights not in get_args(Weights):
        raise ValueError(f"weights: must be one of {get_args(Weights)}, got {weights!r}")
    if weights != "fp8":
        return
    device = torch.device(device)
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < _FP8_CAPABILITY:
        got = device.type if device.type != "cuda" else torch.cuda.get_device_name(device)
        raise ValueError(
            f"weights: fp8 needs a GPU of compute capability 8.9 or more, got {got}: take int8"
        )
    _torchao()


def quantize_linears(
    module: nn.Module, weights: Weights, names: tuple[str, ...] | None = None
) -> None:
    """Replace each ``nn.Linear`` inside ``module``, or of its own children those in ``names``."""
    for name, child in list(module.named_children()):
        if names is not None and name not in names:
            continue
        if not isinstance(child, nn.Linear):
            quantize_linears(child, weights)
        elif weights == "fp8":
            if name != "head":  # its rows are sliced
                _to_fp8(child)
        else:
            setattr(module, name, _quantized(child, weights))


def _quantized(linear: nn.Linear, weights: Weights) -> QuantizedLinear:
    group_size = 64 if linear.in_features % 64 == 0 else 32
    return QuantizedLinear(linear, weights, group_size=group_size)


def _to_fp8(linear: nn.Linear) -> None:
    """With activations in bfloat16, torchao would write the weight in float32 at every call."""
    quantization = _torchao()
    if linear.weight.dtype != torch.bfloat16:
        raise ValueError(f"weights: fp8 needs a model in bfloat16, got {linear.weight.dtype}")
    how = quantization.Float8DynamicActivationFloat8WeightConfig(
        granularity=quantization.PerRow(), set_inductor_config=False
    )
    quantization.quantize_(linear, how)


def _torchao() -> ModuleType:
    """Imported at its first use: it takes seconds."""
    try:
        from torchao import quantization
    except ImportError as error:
        raise ValueError(f"weights: fp8 needs torchao (pip install torchao): {error}") from None
    return quantization

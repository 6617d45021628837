"""A linear layer in 8 or 4 bits, as a module that replaces an ``nn.Linear``."""

import torch
from torch import Tensor, nn

from emu3_kernels.ops.quantized.api import quantize_weight, quantized_linear


class QuantizedLinear(nn.Module):
    """:func:`emu3_kernels.quantized_linear` with the codes and scales of an ``nn.Linear``.

    Args:
        linear: without bias; its weight is read once and not kept.
        bits: ``"int8"`` or ``"int4"``.
        group_size: of int4, as in :func:`emu3_kernels.quantize_weight`.

    Raises:
        ValueError: the layer has a bias.
    """

    codes: Tensor
    scales: Tensor

    def __init__(self, linear: nn.Linear, bits: str, *, group_size: int = 64) -> None:
        super().__init__()
        if linear.bias is not None:
            raise ValueError("QuantizedLinear: the layer must have no bias, got one")
        self.in_features, self.out_features = linear.in_features, linear.out_features
        codes, scales = quantize_weight(linear.weight, bits, group_size=group_size)
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)

    def forward(self, x: Tensor, rows: slice = slice(None)) -> Tensor:
        """Outputs ``[..., N]`` of ``x [..., K]``, or the ``rows`` of them alone."""
        return quantized_linear(x, self.codes[rows], self.scales[rows])

    @property
    def weight(self) -> Tensor:
        raise ValueError("QuantizedLinear: its weight is stored in 8 or 4 bits, it has codes alone")

    def _apply(self, fn, recurse: bool = True) -> nn.Module:
        """Move codes and scales; ``model.to(dtype)`` leaves the dtype of scales as it is."""
        scales = self.scales
        super()._apply(fn, recurse)
        self.scales = scales.to(self.codes.device)
        return self

    def extra_repr(self) -> str:
        bits = 8 if self.codes.dtype == torch.int8 else 4
        return f"in_features={self.in_features}, out_features={self.out_features}, bits={bits}"

"""The ops of a language model as modules.

D model width, V classes, H query heads, KV heads ``num_kv_heads``, K ``head_dim``.
"""

import torch
from torch import Tensor, nn

from emu3_kernels.ops.loss.api import cross_entropy, linear_cross_entropy
from emu3_kernels.ops.norm.api import add_rms_norm, rms_norm
from emu3_kernels.ops.rope.api import rope, rope_append, rope_tables
from emu3_kernels.ops.swiglu.api import swiglu


class RMSNorm(nn.Module):
    """:func:`emu3_kernels.rms_norm` with its ``weight [D]``, ones at first.

    Args:
        width: D.
        eps: added to the mean square; 1e-5 in Emu3.
        device: of the weight.
        dtype: of the weight.
    """

    def __init__(
        self,
        width: int,
        eps: float = 1e-5,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x [..., D]``."""
        return rms_norm(x, self.weight, self.eps)

    def extra_repr(self) -> str:
        return f"{len(self.weight)}, eps={self.eps}"


class AddRMSNorm(RMSNorm):
    """:func:`emu3_kernels.add_rms_norm` with its ``weight [D]``, ones at first.

    Args:
        width: D.
        eps: added to the mean square; 1e-5 in Emu3.
        dropout_p: share of ``x`` that is dropped in training.
        device: of the weight.
        dtype: of the weight.
    """

    def __init__(
        self,
        width: int,
        eps: float = 1e-5,
        *,
        dropout_p: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(width, eps, device=device, dtype=dtype)
        self.dropout_p = dropout_p

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``dropout(x) + residual`` normalised, and the sum itself, both ``[..., D]``."""
        p = self.dropout_p if self.training else 0.0
        return add_rms_norm(x, residual, self.weight, self.eps, dropout_p=p)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, dropout_p={self.dropout_p}"


class SwiGLU(nn.Module):
    """:func:`emu3_kernels.swiglu`: the activation alone, without parameters."""

    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        """Gate ``up`` by the SiLU of ``gate``, both ``[..., C]``."""
        return swiglu(gate, up)


class RotaryEmbedding(nn.Module):
    """:func:`emu3_kernels.rope` with its tables, which are not in the state dict.

    The tables stay float32 when the module is cast to bfloat16 or float16.

    Args:
        num_positions: rows of the tables, the longest sequence.
        width: K, even.
        theta: the base of the wavelengths; 1e6 in Emu3.
        device: of the tables.
    """

    def __init__(
        self,
        num_positions: int,
        width: int,
        *,
        theta: float = 1e6,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        cos, sin = rope_tables(num_positions, width, theta=theta, device=device)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(
        self, q: Tensor, k: Tensor, positions: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Rotate ``q [B, T, H, K]`` and ``k [B, T, num_kv_heads, K]``; positions as in the op."""
        return rope(q, k, self.cos, self.sin, positions)

    def append(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        slots: Tensor,
        positions: Tensor | None = None,
        *,
        check_indices: bool = True,
    ) -> Tensor:
        """Return q rotated; write rotated k, and v, into their caches: ``rope_append``."""
        given = q, k, v, self.cos, self.sin, key_cache, value_cache, slots, positions
        return rope_append(*given, check_indices=check_indices)

    def _apply(self, fn, recurse=True):
        tables = self.cos, self.sin
        super()._apply(fn, recurse)
        if self.cos.dtype not in (torch.float32, torch.float64):
            self.cos, self.sin = (table.to(self.cos.device) for table in tables)
        return self


class CrossEntropy(nn.Module):
    """:func:`emu3_kernels.cross_entropy` with its settings.

    Args:
        z_loss: factor of the squared log-sum-exp.
        label_smoothing: probability that is spread evenly over all V classes.
        ignore_index: the target of ignored tokens.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
    """

    def __init__(
        self,
        *,
        z_loss: float = 0.0,
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        self.settings = {
            "z_loss": z_loss,
            "label_smoothing": label_smoothing,
            "ignore_index": ignore_index,
            "reduction": reduction,
        }

    def forward(
        self,
        logits: Tensor,
        targets: Tensor,
        weights: Tensor | None = None,
        normalizer: Tensor | float | None = None,
    ) -> Tensor:
        """Average the loss of ``logits [..., V]``; weights and normalizer as in the op."""
        tokens = {"weights": weights, "normalizer": normalizer}
        return cross_entropy(logits, targets, **tokens, **self.settings)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.settings.items())


class LinearCrossEntropy(CrossEntropy):
    """:func:`emu3_kernels.linear_cross_entropy` with its head: ``weight [V, D]``, as ``nn.Linear``.

    Args:
        width: D.
        num_classes: V.
        memory: bytes that a call may allocate beyond its gradients.
        device: of the weight.
        dtype: of the weight.
        settings: those of :class:`CrossEntropy`.
    """

    def __init__(
        self,
        width: int,
        num_classes: int,
        *,
        memory: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **settings: float | str,
    ) -> None:
        super().__init__(**settings)
        self.memory = memory
        head = nn.Linear(width, num_classes, bias=False, device=device, dtype=dtype)
        self.weight = head.weight

    def forward(
        self,
        hidden: Tensor,
        targets: Tensor,
        weights: Tensor | None = None,
        normalizer: Tensor | float | None = None,
    ) -> Tensor:
        """Average the loss of ``hidden [..., D]`` without its logits."""
        tokens = {"weights": weights, "normalizer": normalizer, "memory": self.memory}
        return linear_cross_entropy(hidden, self.weight, targets, **tokens, **self.settings)

    def extra_repr(self) -> str:
        num_classes, width = self.weight.shape
        return f"{width}, {num_classes}, {super().extra_repr()}"

"""Losses of pairs of a chosen and a rejected sequence. N pairs."""

import torch
import torch.nn.functional as F
from torch import Tensor

from emu3_kernels.runtime.checks import check_floating, describe

KINDS = ("dpo", "ipo", "simpo")


def preference_loss(
    chosen: Tensor,
    rejected: Tensor,
    reference: Tensor | None = None,
    *,
    kind: str = "dpo",
    beta: float = 0.1,
    margin: float = 0.0,
    label_smoothing: float = 0.0,
) -> Tensor:
    r"""Return the loss of preferring each chosen sequence to its rejected one.

    With ``d = chosen - rejected`` and the reference model's ``r``:

    - ``"dpo"``: ``-(1 - s) * log sigmoid(z) - s * log sigmoid(-z)`` with ``s = label_smoothing``
      and ``z = beta * (d - r) - margin``. "Direct Preference Optimization" (Rafailov et al., arXiv
      2305.18290); smoothed as in "cDPO" (Mitchell), with a margin as in "ODPO" (Amini et al.,
      arXiv 2402.10571).
    - ``"simpo"``: the same without a reference, of log-probabilities per token. "SimPO" (Meng et
      al., arXiv 2405.14734), whose gamma is ``margin``.
    - ``"ipo"``: ``(d - r - 1 / (2 * beta)) ** 2``, of log-probabilities per token. "A General
      Theoretical Paradigm to Understand Learning from Human Preferences" (Azar et al., arXiv
      2310.12036).

    Computed in float32 (float64 for float64 inputs) by ops of PyTorch on every device: N numbers
    need no kernel. Log-probabilities of sequences without logits in memory are sums of
    ``-linear_cross_entropy(..., reduction="none")``. Differentiable in chosen and rejected.

    Args:
        chosen: ``[N]``, log-probabilities of the chosen sequences in nats, or means per token.
        rejected: ``[N]``, of the rejected ones.
        reference: ``[N]``, what ``chosen - rejected`` is under the reference model, a constant;
            needed but for SimPO, which has none.
        kind: ``"dpo"``, ``"ipo"`` or ``"simpo"``.
        beta: the inverse temperature, above 0.
        margin: in nats after ``beta``, by which a chosen sequence is to be ahead; not of IPO.
        label_smoothing: share of the pairs whose order is taken to be wrong, below 0.5; not of IPO.

    Returns:
        ``[N]`` losses, float32 or float64.
    """
    _check(chosen, rejected, reference, kind)
    if not beta > 0:
        raise ValueError(f"preference_loss: beta must be above 0, got {beta}")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(
            f"preference_loss: label_smoothing must lie in [0, 0.5), got {label_smoothing}"
        )
    compute = torch.promote_types(chosen.dtype, torch.float32)
    ahead = chosen.to(compute) - rejected.to(compute)
    if reference is not None:
        ahead = ahead - reference.to(compute)
    if kind == "ipo":
        if margin or label_smoothing:
            raise ValueError("preference_loss: ipo must be without margin and label_smoothing")
        return (ahead - 1 / (2 * beta)).square()
    z = beta * ahead - margin
    loss = -F.logsigmoid(z)
    # -log sigmoid(-z) = z - log sigmoid(z)
    return loss + label_smoothing * z if label_smoothing else loss


def _check(chosen: Tensor, rejected: Tensor, reference: Tensor | None, kind: str) -> None:
    check_floating("preference_loss", chosen=chosen)
    if kind not in KINDS:
        known = ", ".join(KINDS)
        raise ValueError(f"preference_loss: kind must be one of {known}, got {kind!r}")
    if (reference is None) != (kind == "simpo"):
        rule = "without a reference" if kind == "simpo" else "with one"
        raise ValueError(f"preference_loss: {kind} must be {rule}")
    for name, value in (("rejected", rejected), ("reference", reference)):
        if value is not None and (value.shape, value.device) != (chosen.shape, chosen.device):
            raise ValueError(
                f"preference_loss: {name} must share shape and device with chosen, got "
                f"{describe(value)} and {describe(chosen)}"
            )
    if reference is not None and reference.requires_grad:
        raise ValueError("preference_loss: reference is a constant, got one that requires grad")

"""The search of vector quantisation: the nearest code of each latent.

B batch, D dimension of a code, N codes.

Backends have ``forward(z [B, D, P], codebook [N, D], tree)``, which returns ``[B, P]`` int64; ``z``
may have any strides, the codebook is contiguous float32, and the tree is a CodeIndex's or None.
"""

import torch
from torch import Tensor

from emu3_kernels.ops.vq import cpu, reference
from emu3_kernels.runtime.checks import check_floating, describe
from emu3_kernels.runtime.dispatch import Backends

BACKENDS = Backends(
    "nearest_code",
    __package__,
    reference.nearest_code,
    cpu=("cpu",),
    cuda=("cuda", "triton"),
)

LARGEST_DIM = 32
MOST_CODES = 1 << 24
"""Offsets into a codebook of D 32 then fit 32 bits, which the kernels and the tree use."""


class CodeIndex:
    """A codebook prepared for many calls of :func:`nearest_code`.

    Keeps a copy of the codes as they are now and, on the CPU, a search tree over them. A call with
    a plain tensor builds the tree anew each time, where that pays.

    Args:
        codebook: ``[N, D]``, any floating dtype.
    """

    def __init__(self, codebook: Tensor) -> None:
        _check_codebook("CodeIndex", codebook)
        self.codebook = _to_float32(codebook).clone(memory_format=torch.contiguous_format)
        can_build = cpu.why_not(self.codebook, self.codebook) is None
        self.tree = cpu.build_tree(self.codebook) if can_build else None


def nearest_code(z: Tensor, codebook: Tensor | CodeIndex, *, backend: str | None = None) -> Tensor:
    r"""Find the code nearest to each latent: ``argmin_n ||z - codebook_n||^2``.

    Exact, and the same for every backend: the distance is computed in float32
    (float64 if an input is) as ``sum_d (z_d - c_d)^2``, summed in the order of d
    with every operation rounded, and the lowest n wins among equal distances. A
    distance that is NaN counts as infinite, so that a latent without any finite
    distance gets code 0 and no index is ever out of range. ``z`` is read in
    place, and no ``[latents, N]`` matrix is made. Not differentiable.

    On the CPU a search tree skips codes that cannot be nearest. It is built in
    the call if that pays, or once by :class:`CodeIndex`.

    Args:
        z: ``[B, D, ...]``, channel first (images ``[B, D, h, w]``, video
            ``[B, D, t, h, w]``), any floating dtype, any strides.
        codebook: ``[N, D]``, any floating dtype, or a :class:`CodeIndex`; D at most 32.
        backend: a key of ``BACKENDS``, or None for the first that fits.

    Returns:
        ``[B, ...]`` int64.
    """
    tree = codebook.tree if isinstance(codebook, CodeIndex) else None
    codes = codebook.codebook if isinstance(codebook, CodeIndex) else codebook
    _check("nearest_code", z, codes)
    chosen = BACKENDS.choose(backend, z, codes)
    if chosen.function is not None:
        return chosen.function(z.detach(), codes.detach())
    latents = z.detach().flatten(2) if z.dim() > 2 else z.detach().unsqueeze(2)
    nearest = chosen.forward(latents, _to_float32(codes).contiguous(), tree)
    return nearest.view(z.shape[0], *z.shape[2:])


def _to_float32(codebook: Tensor) -> Tensor:
    """Widen a narrower codebook; float64 is left as it is."""
    return codebook.detach().to(torch.promote_types(codebook.dtype, torch.float32))


def _check_codebook(op: str, codebook: Tensor) -> None:
    check_floating(op, codebook=codebook)
    shape = codebook.shape
    if len(shape) != 2 or not 1 <= shape[0] <= MOST_CODES or not 1 <= shape[1] <= LARGEST_DIM:
        raise ValueError(
            f"{op}: codebook must be [N, D] with N from 1 to {MOST_CODES} and D from 1 to "
            f"{LARGEST_DIM}, got {describe(codebook)}"
        )


def _check(op: str, z: Tensor, codebook: Tensor) -> None:
    check_floating(op, z=z)
    _check_codebook(op, codebook)
    if z.dim() < 2 or z.shape[1] != codebook.shape[1] or z.device != codebook.device:
        raise ValueError(
            f"{op}: z must be [B, {codebook.shape[1]}, ...] on {codebook.device} as codebook is "
            f"{tuple(codebook.shape)}, got {describe(z)}"
        )

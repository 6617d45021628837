"""nearest_code in Triton: a tile of queries against all codes, chunk by chunk, in float32.

B batch, D dimension, P queries of one batch entry, N codes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from emu3_kernels.runtime.dispatch import Backend
from emu3_kernels.runtime.launch import INTERPRETED, cdiv, launch, why_not_triton

# A thread holds four neighbouring codes (16 bytes for each d) against every query of the program.
# Interpreted, an operation takes the same time at any size.
QUERIES, CODES = 256 if INTERPRETED else 8, 512
NUM_WARPS = 4


def why_not(z: Tensor, codebook: Tensor) -> str | None:
    return why_not_triton(z) or why_not_triton(codebook)


def forward(z: Tensor, codebook: Tensor, tree: Tensor | None) -> Tensor:
    # Inductor drops enable_fp_fusion=False of a kernel that it sees: near-ties would move.
    return _opaque(z, codebook) if torch.compiler.is_compiling() else _search(z, codebook)


@torch.library.custom_op("emu3_kernels::nearest_code_triton", mutates_args=())
def _opaque(z: Tensor, codebook: Tensor) -> Tensor:
    return _search(z, codebook)


@_opaque.register_fake
def _(z: Tensor, codebook: Tensor) -> Tensor:
    return z.new_empty((z.shape[0], z.shape[2]), dtype=torch.int64)


def _search(z: Tensor, codebook: Tensor) -> Tensor:
    batch, dim, num_queries = z.shape
    nearest = torch.empty(batch, num_queries, dtype=torch.int64, device=z.device)
    if nearest.numel():
        by_dim = _by_dim(codebook)
        launch(
            nearest_code_fwd_kernel,
            (cdiv(num_queries, QUERIES), batch),
            z,
            by_dim,
            nearest,
            num_queries,
            by_dim.shape[1],
            *z.stride(),
            D=dim,
            QUERIES=QUERIES,
            CODES=CODES,
            num_warps=NUM_WARPS,
            enable_fp_fusion=False,  # the definition rounds every multiplication
        )
    return nearest


def _by_dim(codebook: Tensor) -> Tensor:
    """Transpose ``[N, D]`` to ``[D, N]``, padded to whole chunks by infinitely distant codes."""
    num_codes = codebook.shape[0]
    padded = cdiv(num_codes, CODES) * CODES
    if padded == num_codes:
        return codebook.t().contiguous()
    return torch.constant_pad_nd(codebook.t(), (0, padded - num_codes), torch.inf)


@triton.jit
def nearest_code_fwd_kernel(
    z_ptr, by_dim_ptr, nearest_ptr, num_queries, num_codes, batch_stride, dim_stride, query_stride,
    D: tl.constexpr, QUERIES: tl.constexpr, CODES: tl.constexpr,
):  # fmt: skip
    """nearest = argmin_n sum_d (z_d - codebook_nd)^2."""
    batch = tl.program_id(1).to(tl.int64)
    query = tl.program_id(0).to(tl.int64) * QUERIES + tl.arange(0, QUERIES)[:, None]
    inside = query < num_queries
    z_ptr += batch * batch_stride + query * query_stride
    z = ()
    for d in tl.static_range(D):
        z += (tl.load(z_ptr + d * dim_stride, mask=inside, other=0).to(tl.float32),)
    code = tl.arange(0, CODES)[None, :]
    best = tl.full([QUERIES, CODES], float("inf"), tl.float32)
    chunk = tl.zeros([QUERIES, CODES], tl.int32)
    for start in range(0, num_codes, CODES):
        distance = tl.zeros([QUERIES, CODES], tl.float32)
        for d in tl.static_range(D):
            difference = z[d] - tl.load(by_dim_ptr + d * num_codes + start + code)
            distance += difference * difference
        closer = distance < best  # false for NaN
        best = tl.where(closer, distance, best)
        chunk = tl.where(closer, start, chunk)
    tied = best == tl.min(best, axis=1, keep_dims=True)
    nearest = tl.min(tl.where(tied, chunk + code, 2147483647), axis=1, keep_dims=True)
    tl.store(nearest_ptr + batch * num_queries + query, nearest.to(tl.int64), mask=inside)


BACKENDS = {"nearest_code": Backend(why_not, forward)}

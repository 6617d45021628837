"""nearest_code in Triton: a tile of queries against all codes, chunk by chunk, in float32.

B batch, D dimension, P places of one batch entry, N codes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from emu3_kernels.runtime.launch import Config, Contract, meta, why_not_triton

# A thread holds four neighbouring codes (16 bytes for each d) against every query of the program.
QUERIES, CODES = 8, 512
NUM_WARPS = 4


def why_not(z: Tensor, codebook: Tensor) -> str | None:
    return why_not_triton(z) or why_not_triton(codebook)


def forward(z: Tensor, codebook: Tensor, tree: Tensor | None) -> Tensor:
    batch, dim, places = z.shape
    nearest = torch.empty(batch, places, dtype=torch.int64, device=z.device)
    if nearest.numel():
        by_dim = _by_dim(codebook)
        _fwd_kernel[(triton.cdiv(places, QUERIES), batch)](
            z,
            by_dim,
            nearest,
            places,
            by_dim.shape[1],
            *z.stride(),
            D=dim,
            QUERIES=QUERIES,
            CODES=CODES,
            num_warps=NUM_WARPS,
            enable_fp_fusion=False,  # the definition rounds every product
        )
    return nearest


def _by_dim(codebook: Tensor) -> Tensor:
    """Lay ``[N, D]`` out as ``[D, N]``, whole chunks, with infinitely distant codes at the end."""
    num_codes, dim = codebook.shape
    padded = triton.cdiv(num_codes, CODES) * CODES
    by_dim = codebook.new_full((dim, padded), torch.inf)
    by_dim[:, :num_codes] = codebook.T
    return by_dim


@triton.jit
def _fwd_kernel(
    z_ptr, by_dim_ptr, nearest_ptr, places, num_codes, batch_stride, dim_stride, place_stride,
    D: tl.constexpr, QUERIES: tl.constexpr, CODES: tl.constexpr,
):  # fmt: skip
    """nearest = argmin_n sum_d (z_d - codebook_nd)^2."""
    batch = tl.program_id(1).to(tl.int64)
    place = tl.program_id(0).to(tl.int64) * QUERIES + tl.arange(0, QUERIES)[:, None]
    inside = place < places
    z_ptr += batch * batch_stride + place * place_stride
    z = ()
    for d in tl.static_range(D):
        z += (tl.load(z_ptr + d * dim_stride, mask=inside, other=0).to(tl.float32),)
    lane = tl.arange(0, CODES)[None, :]
    best = tl.full([QUERIES, CODES], float("inf"), tl.float32)
    chunk = tl.zeros([QUERIES, CODES], tl.int32)
    for start in range(0, num_codes, CODES):
        distance = tl.zeros([QUERIES, CODES], tl.float32)
        for d in tl.static_range(D):
            difference = z[d] - tl.load(by_dim_ptr + d * num_codes + start + lane)
            distance += difference * difference
        closer = distance < best  # false for NaN
        best = tl.where(closer, distance, best)
        chunk = tl.where(closer, start, chunk)
    tied = best == tl.min(best, axis=1, keep_dims=True)
    nearest = tl.min(tl.where(tied, chunk + lane, 2147483647), axis=1, keep_dims=True)
    tl.store(nearest_ptr + batch * places + place, nearest.to(tl.int64), mask=inside)


def _images() -> Tensor:
    return forward(meta(8, 4, 4096), meta(32768, 4, dtype=torch.float32), None)


CONFIGS = [
    Config(
        "emu3_images",
        _images,
        {
            "_fwd_kernel": Contract(
                # Two programs a multiprocessor; 32 independent sums a thread hide the rest.
                max_registers=224,
                scalar_loads=32,  # z: 8 queries x 4 dimensions, once, before the loop
                scalar_stores=1,  # one id a query
                exceptions={
                    "gfx942: loads": "four wavefronts have 256 lanes: two codes a lane, 8 bytes"
                },
            )
        },
    ),
]

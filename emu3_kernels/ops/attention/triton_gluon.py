"""attention in Gluon for sm_90 and sm_100: tensor descriptors, warps that copy, warps that compute.

Not measured yet, and never run on sm_100, so it stands behind Triton and runs by name. The gradient
of sm_100 is Triton's.
"""

from functools import cache

import torch
from torch import Tensor

from emu3_kernels.ops.attention.key_ranges import Dropout, KeyRanges
from emu3_kernels.ops.attention.optional import failure
from emu3_kernels.ops.attention.triton_backward import whole_backward
from emu3_kernels.ops.attention.triton_blocks import range_arguments
from emu3_kernels.runtime.dispatch import Backend
from emu3_kernels.runtime.launch import cdiv, gluon_devices, gpu_of, launch, tile, why_not_triton

HEAD_DIMS = (64, 128)
# By compute capability. 128 keys, since a matmul of 64 rows (sm_100: of 128) reads shared memory no
# faster than it multiplies by 64 columns. One program of 12 warps an SM: registers are those of two
# groups of 64 queries, or of a query a thread.
TILES = {
    90: tile(4, BLOCK_M=64, BLOCK_N=128, STAGES=2),
    100: tile(4, BLOCK_M=128, BLOCK_N=128, STAGES=2),
}
# A group holds dk and dv of 64 keys: registers are left for 64 queries, or 128 of short heads.
DKDV_TILE = tile(4, BLOCK_M=64, BLOCK_N=64, STAGES=2)
DKDV_TILE_OF_SHORT_HEADS = tile(4, BLOCK_M=128, BLOCK_N=64, STAGES=2)


def why_not(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    document_ids: Tensor | None,
    dropout_p: float,
    return_lse: bool,
) -> str | None:
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"the kernel multiplies float16 and bfloat16, got {q.dtype}"
    if q.shape[3] not in HEAD_DIMS:
        return f"the kernel takes a head_dim of 64 or 128, got {q.shape[3]}"
    if dropout_p > 0:
        return "the kernel has no dropout"
    if not (q.numel() and k.numel()):
        return "a tensor descriptor takes no empty tensor"
    if torch.compiler.is_compiling():
        return "tensor descriptors are made on the host, which a traced graph leaves out"
    if q.device.type not in gluon_devices:
        return f"Gluon has no {q.device.type} target here"
    if q.is_cuda and (capability := gpu_of(q).capability) not in TILES:
        return f"the kernels are for sm_90 and sm_100, got sm_{capability}"
    return failure(_try) or why_not_triton(q)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_ranges: KeyRanges,
    scale: float,
    dropout: Dropout | None,
) -> tuple[Tensor, Tensor]:
    if scale < 0:  # scores are compared before they are scaled: the scale must be above 0
        q, scale = -q, -scale
    q, k, v = described(q), described(k), described(v)
    (batch, num_queries, num_heads, head_dim), (_, num_keys, num_kv_heads, _) = q.shape, k.shape
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = q.new_empty(batch, num_heads, num_queries, dtype=torch.float32)
    kernel, options = _kernel_for(gpu_of(q).capability)
    num_rows, num_columns = options["BLOCK_M"], options["BLOCK_N"]
    grid = (cdiv(num_queries, 2 * num_rows) * batch * num_heads,)
    launch(
        kernel, grid, out, lse,
        descriptor(q, num_rows), descriptor(k, num_columns), descriptor(v, num_columns),
        *range_arguments(key_ranges), max(scale, 1e-30),
        q.stride(2), k.stride(2), v.stride(2), num_queries, num_keys, num_heads, num_kv_heads,
        HEAD_DIM=head_dim, **options,
    )  # fmt: skip
    return out, lse


def _kernel_for(capability: int) -> tuple[object, dict]:
    """Return the kernel and its tile: those of sm_90 for the emulator, unless it assumes a GPU."""
    if capability == 100:
        from emu3_kernels.ops.attention.triton_gluon_blackwell import (
            attention_fwd_gluon_blackwell_kernel as kernel,
        )
    else:
        from emu3_kernels.ops.attention.triton_gluon_kernel import (
            attention_fwd_gluon_kernel as kernel,
        )
    return kernel, TILES.get(capability, TILES[90])


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dlse: Tensor | None,
    key_ranges: KeyRanges,
    scale: float,
    dropout: Dropout | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute ``delta = rowsum(dout * out) - dlse`` in the kernel of dq, which dk and dv read.

    On sm_100 by Triton's kernels.
    """
    if gpu_of(q).capability == 100:
        return whole_backward(dout, q, k, v, out, lse, dlse, key_ranges, scale, dropout)
    from emu3_kernels.ops.attention.triton_gluon_dkdv import attention_bwd_dkdv_gluon_kernel
    from emu3_kernels.ops.attention.triton_gluon_dq import attention_bwd_dq_gluon_kernel

    dout, q, k, v = map(described, (dout, q, k, v))
    (batch, num_queries, num_heads, head_dim), (_, num_keys, num_kv_heads, _) = q.shape, k.shape
    like = {"memory_format": torch.contiguous_format}
    dq, dk, dv = (torch.empty_like(x, **like) for x in (q, k, v))
    delta, dlse = torch.empty_like(lse), None if dlse is None else dlse.contiguous()
    settings = (
        scale, q.stride(2), k.stride(2), v.stride(2), dout.stride(2),
        num_queries, num_keys, num_heads, num_kv_heads,
    )  # fmt: skip
    chosen = TILES[90]
    grid = (cdiv(num_queries, 2 * chosen["BLOCK_M"]) * batch * num_heads,)
    launch(
        attention_bwd_dq_gluon_kernel, grid, dq, delta, out, dlse, lse,
        *_descriptors(q, k, v, dout, chosen), *range_arguments(key_ranges), *settings,
        HEAD_DIM=head_dim, **chosen,
    )  # fmt: skip
    chosen = DKDV_TILE_OF_SHORT_HEADS if head_dim == 64 else DKDV_TILE
    num_pairs = batch * num_kv_heads
    grid = (cdiv(num_keys, 2 * chosen["BLOCK_N"]) * num_pairs,)
    launch(
        attention_bwd_dkdv_gluon_kernel, grid, dk, dv, *_descriptors(q, k, v, dout, chosen),
        *(line_descriptor(x, chosen["BLOCK_M"]) for x in (lse, delta)),
        *range_arguments(key_ranges.query_ranges(num_keys)), *settings, num_pairs,
        HEAD_DIM=head_dim, **chosen,
    )  # fmt: skip
    return dq, dk, dv


def _descriptors(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, chosen: dict) -> list[object]:
    rows, columns = chosen["BLOCK_M"], chosen["BLOCK_N"]
    return [descriptor(x, n) for x, n in ((q, rows), (k, columns), (v, columns), (dout, rows))]


def described(x: Tensor) -> Tensor:
    """Return ``x``, copied unless it is a matrix of tokens by channels that a descriptor takes.

    That is: base and rows aligned to 16 bytes, and the heads of a token within its row.
    """
    batch, num_tokens, num_heads, head_dim = x.shape
    batch_stride, token_stride, head_stride, last = x.stride()
    fits = (
        last == 1
        and (batch == 1 or batch_stride == num_tokens * token_stride)
        and 0 <= (num_heads - 1) * head_stride <= token_stride - head_dim
        and token_stride % 8 == 0
        and x.data_ptr() % 16 == 0
    )
    return x if fits else x.clone(memory_format=torch.contiguous_format)


def descriptor(x: Tensor, num_rows: int) -> object:
    """Describe ``x [B, T, H, K]`` as ``[B * T, channels]`` in blocks of rows of one head.

    Rows behind the last are 0. Those behind a sequence are the next one's, which a mask leaves
    out: a NaN there reaches results, as one behind a document does.
    """
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    (batch, num_tokens, num_heads, head_dim), (_, token_stride, head_stride, _) = (
        x.shape,
        x.stride(),
    )
    shape = [batch * num_tokens, (num_heads - 1) * head_stride + head_dim]
    block = [num_rows, head_dim]
    return TensorDescriptor(x, shape, [token_stride, 1], block, _layout(num_rows, head_dim))


def line_descriptor(x: Tensor, num_rows: int) -> object:
    """Describe float32 ``x [B, H, T]`` as a line, in blocks; behind a head is the next one's."""
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    return TensorDescriptor(x, [x.numel()], [1], [num_rows], _layout(num_rows))


@cache
def _layout(*block: int) -> object:
    """Return that of 16-bit rows of a head, or of a line of float32."""
    from triton.experimental.gluon import language as gl

    dtype = gl.float16 if len(block) > 1 else gl.float32
    return gl.NVMMASharedLayout.get_default_for(list(block), dtype)


def _try() -> None:
    """Gluon is experimental: its names may go."""
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor  # noqa: F401

    from emu3_kernels.ops.attention import (  # noqa: F401
        triton_gluon_blackwell,
        triton_gluon_dkdv,
        triton_gluon_dq,
    )


BACKENDS = {"attention": Backend(why_not, forward, backward)}

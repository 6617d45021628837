"""attention in Gluon for sm_90 and sm_100: tensor descriptors, warps that copy, warps that compute.

Not measured yet, and never run on sm_100, so it stands behind Triton and runs by name. The gradient
is Triton's.
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


@cache
def _layout(num_rows: int, head_dim: int) -> object:
    from triton.experimental.gluon import language as gl

    return gl.NVMMASharedLayout.get_default_for([num_rows, head_dim], gl.float16)


def _try() -> None:
    """Gluon is experimental: its names may go."""
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor  # noqa: F401

    from emu3_kernels.ops.attention import triton_gluon_blackwell  # noqa: F401


BACKENDS = {"attention": Backend(why_not, forward, whole_backward)}

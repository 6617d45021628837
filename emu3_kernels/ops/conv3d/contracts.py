"""The compiled launches of the causal convolutions, and what their machine code must keep."""

from dataclasses import replace
from functools import partial

import torch

from emu3_kernels.ops.conv3d.aten import convolve
from emu3_kernels.ops.conv3d.plan import Plan, out_shape
from emu3_kernels.ops.conv3d.triton import backward, block_backward, block_forward, forward
from emu3_kernels.runtime.contracts import Config, Contract, CudaKernel, meta

BLOCK = (3, 3, 3), Plan(silu=True)
HALVING = (4, 3, 3), Plan((2, 1, 1), post_silu=True)
EIGHTH = (3, 3, 3), Plan((2, 2, 2), silu=True, post_silu=True)


def _call(
    kernel: tuple[int, int, int],
    plan: Plan,
    *,
    channels: int,
    dtype: torch.dtype = torch.bfloat16,
    with_gradient: bool = False,
) -> None:
    """32 frames of 64 x 64 with a norm, a bias and a residual."""
    x, vector = meta(1, channels, 32, 64, 64, dtype=dtype), meta(channels, dtype=dtype)
    weight = meta(channels, channels, *kernel, dtype=dtype)
    y = meta(*out_shape(x, weight, plan), dtype=dtype)
    if with_gradient:
        backward(y, x, weight, vector, vector, vector, plan)
    else:
        forward(x, weight, vector, vector, vector, y, plan)


# Of 65,536 registers, 255 a thread leave room for one program of 256 threads or two of 128.
COPIES = {"gfx942: async_copies": "copies to shared memory are 4 bytes wide before gfx950"}
APART = {"gfx942: stores": "v_mfma leaves a thread channels of a pixel: not contiguous in y"}
FOUR = {"gfx942: stores": "v_mfma leaves a thread four channels of a pixel: 8 bytes"}
GEMM = Contract(max_registers=255, tensor_cores=True, async_copies=True, exceptions=COPIES)
# Scalars: vectors of channels, and the sums for dscale and dshift.
PACK = Contract(max_registers=64, scalar_loads=16, few_programs="1 MiB of a clip of 4 channels")
SUM = Contract(max_registers=96, scalar_stores=1, few_programs="a program for each 128 sums")
# Gradients of parameters, few: a sum is a scalar, and so is a sum for dscale or dshift.
ADD = Contract(
    max_registers=96, scalar_loads=8, scalar_stores=3, few_programs="a program for each 128 sums"
)
GEMM_TO_VIDEO = replace(GEMM, scalar_loads=24, scalar_stores=2)
WIDE = {
    "causal_conv3d_pack_kernel": PACK,
    "causal_conv3d_fwd_kernel": replace(GEMM_TO_VIDEO, exceptions=COPIES | APART),
}
ANY_BACKWARD = {
    "causal_conv3d_pack_kernel": PACK,
    "causal_conv3d_bwd_x_kernel": GEMM_TO_VIDEO,
    "causal_conv3d_bwd_weight_kernel": GEMM,
    "causal_conv3d_bwd_add_kernel": ADD,
    "causal_conv3d_sum_kernel": SUM,
}
WAITS = {"sm_90, triton 3.6: serialised": "it waits for every HGMMA"}
WIDE_BACKWARD = ANY_BACKWARD | {
    "causal_conv3d_bwd_weight_kernel": replace(GEMM, exceptions=COPIES | WAITS)
}
STRIDED_BACKWARD = WIDE_BACKWARD | {
    "causal_conv3d_bwd_z_kernel": replace(GEMM_TO_VIDEO, exceptions=COPIES | FOUR),
    # A thread has 16 pixels, and every second column is of another phase.
    "causal_conv3d_bwd_x_kernel": replace(GEMM_TO_VIDEO, scalar_loads=48, scalar_stores=18),
}
# Four packed channels of bfloat16 are 8 bytes. Weights in place, and x where it is not packed, are
# read by element.
NARROW = {
    name: replace(contract, access_bytes=8, scalar_loads=64) for name, contract in WIDE.items()
}
IN_PLACE = replace(GEMM_TO_VIDEO, access_bytes=8, scalar_loads=64, scalar_stores=64)
NARROW_BACKWARD = {
    name: replace(contract, access_bytes=8)
    for name, contract in ANY_BACKWARD.items()
    if name != "causal_conv3d_sum_kernel"
}
HALVING_BACKWARD = NARROW_BACKWARD | {
    "causal_conv3d_bwd_z_kernel": replace(GEMM_TO_VIDEO, access_bytes=8, scalar_loads=32),
    "causal_conv3d_bwd_x_kernel": replace(GEMM_TO_VIDEO, access_bytes=8, exceptions=COPIES | APART),
}
BLOCK_BACKWARD = NARROW_BACKWARD | {
    "causal_conv3d_pack_block_kernel": replace(PACK, access_bytes=8),
    # A thread of dx, channels-last, has more channels of scale and shift on sm_100.
    "causal_conv3d_bwd_x_kernel": replace(GEMM_TO_VIDEO, access_bytes=8, scalar_loads=28),
}
# TF32 would round: a float32 dot has no tensor cores, but for those of gfx942.
EXACT = {name: replace(contract, tensor_cores=False) for name, contract in WIDE.items()}
EXACT_BACKWARD = {
    name: replace(contract, tensor_cores=False) for name, contract in ANY_BACKWARD.items()
}
EXACT_BACKWARD["causal_conv3d_bwd_x_kernel"] = replace(
    EXACT_BACKWARD["causal_conv3d_bwd_x_kernel"],
    exceptions=COPIES | {"sm_100, triton 3.6: spills": "48 accesses, 80 bytes of stack"},
)


def _configs(
    name: str,
    forward_contracts: dict[str, Contract],
    backward_contracts: dict[str, Contract],
    *call: object,
    **settings: object,
) -> tuple[Config, Config]:
    call = partial(_call, *call, **settings)
    return (
        Config(name, call, forward_contracts),
        Config(f"{name}, backward", partial(call, with_gradient=True), backward_contracts),
    )


def _residual_block() -> None:
    """Emu3's: 32 latent frames of 512 x 512."""
    vector, weight = meta(4), meta(4, 4, 3, 3, 3)
    block_forward(meta(1, 4, 32, 64, 64), *(vector, vector, weight, vector) * 2, keep_hidden=False)


def _residual_block_backward() -> None:
    x, vector, weight = meta(1, 4, 32, 64, 64), meta(4), meta(4, 4, 3, 3, 3)
    block_backward(x, x, (True,) * 9, x, *(vector, vector, weight, vector) * 2)


def _around_cudnn(plan: Plan, *, with_gradient: bool = False) -> None:
    x, vector, weight = meta(1, 512, 32, 64, 64), meta(512), meta(512, 512, 3, 3, 3)
    tensors = [x, weight, vector, vector, vector, x]
    if with_gradient:
        tensors = [tensor.detach().requires_grad_() for tensor in tensors]
    y = convolve(*tensors, plan)
    if with_gradient:
        torch.autograd.grad(y, tensors, torch.empty_like(y))


# 80 registers leave room for six programs of 128 threads. Scalars: x where the padding moves it,
# and sums of channels.
AROUND = {
    "causal_conv3d_pad_kernel": Contract(max_registers=80, scalar_loads=32),
    "causal_conv3d_finish_kernel": Contract(max_registers=80),
}
AROUND_BACKWARD = AROUND | {
    "causal_conv3d_finish_bwd_kernel": Contract(max_registers=80, scalar_stores=1),
    "causal_conv3d_pad_bwd_kernel": Contract(max_registers=80, scalar_loads=8, scalar_stores=2),
    "causal_conv3d_bwd_add_kernel": ADD,
    "causal_conv3d_sum_kernel": SUM,
}

CONFIGS = {
    "causal_conv3d": (
        Config("512, around cuDNN", partial(_around_cudnn, Plan(silu=True)), AROUND),
        Config(
            "512, around cuDNN, training",
            partial(_around_cudnn, Plan(silu=True, post_silu=True), with_gradient=True),
            AROUND_BACKWARD,
        ),
        *_configs("512 channels", WIDE, WIDE_BACKWARD, *BLOCK, channels=512),
        _configs("512, an eighth", WIDE, STRIDED_BACKWARD, *EIGHTH, channels=512)[1],
        *_configs("4, Emu3's block", NARROW, NARROW_BACKWARD, *BLOCK, channels=4),
        *_configs("4, Emu3's halving", NARROW, HALVING_BACKWARD, *HALVING, channels=4),
        *_configs("512, float32", EXACT, EXACT_BACKWARD, *BLOCK, channels=512, dtype=torch.float32),
    ),
    "temporal_residual": (
        Config("4 channels", _residual_block, NARROW | {"causal_conv3d_fwd_kernel": IN_PLACE}),
        Config("4 channels, backward", _residual_block_backward, BLOCK_BACKWARD),
    ),
}


def _conv(dtype: str, channels: int, width: int, rows: int, contract: Contract) -> CudaKernel:
    kernel = f"causal_conv_kernel<{dtype}, {channels}, {width}, {rows}>"
    return CudaKernel("causal_conv", kernel, f"(CausalConv<{dtype}>)", contract)


# Scalar loads: what no vector of four covers, namely rows whose width is no multiple of four,
# weights, norms and biases. Scalar stores: the same rows of y, an element at a time. Accesses of 8
# bytes: a thread has four columns in either dtype, four of two bytes here. Registers: four blocks
# of 64 threads a multiprocessor, as many as Emu3's latents of 32 frames give it.
UNROLLED = {"sm_100: stores": "the rows of single elements are unrolled"}
FEW = Contract(max_registers=255, scalar_loads=160, scalar_stores=16, exceptions=UNROLLED)
# Flat tiles, where tall ones would leave multiprocessors idle.
FLAT_SPILLS = {f"{target}: spills": "2 accesses, 8 bytes of stack" for target in ("sm_80", "sm_90")}
EIGHT = replace(FEW, scalar_stores=32)
SIXTEEN = replace(
    FEW, scalar_stores=64, exceptions=UNROLLED | {"sm_100: loads": "they are unrolled too"}
)
CUDA = (
    _conv("float", 4, 3, 8, FEW),
    _conv("bfloat16", 4, 3, 8, replace(FEW, access_bytes=8)),
    _conv("float", 4, 3, 2, replace(FEW, exceptions=FLAT_SPILLS)),
    _conv("float", 8, 3, 8, EIGHT),
    _conv("float", 16, 3, 8, SIXTEEN),
    _conv("bfloat16", 16, 3, 8, replace(SIXTEEN, access_bytes=8)),
)

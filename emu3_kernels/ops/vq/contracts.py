"""The compiled launches of nearest_code, and what their machine code must keep."""

import torch

from emu3_kernels.ops.vq.triton import forward
from emu3_kernels.runtime.contracts import Config, Contract, CudaKernel, meta


def _images() -> None:
    """Eight images of 512 x 512."""
    forward(meta(8, 4, 4096), meta(32768, 4, dtype=torch.float32), None)


CONFIGS = {
    "nearest_code": (
        Config(
            "emu3_images",
            _images,
            {
                "nearest_code_fwd_kernel": Contract(
                    # Two programs a multiprocessor; 32 independent sums a thread hide the rest.
                    max_registers=224,
                    scalar_loads=32,  # z: 8 queries x 4 dimensions, once, before the loop
                    scalar_stores=1,  # one id a query
                    exceptions={
                        "gfx942: loads": "four wavefronts have 256 threads: two codes each, 8 bytes"
                    },
                )
            },
        ),
    ),
}

UNROLLED = {"sm_100: loads": "the search of all codes is unrolled"}
LATENTS = "(Latents<{}>, const float4*, int, int64_t*)"

# Scalar loads: z before the loop (queries of a thread x dimensions), then that of one query and
# codes of one group or, for a query in a hundred, of all. Scalar stores: one id a query, from the
# group or from all. A block has 256 threads and up to 47 KiB of shared memory.
CUDA = (
    CudaKernel(
        "nearest_code",
        "nearest_code_kernel<float, 4, 8>",
        LATENTS.format("float"),
        # Two blocks a multiprocessor; 8 queries x 4.
        Contract(max_registers=128, scalar_loads=128, scalar_stores=2, exceptions=UNROLLED),
    ),
    CudaKernel(
        "nearest_code",
        "nearest_code_kernel<bfloat16, 4, 2>",
        LATENTS.format("bfloat16"),
        # Five blocks; 2 queries x 4.
        Contract(max_registers=51, scalar_loads=96, scalar_stores=2, exceptions=UNROLLED),
    ),
    CudaKernel(
        "nearest_code",
        "nearest_code_kernel<float, 32, 1>",
        LATENTS.format("float"),
        # Three blocks; 1 query x 32.
        Contract(max_registers=85, scalar_loads=256, scalar_stores=2),
    ),
)

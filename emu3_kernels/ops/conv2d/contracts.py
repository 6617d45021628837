"""The compiled launch of conv3x3, and what its machine code must keep."""

from emu3_kernels.ops.conv2d.triton import forward
from emu3_kernels.runtime.contracts import Config, Contract, meta


def _residual_block() -> None:
    """The widest activation of Emu3's decoder, at 512 x 512."""
    x = meta(1, 512, 512, 256)
    forward(x, meta(256, 3, 3, 256), meta(256), x)


CONFIGS = {
    "conv3x3": (
        Config(
            "512 x 512 x 256",
            _residual_block,
            # 64 registers keep 32 warps on a multiprocessor. A scalar is a thread's bias.
            {"conv3x3_add_kernel": Contract(max_registers=64, scalar_loads=1)},
        ),
    ),
}

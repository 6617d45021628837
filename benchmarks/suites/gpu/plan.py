"""What a visit to a GPU times, the most valuable first, at the sizes of Emu3-8B."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch

from benchmarks.harness import machine

FORWARD, BACKWARD, BOTH = "forward", "backward", "forward+backward"
EMU3_HEADS = {"heads": 32, "groups": 8, "width": 128}
ROPE_HEADS = {"num_heads": 32, "num_kv_heads": 8, "head_dim": 128}
CLASSES = 184_622
BLOCK = {"kernel": [3, 3, 3], "norm": True, "activation": "silu", "residual": True}


@dataclass(frozen=True)
class Item:
    """One op, or one whole model, at one size: a row for each direction."""

    kind: str
    """The module of this package that prepares and measures it."""
    op: str
    size: Mapping
    directions: tuple[str, ...] = (FORWARD,)
    cost: float = 4.0
    """Estimated seconds on an H200, without compilation."""
    dtype: torch.dtype = torch.bfloat16
    check: Mapping = field(default_factory=dict)
    """What differs of the size at which it is compared with float64, where memory needs that."""
    tiny: Mapping = field(default_factory=dict)
    """What differs of the size in a dry run."""
    seconds: float = 1.0
    """Limit of the rounds of a row."""
    dry: bool = False

    def __str__(self) -> str:
        values = ", ".join(f"{name} {value}" for name, value in self.size.items())
        return f"{self.op}, {values}, {str(self.dtype).removeprefix('torch.')}"

    def __hash__(self) -> int:
        return hash(str(self))  # a size is a dict, which has no hash

    def as_dry_run(self) -> "Item":
        """Shrink it; in float32 where a convolution in bfloat16 takes seconds."""
        (dtype,) = machine.gemm_dtypes([self.dtype], "cpu")
        size = {**self.size, **self.tiny}
        return replace(self, size=size, dtype=dtype, check={}, cost=5.0, seconds=0.0, dry=True)


def op(name: str, size: Mapping, *directions: str, **settings) -> Item:
    return Item("ops", name, size, directions or (FORWARD,), **settings)


def attention(batch: int, tokens: int, width: int, *directions: str, **settings) -> Item:
    heads = EMU3_HEADS | {"width": width}
    size = {"batch": batch, "queries": tokens, "keys": tokens, **heads}
    size |= settings.pop("size", {})
    check = {"queries": 1024, "keys": 1024} | settings.pop("check", {})
    tiny = {"queries": 9, "keys": 9, "heads": 2, "groups": 1} | settings.pop("tiny", {})
    return op("attention", size, *directions, check=check, tiny=tiny, **settings)


def decode(batch: int, capacity: int, new: int = 1) -> Item:
    size = {"batch": batch, "new": new, "capacity": capacity, **EMU3_HEADS}
    return op("decode_attention", size, tiny={"capacity": 40}, cost=3)


MODELS = [
    Item("ceilings", "ceilings", {"side": 8192}, cost=6, tiny={"side": 64}),
    Item(
        "model", "model", {"layers": 8, "tokens": 8192}, (BOTH,), 25,
        tiny={"layers": 1, "tokens": 24}, seconds=5.0,
    ),
    Item(
        "decode", "decode step", {"batch": 2, "context": 4096}, cost=25,
        tiny={"context": 24}, seconds=2.0,
    ),
]  # fmt: skip
OPS = [
    op(
        "linear_cross_entropy",
        {"tokens": 8192, "width": 4096, "classes": CLASSES, "dropped": 0.0}, BOTH, cost=20,
        check={"tokens": 256}, tiny={"tokens": 8, "width": 8, "classes": 33}, seconds=5.0,
    ),
    attention(1, 16_384, 128, FORWARD, BACKWARD, cost=10),
    decode(1, 131_072),
    decode(2, 8192),
    op(
        "cross_entropy", {"tokens": 4096, "classes": CLASSES, "ignored": False}, FORWARD, BOTH,
        check={"tokens": 256}, tiny={"tokens": 3, "classes": 33},
    ),
    op(
        "temporal_residual", {"shape": [1, 4, 32, 64, 64]}, FORWARD, BOTH,
        tiny={"shape": [1, 4, 2, 5, 6]},
    ),
    op(
        "group_norm_silu", {"shape": [1, 256, 512, 512], "groups": 32}, FORWARD, BACKWARD,
        tiny={"shape": [1, 32, 4, 5]},
    ),
    op(
        "rms_norm", {"num_rows": 8192, "width": 4096}, FORWARD, BACKWARD,
        check={"num_rows": 512}, tiny={"num_rows": 3, "width": 40},
    ),
    op(
        "add_rms_norm", {"num_rows": 8192, "width": 4096}, FORWARD, BACKWARD,
        check={"num_rows": 512}, tiny={"num_rows": 3, "width": 40},
    ),
    op(
        "swiglu", {"num_rows": 8192, "width": 14_336}, FORWARD, BACKWARD,
        check={"num_rows": 512}, tiny={"num_rows": 3, "width": 40},
    ),
    op(
        "rope", {"batch": 1, "tokens": 8192, **ROPE_HEADS}, FORWARD, BACKWARD,
        check={"tokens": 512}, tiny={"tokens": 3},
    ),
    attention(2, 4096, 128, FORWARD, BACKWARD),
    attention(
        1, 16_384, 128, FORWARD, BACKWARD, size={"documents": [2048 * i for i in range(1, 8)]},
        check={"documents": [300, 700]}, tiny={"documents": [4]},
    ),
    attention(1, 8192, 64, FORWARD, BACKWARD),
    op(
        "nearest_code", {"shape": (8, 4, 64, 64), "num_codes": 32_768}, dtype=torch.float32,
        check={"shape": (1, 4, 64, 64), "on_grid": True},
        tiny={"shape": (1, 4, 3, 3), "num_codes": 40}, cost=8,
    ),
    op(
        "spatial_norm_silu", {"shape": [1, 256, 512, 512], "latent": [64, 64], "groups": 32},
        FORWARD, BACKWARD, tiny={"shape": [1, 32, 4, 6], "latent": [2, 3]},
    ),
    op(
        "causal_conv3d", {"shape": [1, 256, 4, 64, 64], "out": 256, "kernel": [3, 3, 3]},
        FORWARD, BACKWARD,
        check={"shape": [1, 256, 2, 32, 32]}, tiny={"shape": [1, 8, 2, 4, 5], "out": 8},
    ),
]  # fmt: skip
TOKENIZER = [
    Item(
        "vision", "vision", {"batch": 1, "height": 512, "width": 512}, ("encode", "decode"), 10,
        tiny={"height": 32, "width": 32},
    ),
    Item(
        "vision", "vision", {"batch": 1, "frames": 8, "height": 512, "width": 512},
        ("encode", "decode"), 12, tiny={"frames": 4, "height": 32, "width": 32},
    ),
]  # fmt: skip
MORE = [
    op(
        "causal_conv3d", {"shape": [1, 4, 32, 64, 64], "out": 4, **BLOCK}, FORWARD, BOTH,
        tiny={"shape": [1, 4, 2, 5, 6]},
    ),
    op(
        "temporal_residual", {"shape": [1, 256, 4, 64, 64]}, FORWARD, BOTH,
        check={"shape": [1, 256, 2, 32, 32]}, tiny={"shape": [1, 8, 2, 4, 5]}, cost=3,
    ),
    op(
        "conv3x3", {"shape": [1, 512, 128, 128], "out": 512, "residual": True},
        check={"shape": [1, 512, 32, 32]}, tiny={"shape": [1, 8, 4, 5], "out": 8},
    ),
    op(
        "group_norm_silu", {"shape": [1, 1024, 64, 64], "groups": 32}, FORWARD, BACKWARD,
        tiny={"shape": [1, 64, 4, 5]},
    ),
    op(
        "spatial_norm_silu", {"shape": [1, 1024, 64, 64], "latent": [64, 64], "groups": 32},
        tiny={"shape": [1, 64, 4, 5], "latent": [4, 5]},
    ),
    op(
        "sample_guided", {"shape": (2, 1, 32_768)}, dtype=torch.float32, tiny={"shape": (2, 1, 40)},
    ),
    decode(16, 4096),
    decode(2, 8192, new=2),
    decode(2, 8192, new=16),
    op("rope_append", {"batch": 2, "tokens": 1, "slots": 8192, **ROPE_HEADS}, tiny={"slots": 9}),
    op("rms_norm", {"num_rows": 2, "width": 4096}, tiny={"width": 40}),
    op("add_rms_norm", {"num_rows": 2, "width": 4096}, tiny={"width": 40}),
    op("swiglu", {"num_rows": 2, "width": 14_336}, tiny={"width": 40}),
    op(
        "linear_cross_entropy",
        {"tokens": 8192, "width": 4096, "classes": CLASSES, "dropped": 0.5}, BOTH, cost=10,
        check={"tokens": 256}, tiny={"tokens": 8, "width": 8, "classes": 33}, seconds=2.0,
    ),
    op(
        "temporal_residual", {"shape": [1, 4, 32, 64, 64]}, dtype=torch.float32,
        tiny={"shape": [1, 4, 2, 5, 6]},
    ),
    op(
        "causal_conv3d", {"shape": [1, 4, 32, 64, 64], "out": 4, **BLOCK}, FORWARD, BOTH,
        dtype=torch.float32, tiny={"shape": [1, 4, 2, 5, 6]},
    ),
    Item(
        "vision", "vision", {"batch": 1, "height": 512, "width": 512}, ("encode", "decode"), 12,
        dtype=torch.float32, tiny={"height": 32, "width": 32},
    ),
    Item(
        "decode", "decode step", {"batch": 8, "context": 4096}, cost=25,
        tiny={"context": 24}, seconds=2.0,
    ),
]  # fmt: skip
ITEMS = (*MODELS, *OPS, *TOKENIZER, *MORE)

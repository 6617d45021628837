"""The launches of the family that are compiled without a GPU, and their contracts."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import torch

from emu3_kernels.ops.attention import triton as attention
from emu3_kernels.ops.attention import triton_decode, triton_gluon
from emu3_kernels.ops.attention.key_ranges import (
    Dropout,
    KeyRanges,
    one_document,
)
from emu3_kernels.runtime.contracts import Config, Contract, CudaKernel, meta

TOKENS = 8192


def _attention(
    head_dim: int,
    *,
    backward: bool = False,
    forward: Callable = attention.forward,
    gradient: Callable = attention.whole_backward,
    documents: bool = False,
    dropout: bool = False,
    num_tokens: int = TOKENS,
) -> None:
    """Emu3-8B: 32 heads of q, 8 of k and of v in one projection of 8,192 tokens."""
    q, k, v = meta(1, num_tokens, 48, head_dim).split((32, 8, 8), dim=2)
    key_ranges = one_document(num_tokens, num_tokens, causal=True)
    if documents:
        key_ranges = KeyRanges(*(meta(1, TOKENS, dtype=torch.int32) for _ in range(2)))
        key_ranges = key_ranges._replace(queries=key_ranges.query_ranges(TOKENS))
    dropped = None
    if dropout:
        dropped = Dropout(0.1, meta(dtype=torch.int64))
    settings = key_ranges, head_dim**-0.5, dropped
    if backward:
        out = meta(1, num_tokens, 32, head_dim)
        lse = meta(1, 32, num_tokens, dtype=torch.float32)
        gradient(out, q, k, v, out, lse, None, *settings)
    else:
        forward(q, k, v, *settings)


# Of 65,536 registers, 255 a thread leave room for one program of 256 threads, which forward and
# dkdv have, and for two of 128, which dq has; a thread of gfx942 may have 512. Scalars are the key
# ranges, lse, delta and positions of rows: of 64 queries, a thread may have 32. dq stores delta.
SCALARS = "48 to 102 scalars: its layouts give a thread more rows"
STACK = "two accesses, 8 bytes of stack"
EARLIER = {f"{target}, triton 3.6: loads": SCALARS for target in ("sm_90", "sm_100")}
EARLIER_STACK = {"sm_90, triton 3.6: spills": STACK}
SCALAR_SPILLS = {"gfx942: spills": "a few scalar registers, into vector registers: none to memory"}
AMD = {
    "gfx942: async_copies": "copies to shared memory are 4 bytes wide before gfx950",
    "gfx942: stores": "v_mfma leaves a thread four channels side by side: 8 bytes",
}
DOTS = Contract(max_registers=255, tensor_cores=True, async_copies=True, exceptions=AMD)


def _forward(**terms: object) -> Mapping[str, Contract]:
    return {"attention_fwd_kernel": replace(DOTS, scalar_stores=1, **terms)}


def _backward(dq: Contract, dkdv: Contract) -> Mapping[str, Contract]:
    return {"attention_bwd_dq_kernel": dq, "attention_bwd_dkdv_kernel": dkdv}


FORWARD = _forward(scalar_loads=12)
DQ = replace(DOTS, scalar_loads=24, scalar_stores=1)
DKDV = replace(DOTS, scalar_loads=40, exceptions=AMD | EARLIER)
BACKWARD = _backward(DQ, DKDV)
DROPOUT_BACKWARD = _backward(
    replace(
        DQ,
        max_registers=272,
        scalar_loads=40,
        exceptions=AMD | {"gfx942, triton 3.6: registers": "363 of the 512 that a thread may have"},
    ),
    replace(DOTS, scalar_loads=40, exceptions=AMD | {"sm_100, triton 3.6: loads": SCALARS}),
)


# 168 registers when 12 warps begin; then 240 for the 8 that compute, 24 for the rest. Scalars are
# the key ranges of a block, and those, the lse and delta of the rows of each group: of a thread of
# sm_100, which has one row, half as many.
GLUON = Contract(
    max_registers=168, scalar_loads=12, scalar_stores=4, tensor_cores=True, async_copies=True
)
GLUON_FORWARD = {"attention_fwd_gluon_kernel": GLUON}
GLUON_BACKWARD = {
    "attention_bwd_dq_gluon_kernel": replace(GLUON, scalar_loads=16),
    "attention_bwd_dkdv_gluon_kernel": replace(GLUON, scalar_loads=14, scalar_stores=0),
}
BLACKWELL = replace(GLUON, scalar_loads=8, scalar_stores=2)
RELOADED = "scalars of the launch, read again where a partition begins: none in a loop"


def _gluon(name: str, head_dim: int, *, documents: bool = False) -> tuple[Config, ...]:
    """Return the launches of sm_90, forward and backward, and of sm_100."""
    call = partial(_attention, head_dim, documents=documents)
    forward = partial(call, forward=triton_gluon.forward)
    backward = partial(call, backward=True, gradient=triton_gluon.backward)
    spills = {"sm_100, triton 3.6: spills": RELOADED} if documents else {}
    blackwell = {"attention_fwd_gluon_blackwell_kernel": replace(BLACKWELL, exceptions=spills)}
    return (
        Config(name, forward, GLUON_FORWARD, ("sm_90",)),
        Config(name, backward, GLUON_BACKWARD, ("sm_90",)),
        Config(name, forward, blackwell, ("sm_100",)),
    )


def _decode(
    num_new: int, page: int | None, *, tree: bool = False, rows: int = 2, capacity: int = 8192
) -> None:
    """Emu3-8B, two rows of 8,192 positions."""
    num_pages = rows * capacity // (page or capacity)
    shape = (num_pages, page or capacity, 8, 128)
    table = None if page is None else meta(rows, capacity // page, dtype=torch.int32)
    mask = meta(rows, num_new, dtype=torch.int64) if tree else None
    q, lengths = meta(rows, num_new, 32, 128), meta(rows, dtype=torch.int32)
    tensors = q, meta(*shape), meta(*shape), lengths
    triton_decode.forward(*tensors, mask=mask, scale=128**-0.5, page_table=table)


# 255 registers leave room for two programs of four warps on a multiprocessor, as many as there
# are. Scalars are the length, the counter, the lse of a row and of the splits that a thread merges,
# the words of the mask and the pages of the keys that a thread reads, copied ahead by
# Triton 3.6; and half a row of the result.
DECODE = Contract(
    255, scalar_loads=28, scalar_stores=2, tensor_cores=True, async_copies=True,
    exceptions={"gfx942: async_copies": AMD["gfx942: async_copies"]},
)  # fmt: skip


def _decoding(**terms: object) -> Mapping[str, Contract]:
    return {"decode_attention_kernel": replace(DECODE, **terms)}


DECODE_TREE = replace(DECODE, scalar_loads=40, exceptions=DECODE.exceptions | SCALAR_SPILLS)

CONFIGS = {
    "attention": (
        Config("8192, 32:8 heads of 128", lambda: _attention(128), FORWARD),
        Config("16384, 32:8 heads of 128", lambda: _attention(128, num_tokens=16384), FORWARD),
        Config("8192, 32:8 heads of 64", lambda: _attention(64), FORWARD),
        Config("8192, documents", lambda: _attention(128, documents=True), FORWARD),
        Config("8192, 64, documents", lambda: _attention(64, documents=True), FORWARD),
        Config(
            "8192, dropout",
            lambda: _attention(128, dropout=True),
            _forward(
                scalar_loads=20,
                exceptions=AMD | {"gfx942, triton 3.6: registers": "280 of the 512 of a thread"},
            ),
        ),
        Config(
            "8192, 32:8 heads of 128",
            lambda: _attention(128, backward=True),
            _backward(replace(DQ, exceptions=AMD | {"sm_100, triton 3.6: spills": STACK}), DKDV),
        ),
        Config("8192, 32:8 heads of 64", lambda: _attention(64, backward=True), BACKWARD),
        Config(
            "8192, documents",
            lambda: _attention(128, backward=True, documents=True),
            _backward(DQ, replace(DKDV, exceptions=DKDV.exceptions | EARLIER_STACK)),
        ),
        Config(
            "8192, 64, documents",
            lambda: _attention(64, backward=True, documents=True),
            BACKWARD,
        ),
        Config(
            "8192, dropout, documents",
            lambda: _attention(128, backward=True, documents=True, dropout=True),
            DROPOUT_BACKWARD,
        ),
        Config(
            "16384, 32:8 heads of 128",
            lambda: _attention(128, backward=True, num_tokens=16384),
            _backward(replace(DQ, exceptions=AMD | {"sm_100, triton 3.6: spills": STACK}), DKDV),
        ),
        *_gluon("8192, 32:8 heads of 128, gluon", 128),
        *_gluon("8192, 32:8 heads of 64, gluon", 64),
        *_gluon("8192, documents, gluon", 128, documents=True),
        *_gluon("8192, 64, documents, gluon", 64, documents=True),
    ),
    "decode_attention": (
        Config("one token", lambda: _decode(1, None), _decoding()),
        Config("16 tokens", lambda: _decode(16, None), _decoding()),
        Config("one token, pages of 16", lambda: _decode(1, 16), _decoding(scalar_loads=70)),
        Config(
            "16 tokens in a tree",
            lambda: _decode(16, None, tree=True),
            {"decode_attention_kernel": DECODE_TREE},
        ),
        Config("131072 keys", lambda: _decode(1, None, rows=1, capacity=131_072), _decoding()),
        # A thread of gfx942 may have 512 registers.
        Config(
            "64 tokens in a tree",
            lambda: _decode(64, None, tree=True),
            {
                "decode_attention_kernel": replace(
                    DECODE_TREE,
                    max_registers=288,
                    few_programs="128 programs on 132 SMs: a fifth split would be a second wave",
                )
            },
        ),
    ),
}

# Blocks have 128 threads: 168 registers leave room for three on a multiprocessor, 85 for six, 255
# for two. Scalar loads are the length, a page for each key that a sub-warp group reads and the word
# of the mask of each query; the scalar store is one lse a query.
CUDA = (
    CudaKernel(
        "decode_attention",
        "decode_attention_kernel<bfloat16, 128, 4>",
        "(Decode<bfloat16>)",
        Contract(max_registers=168, scalar_loads=9, scalar_stores=1),
    ),
    CudaKernel(
        "decode_attention",
        "decode_attention_kernel<bfloat16, 128, 1>",
        "(Decode<bfloat16>)",
        Contract(max_registers=85, scalar_loads=6, scalar_stores=1),
    ),
    CudaKernel(
        "decode_attention",
        "decode_attention_kernel<bfloat16, 128, 8>",
        "(Decode<bfloat16>)",
        Contract(max_registers=255, scalar_loads=11, scalar_stores=1),
    ),
    CudaKernel(
        "decode_attention",
        "decode_attention_kernel<float, 64, 8>",
        "(Decode<float>)",
        Contract(max_registers=168, scalar_loads=11, scalar_stores=1),
    ),
    # Eight blocks a multiprocessor. Scalar loads are the length and the lse of each split; the
    # scalar store is four elements of bfloat16 a lane.
    CudaKernel(
        "decode_attention",
        "merge_decoded_kernel<bfloat16, 128>",
        "(Decode<bfloat16>)",
        Contract(max_registers=64, scalar_loads=8, scalar_stores=1),
    ),
)

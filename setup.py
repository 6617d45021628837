"""Build the native library where torch and a C++ compiler are there; plain Python otherwise.

torch is not a build requirement (an isolated build would fetch a second one), so
install with ``pip install --no-build-isolation .`` to get the library. CUDA sources
are built where nvcc is found (CUDA_HOME or PATH); EMU3_CUDA_ARCHS="80;90" overrides
the architectures.
"""

import os
import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
CSRC = ROOT / "csrc"
OLDEST_TORCH = 0x020B000000000000  # 2.11, as in the project's dependencies
# GCC 12 warns inside its own intrinsics headers (uninitialized) and of vectors in signatures
# that never leave a file (psabi).
WARNINGS = ["-Wall", "-Wno-psabi", "-Wno-ignored-attributes", "-Wno-uninitialized"]
FLAGS = ["-O3", "-std=c++20", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno"]
LEVELS = {"base": []}
if platform.machine() in ("x86_64", "AMD64"):
    LEVELS |= {
        "avx2": ["-march=x86-64-v3"],
        "avx512": ["-march=x86-64-v4"],
        "avx512_bf16": ["-march=x86-64-v4", "-mavx512bf16"],
        "amx": ["-march=x86-64-v4", "-mavx512bf16", "-mamx-tile", "-mamx-bf16"],
    }


def levels_of(source: str) -> dict[str, list[str]]:
    """The levels that a CPU source is compiled for, AMX where it multiplies tiles."""
    if "EMU3_LEVEL" not in source:
        return {"any": []}
    return {name: LEVELS[name] for name in LEVELS if name != "amx" or "TileUse" in source}


def nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=f"{home}/bin" if home else None)


def cuda_architectures() -> list[str]:
    """Machine code for each architecture that nvcc knows, and PTX of the last for later ones."""
    asked = os.environ.get("EMU3_CUDA_ARCHS", "80;90;100").split(";")
    listed = subprocess.run([nvcc(), "--list-gpu-code"], capture_output=True, text=True, check=True)
    archs = [a for a in asked if f"sm_{a}" in listed.stdout.split()]
    codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
    return [*codes, f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}"]


class BuildNative(build_ext):
    """Compiles ``csrc``: each CPU kernel once per level, each CUDA file with nvcc."""

    def build_extension(self, ext: Extension) -> None:
        from torch.utils.cpp_extension import include_paths, library_paths

        self.includes = [f"-I{path}" for path in (CSRC, *include_paths())]
        includes = [*self.includes, *(f"-I{path}" for path in self.compiler.include_dirs)]
        jobs = []
        for source in sorted((CSRC / "bindings").rglob("*.cpp")):
            target = f"-DTORCH_TARGET_VERSION={OLDEST_TORCH:#x}ULL"
            jobs.append((source, "any", [*includes, target]))
        for source in sorted((CSRC / "cpu").rglob("*.cpp")):
            for level, flags in levels_of(source.read_text()).items():
                jobs.append((source, level, [f"-I{CSRC}", f"-DEMU3_LEVEL={level}", *flags]))
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(lambda job: self.compile_one(*job), jobs))
        linker = [os.environ.get("CXX", "c++")]
        if nvcc():
            objects += self.compile_cuda()
            linker = [nvcc(), "-cudart=static"]  # no driver and no toolkit needed to import it
        torch = [*(f"-L{path}" for path in library_paths()), "-ltorch", "-ltorch_cpu", "-lc10"]
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run([*linker, "-shared", *objects, *torch, "-ldl", "-o", target], check=True)

    def compile_one(self, source: Path, level: str, flags: list[str]) -> str:
        target = self.object_path(source, level)
        compiler = os.environ.get("CXX", "c++")
        self.run_compiler([compiler, "-fPIC", *FLAGS, *WARNINGS, *flags], source, target)
        return target

    def compile_cuda(self) -> list[str]:
        flags = [
            *("-O3", "-std=c++20", "--threads=2", "-Xcompiler=-fPIC,-fvisibility=hidden"),
            f"-DTORCH_TARGET_VERSION={OLDEST_TORCH:#x}ULL",
        ]
        objects = []
        for source in sorted((CSRC / "cuda").rglob("*.cu")):
            target = self.object_path(source, "any")
            command = [nvcc(), *flags, *cuda_architectures(), *self.includes]
            self.run_compiler(command, source, target)
            objects.append(target)
        return objects

    def object_path(self, source: Path, level: str) -> str:
        """Return e.g. ``cpu.norm.rms_norm.avx2.o`` in the build folder."""
        Path(self.build_temp).mkdir(parents=True, exist_ok=True)
        name = ".".join(source.relative_to(CSRC).with_suffix("").parts)
        return str(Path(self.build_temp) / f"{name}.{level}.o")

    def run_compiler(self, command: list[str], source: Path, target: str) -> None:
        if not self.force and is_newer_than_its_sources(Path(target)):
            return
        print(f"compiling {Path(target).stem}", flush=True)
        subprocess.run([*command, "-MMD", "-c", str(source), "-o", target], check=True)


def is_newer_than_its_sources(target: Path) -> bool:
    """Compare ``target`` with the list of sources that the compiler wrote beside it (``-MMD``)."""
    listed = target.with_suffix(".d")
    if not (target.exists() and listed.exists()):
        return False
    rule = listed.read_text().partition(": ")[2].replace("\\\n", " ")
    sources = [Path(__file__), *(Path(name) for name in rule.split())]
    built = target.stat().st_mtime
    return all(path.exists() and path.stat().st_mtime < built for path in sources)


def native() -> list[Extension]:
    """The extension, or none with one line that says why."""
    try:
        import torch  # noqa: F401
    except ModuleNotFoundError:
        print("emu3-kernels: no torch here, the native library is not built")
        return []
    if not shutil.which(os.environ.get("CXX", "c++")):
        print("emu3-kernels: no C++ compiler here, the native library is not built")
        return []
    return [Extension("emu3_kernels._C", sources=[], py_limited_api=True)]


setup(
    ext_modules=native(),
    cmdclass={"build_ext": BuildNative},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)

"""Imports point one way, and kernels know no framework."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TOP = "emu3.tools", "emu3.demo", "emu3.tasks", "emu3.cli"
ABOVE_THE_MODEL = "emu3.generate", "emu3.data", "emu3.train", *TOP
MAY_NOT_IMPORT = {
    "emu3_kernels": ("emu3", "benchmarks", "tests"),
    "emu3/config.py": ("emu3.model", "emu3.vision", "emu3.weights", *ABOVE_THE_MODEL),
    "emu3/cache.py": ABOVE_THE_MODEL,
    "emu3/model.py": ABOVE_THE_MODEL,
    "emu3/prompt.py": ABOVE_THE_MODEL,
    "emu3/sampling.py": ABOVE_THE_MODEL,
    "emu3/text.py": ABOVE_THE_MODEL,
    "emu3/vision": ABOVE_THE_MODEL,
    "emu3/weights": ABOVE_THE_MODEL,
    "emu3/generate.py": ("emu3.data", "emu3.train", *TOP),
    "emu3/data": ("emu3.train", *TOP),
    "emu3/train": TOP,
    "emu3/tools": ("emu3.train", "emu3.demo", "emu3.tasks", "emu3.cli"),
    "emu3/demo": ("emu3.tasks", "emu3.cli"),
    "emu3/tasks.py": ("emu3.cli",),
    "emu3": ("benchmarks", "tests"),
}
OPS = [path for path in (ROOT / "emu3_kernels/ops").iterdir() if path.is_dir()]


def imports(path: Path) -> set[str]:
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = {alias.name for n in nodes if isinstance(n, ast.Import) for alias in n.names}
    modules = [n for n in nodes if isinstance(n, ast.ImportFrom) and n.module]
    members = {f"{n.module}.{alias.name}" for n in modules for alias in n.names}
    return names | members | {n.module for n in modules}


def upward(path: Path, banned: tuple[str, ...]) -> set[str]:
    return {n for n in imports(path) for b in banned if f"{n}.".startswith(f"{b}.")}


@pytest.mark.parametrize(("where", "banned"), MAY_NOT_IMPORT.items())
def test_imports_point_down(where, banned):
    root = ROOT / where
    paths = [root] if root.is_file() else sorted(root.rglob("*.py"))
    assert paths, f"{where} is gone: mend this test"
    for path in paths:
        assert not upward(path, banned), f"{path.relative_to(ROOT)} imports {upward(path, banned)}"


def test_the_vision_tokenizer_does_not_import_what_imports_it():
    path = ROOT / "emu3/vision/tokenizer.py"
    assert not upward(path, ("emu3.vision.streaming", "emu3.vision.tiling"))


@pytest.mark.parametrize("op", OPS, ids=lambda path: path.name)
def test_an_op_imports_no_other_op_and_its_backends_not_each_other(op):
    for path in op.glob("*.py"):
        others = tuple(f"emu3_kernels.ops.{other.name}" for other in OPS if other != op)
        assert not upward(path, others), path
        if path.stem in ("cpu", "triton", "reference"):
            siblings = {"cpu", "triton", "reference", "api"} - {path.stem}
            mine = tuple(f"emu3_kernels.ops.{op.name}.{sibling}" for sibling in siblings)
            assert not upward(path, mine), path


def test_kernels_know_no_framework():
    for path in [*(ROOT / "csrc/cpu").iterdir(), *(ROOT / "csrc/cuda").glob("*.cuh")]:
        assert not re.search(r"#include\s*<(torch|ATen|c10)/", path.read_text()), path.name


def test_files_compiled_per_level_include_no_standard_library():
    """An inline function emitted with AVX-512 flags could be the copy that every processor runs."""
    for path in (ROOT / "csrc/cpu").iterdir():
        text = path.read_text()
        if path.suffix == ".h" or "EMU3_LEVEL" in text:
            headers = re.findall(r"#include\s*<([^>]+)>", text)
            assert set(headers) <= {"stdint.h", "immintrin.h"}, path.name

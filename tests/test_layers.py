"""Imports point one way, kernels have names of their own, and C++ kernels know no framework."""

import ast
import re
from collections import Counter
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from emu3_kernels.ops import OPS
from emu3_kernels.testing.suite import LIBRARIES
from tests.unchanged import STACK_TESTS

ROOT = Path(__file__).parents[1]
PACKAGES = ("emu3_kernels", "emu3", "benchmarks", "tests")
MAY_NOT_IMPORT = {
    "emu3_kernels": ("emu3", "benchmarks", "tests"),
    "emu3": ("benchmarks", "tests"),
    "benchmarks": ("tests",),
    "tests": ("benchmarks",),
}
EMU3 = (
    {"config", "settings", "files", "model", "vision", "text", "prompt", "templates", "cache"}
    | {"weights", "timing", "cuda_graph", "voters", "__init__"},
    *({"generate"}, {"data", "train"}, {"tools", "serve", "demo"}, {"tasks", "cli", "__main__"}),
)
"""Parts of ``emu3``, lowest first: each imports its own layer and those below."""
FAMILIES = [ROOT / "emu3_kernels/ops" / name for name in sorted(set(OPS.values()))]
HOMES = ("emu3_kernels.ops", "tests")
COMPILED = "emu3_kernels._C"
BACKENDS = {"cpu", "cuda", "triton", "reference", *LIBRARIES}


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for package in PACKAGES for path in (ROOT / package).rglob("*.py")}


def imports(path: Path, *, lazily: bool = True) -> set[str]:
    """Name the modules that ``path`` imports; those inside functions only if ``lazily``."""
    names = set()
    for node in nodes(ast.parse(path.read_text()), lazily):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = module_of(path).split(".")[: -node.level or None] if node.level else []
            source = ".".join([*package, *filter(None, [node.module])])
            members = {f"{source}.{alias.name}" for alias in node.names} - {COMPILED}
            names |= {name for name in members if name in MODULES}
            names |= {source} if members - MODULES.keys() else set()
    return names


def nodes(tree: ast.AST, lazily: bool) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(tree):
        yield node
        is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if lazily or not (is_function or is_for_types(node)):
            yield from nodes(node, lazily)


def is_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def within(name: str, packages: tuple[str, ...] | set[str]) -> bool:
    return any(f"{name}.".startswith(f"{package}.") for package in packages)


@pytest.mark.parametrize(("where", "banned"), MAY_NOT_IMPORT.items())
def test_imports_point_down(where, banned):
    upward = {
        f"{module} imports {name}"
        for module, path in MODULES.items()
        if within(module, (where,))
        for name in imports(path)
        if within(name, banned)
    }
    assert not upward


def test_the_layers_of_emu3_point_down():
    layer = {f"emu3.{part}": i for i, parts in enumerate(EMU3) for part in parts}
    parts = {name: part_of(name) for name in MODULES if within(name, ("emu3",))}
    assert set(parts.values()) <= layer.keys(), "a part of emu3 is in no layer of EMU3: add it"
    upward = {
        f"{module} imports {name}"
        for module, part in parts.items()
        for name in imports(MODULES[module]) & parts.keys()
        if layer[parts[name]] > layer[part]
    }
    assert not upward


def part_of(module: str) -> str:
    return ".".join([*module.split("."), "__init__"][:2])


@pytest.mark.parametrize("lazily", [False, True], ids=["at import", "inside functions too"])
def test_no_module_imports_itself_through_others(lazily):
    graph = {
        module: {
            name for name in imports(path, lazily=lazily) if name in MODULES and name != module
        }
        for module, path in MODULES.items()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


@pytest.mark.parametrize("family", FAMILIES, ids=lambda path: path.name)
def test_a_family_imports_the_runtime_alone(family):
    allowed = (module_of(family), "emu3_kernels.runtime")
    others = {
        f"{path.name} imports {name}"
        for path in family.rglob("*.py")
        for name in imports(path)
        if within(name, ("emu3_kernels",)) and not within(name, allowed)
    }
    assert not others


@pytest.mark.parametrize("family", FAMILIES, ids=lambda path: path.name)
def test_the_tests_of_a_family_call_no_other(family):
    """``--skip-unchanged`` leaves them out after an edit of another family."""
    paths = sorted((ROOT / "tests" / family.name).rglob("*.py"))
    others = tuple(f"{folder}.{f.name}" for f in FAMILIES if f != family for folder in HOMES)
    wrong = {
        f"{path.name} imports {name}"
        for path in paths
        for name in imports(path)
        if within(name, ("emu3", "emu3_kernels.modules", *others))
    }
    wrong |= {
        f"{path.name} calls {name}"
        for path in paths
        for name in names_of_others(path)
        if OPS.get(name, family.name) != family.name
    }
    assert paths
    assert not wrong


def test_no_test_of_the_stack_names_triton():
    """``--skip-unchanged`` leaves them out after an edit of a Triton kernel."""
    paths = [path for name in STACK_TESTS for path in (ROOT / "tests" / name).rglob("*.py")]
    assert paths
    assert not [path.name for path in paths if "triton" in path.read_text().lower()]


def names_of_others(path: Path) -> Iterator[str]:
    """Yield the names that a file imports and the attributes that it reads."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.Attribute):
            yield node.attr


def backend_of(stem: str) -> str | None:
    """``triton_backward`` belongs to triton; a file of no backend may be shared by several."""
    return next((name for name in BACKENDS if f"{stem}_".startswith(f"{name}_")), None)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda path: path.name)
def test_a_backend_imports_no_other_backend_and_not_the_api(family):
    wrong = set()
    for path in family.glob("*.py"):
        mine = backend_of(path.stem)
        for name in imports(path) if mine else ():
            stem = name.removeprefix(f"{module_of(family)}.").split(".")[0]
            if stem == "api" or backend_of(stem) not in (None, mine):
                wrong.add(f"{path.name} imports {stem}")
    assert not wrong


def triton_kernels() -> Iterator[str]:
    for module, path in MODULES.items():
        if within(module, ("emu3_kernels",)):
            functions = nodes(ast.parse(path.read_text()), lazily=False)
            for node in functions:
                if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel"):
                    yield node.name


def cuda_kernels() -> Iterator[str]:
    for path in (ROOT / "csrc/cuda").rglob("*.cu*"):
        yield from re.findall(r"__global__\s[^;{]*?(\w+_kernel)\(", path.read_text())


@pytest.mark.parametrize("kernels", [triton_kernels, cuda_kernels])
def test_no_two_kernels_have_one_name(kernels):
    """A profiler shows nothing else."""
    names = Counter(kernels())
    assert names
    assert [name for name, n in names.items() if n > 1] == []


def test_a_triton_kernel_starts_with_its_op_or_family():
    owners = (*OPS, *set(OPS.values()))
    assert [name for name in triton_kernels() if not name.startswith(owners)] == []


def test_every_launch_sets_its_device():
    """``kernel[grid](…)`` runs on the current device, ``launch`` on that of its tensors."""
    bare = {
        f"{module}: {ast.unparse(node.func)}"
        for module, path in MODULES.items()
        if within(module, ("emu3_kernels",)) and module != "emu3_kernels.runtime.launch"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript)
        if ast.unparse(node.func.value).endswith("_kernel")
    }
    assert not bare


def test_kernels_know_no_framework():
    for path in [*(ROOT / "csrc/cpu").rglob("*.*"), *(ROOT / "csrc/cuda").rglob("*.cuh")]:
        assert not re.search(r"#include\s*<(torch|ATen|c10)/", path.read_text()), path.name


def test_files_compiled_per_level_include_no_standard_library():
    """An inline function emitted with AVX-512 flags could be the copy that every processor runs."""
    for path in (ROOT / "csrc/cpu").rglob("*.*"):
        text = path.read_text()
        if path.suffix == ".h" or "EMU3_LEVEL" in text:
            headers = re.findall(r"#include\s*<([^>]+)>", text)
            assert set(headers) <= {"stdint.h", "immintrin.h"}, path.name

"""Mutants: kernels with one operator, constant, mask or index changed, which tests must detect.

``python -m emu3_kernels.testing.mutants FAMILY`` changes the Triton, C++ and CUDA C++ kernels of a
family one place at a time, each in a copy of the repository, runs the family's tests on it until
one fails, and lists the survivors: a survivor needs a test, or is equivalent to the original.
"""

import ast
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from threading import Timer
from typing import Annotated

import pytest
import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from emu3_kernels.runtime import library

ROOT = Path(__file__).parents[2]
SWAPS = {"+": "-", "-": "+", "*": "+", "/": "*", "//": "*", "%": "+", "&": "|", "|": "&"}
SWAPS |= {"<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "=="}
SWAPS |= {"&&": "||", "||": "&&"}
CALLS = {"maximum": "minimum", "minimum": "maximum", "max": "min", "min": "max"}
KINDS = ("triton", "cpu", "cuda")
CPP_OPERATOR = re.compile(r"(?<= )(\+|-|\*|/|%|<=?|>=?|==|!=|&&|\|\|)=?(?= )")
CPP_NUMBER = re.compile(r"(?<![\w.\"])\d+(?![\w.])")
CPP_CALL = re.compile(r"\b(min|max)(?=\()")
CPP_SKIPPED = re.compile(
    r"#|\s*(template|static_assert|namespace|using|typedef|//)|.*(alignas|asm)"
)

INTERPRET = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
"""As in ``tests/conftest.py``, since the parent of the tests imports triton before it."""
FORKS = """
import os, sys
import hypothesis, pytest, torch, triton

torch.set_num_threads(1)
for line in sys.stdin:
    log, *arguments = line.rstrip("\\n").split("\\t")
    pid = os.fork()
    if not pid:
        os.setsid()
        handle = os.open(log, os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
        os.dup2(handle, 1), os.dup2(handle, 2)
        os._exit(pytest.main(arguments))
    print(pid, flush=True)
    _, status = os.waitpid(pid, 0)
    print(os.waitstatus_to_exitcode(status), flush=True)
"""

app = typer.Typer(add_completion=False)
console = Console()


@dataclass(frozen=True)
class Mutant:
    """One change of one file."""

    kind: str
    """``triton``, ``cpu`` or ``cuda``: whose tests are run first."""
    path: Path
    """Relative to the repository."""
    start: int
    end: int
    text: str
    """What replaces the characters from ``start`` to ``end``."""

    def apply(self, source: str) -> str:
        return source[: self.start] + self.text + source[self.end :]

    def __str__(self) -> str:
        source = (ROOT / self.path).read_text()
        number = source.count("\n", 0, self.start) + 1
        line = source.splitlines()[number - 1].strip()
        return f"{self.path}:{number}: {source[self.start : self.end]!r} -> {self.text!r} in {line}"


def mutants_of(family: str) -> dict[str, list[Mutant]]:
    """List every mutant of ``family`` by kind."""
    triton = sorted((ROOT / "emu3_kernels/ops" / family).rglob("*triton*.py"))
    cpu = sorted((ROOT / "csrc/cpu" / family).glob("*.*"))
    cuda = sorted((ROOT / "csrc/cuda").glob(f"{family}*.cuh"))
    cuda += sorted((ROOT / "csrc/cuda" / family).glob("*.cuh"))
    found = {
        "triton": [m for path in triton for m in _of_python(path)],
        "cpu": [m for path in cpu for m in _of_cpp("cpu", path)],
        "cuda": [m for path in cuda for m in _of_cpp("cuda", path)],
    }
    return {kind: mutants for kind, mutants in found.items() if mutants}


def _of_python(path: Path) -> Iterator[Mutant]:
    source = path.read_text()
    lines = [0, *(m.end() for m in re.finditer("\n", source))]
    encoded = source.isascii()

    def at(line: int, column: int) -> int:
        assert encoded, f"mutants: {path} must be ASCII: columns are counted in bytes"
        return lines[line - 1] + column

    def mutant(start: int, end: int, text: str) -> Mutant:
        return Mutant("triton", path.relative_to(ROOT), start, end, text)

    for function in ast.walk(ast.parse(source)):
        if not isinstance(function, ast.FunctionDef) or not _is_jitted(function):
            continue
        for statement in function.body:
            if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
                continue
            for node in ast.walk(statement):
                for start, end, text in _changes(node, source, at):
                    yield mutant(start, end, text)


def _is_jitted(function: ast.FunctionDef) -> bool:
    return any("jit" in ast.unparse(decorator) for decorator in function.decorator_list)


def _changes(node: ast.AST, source: str, at) -> Iterator[tuple[int, int, str]]:
    """Yield (start, end, text) for each change of ``node`` itself."""
    if isinstance(node, ast.BinOp | ast.AugAssign):
        left = node.left if isinstance(node, ast.BinOp) else node.target
        right = node.right if isinstance(node, ast.BinOp) else node.value
        yield from _swap(left, right, source, at)
    elif isinstance(node, ast.Compare) and len(node.ops) == 1:
        yield from _swap(node.left, node.comparators[0], source, at)
    elif isinstance(node, ast.Constant) and type(node.value) in (int, float):
        start, end = at(node.lineno, node.col_offset), at(node.end_lineno, node.end_col_offset)
        yield start, end, repr(node.value + 1)
    elif isinstance(node, ast.keyword) and node.arg == "mask":
        value = node.value
        start, end = at(value.lineno, value.col_offset), at(value.end_lineno, value.end_col_offset)
        yield start, end, f"({source[start:end]}) | True"
    elif isinstance(node, ast.Attribute) and node.attr in CALLS and ast.unparse(node)[:3] == "tl.":
        end = at(node.end_lineno, node.end_col_offset)
        yield end - len(node.attr), end, CALLS[node.attr]


def _swap(left: ast.expr, right: ast.expr, source: str, at) -> Iterator[tuple[int, int, str]]:
    start, end = at(left.end_lineno, left.end_col_offset), at(right.lineno, right.col_offset)
    found = re.search(r"//|<=|>=|==|!=|[-+*/%&|<>]", source[start:end])
    if found and found[0] in SWAPS:
        yield start + found.start(), start + found.end(), SWAPS[found[0]]


def _of_cpp(kind: str, path: Path) -> Iterator[Mutant]:
    offset, conditions = 0, []
    for line in path.read_text().splitlines(keepends=True):
        code = line.split("//")[0]
        _follow(conditions, line)
        if not CPP_SKIPPED.match(line) and not any(map(_needs_another_cpu, conditions)):
            changes = [(m.start(1), m.end(1), SWAPS[m[1]]) for m in CPP_OPERATOR.finditer(code)]
            changes += [(*m.span(), str(int(m[0]) + 1)) for m in CPP_NUMBER.finditer(code)]
            changes += [(*m.span(1), CALLS[m[1]]) for m in CPP_CALL.finditer(code)]
            for start, end, text in changes:
                yield Mutant(kind, path.relative_to(ROOT), offset + start, offset + end, text)
        offset += len(line)


def _follow(conditions: list[str], line: str) -> None:
    """Keep the conditions of the ``#if`` blocks around the next line, the innermost last."""
    word, _, condition = line.partition("#")[2].strip().partition(" ")
    if line.startswith("#") and word in ("elif", "else", "endif"):
        conditions.pop()
    if line.startswith("#") and word in ("if", "ifdef", "ifndef", "elif", "else"):
        conditions.append(condition)


def _needs_another_cpu(condition: str) -> bool:
    """Whether no level of this processor compiles the lines under ``condition``."""
    has = "".join(library.cpu_levels()).upper()
    needed = re.findall(r"(?<!!)defined\(__(AVX512|AMX)", condition)
    return any(name not in has for name in needed)


def copy_of_the_repository(folder: Path) -> Path:
    """Copy the files that git knows and the native library to ``folder``."""
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True
    )
    libraries = (path.relative_to(ROOT) for path in (ROOT / "emu3_kernels").glob("*.so"))
    for name in [*listed.stdout.splitlines(), *libraries]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    if (ROOT / "build").is_dir():  # objects, so that a mutant compiles one file
        subprocess.run(["cp", "-a", str(ROOT / "build"), str(folder)], check=True)
        _touch_sources_before_objects(folder)
    return folder


def _touch_sources_before_objects(folder: Path) -> None:
    """Make the copied sources older than the copied objects: nothing but a mutant is compiled."""
    for path in [*(folder / "csrc").rglob("*.*"), folder / "setup.py"]:
        os.utime(path, (0, 0))
    for listed in (folder / "build").rglob("*.d"):  # their sources are those of the copy
        listed.write_text(listed.read_text().replace(f"{ROOT}/", f"{folder}/"))


class Runner:
    """A process that has imported the libraries of the tests and forks one for each run."""

    def __init__(self, tree: Path) -> None:
        self.tree = tree
        self.log = tree / "pytest.log"
        self.process = subprocess.Popen(
            [sys.executable, "-c", FORKS],
            cwd=tree,
            env=os.environ | {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"} | INTERPRET,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def pytest(self, arguments: list[str], seconds: float) -> int | None:
        """Return the exit code of pytest; None if it was killed after ``seconds``."""
        self.process.stdin.write("\t".join([str(self.log), *arguments]) + "\n")
        self.process.stdin.flush()
        pid = int(self.process.stdout.readline())
        timer = Timer(seconds, os.killpg, (pid, signal.SIGKILL))
        timer.start()
        code = int(self.process.stdout.readline())
        timed_out = not timer.is_alive()
        timer.cancel()
        return None if timed_out else code


def verdict(mutant: Mutant, family: str, runner: Runner, seconds: float) -> str:
    """Return how ``mutant`` ended: ``survived``, ``killed``, ``timeout`` or ``does not build``."""
    path = runner.tree / mutant.path
    original = path.read_text()
    path.write_text(mutant.apply(original))
    try:
        if mutant.kind == "cpu" and not _builds(runner.tree):
            return "does not build"
        return _tested(mutant.kind, family, runner, seconds)
    finally:
        path.write_text(original)


def _builds(tree: Path) -> bool:
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    environment = os.environ | {"CUDA_HOME": str(tree / "no-cuda")}
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True)
    return done.returncode == 0


def _tested(kind: str, family: str, runner: Runner, seconds: float) -> str:
    """Run the family's tests that name ``kind``, then those that name no kind; a failure kills."""
    nearest = ["-k", kind, f"tests/{family}", "tests/gates"]
    others = ["-k", f"not ({' or '.join(KINDS)})"]
    deadline = time.monotonic() + seconds
    for chosen in (nearest, others):
        code = _pytest(chosen, family, runner, max(1.0, deadline - time.monotonic()))
        if code is None:
            return "timeout"
        if code not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
            return "killed"  # also by a crash
    return "survived"


def _pytest(chosen: list[str], family: str, runner: Runner, seconds: float) -> int | None:
    base = ["-x", "-q", "-p", "no:randomly", "--no-header", f"--family={family}"]
    # Every change of a Triton file would be compiled for all targets: minutes.
    base += ["-m", "not (codegen or oldest)"]
    code = runner.pytest([*base, *chosen], seconds)
    if code in (pytest.ExitCode.INTERNAL_ERROR, pytest.ExitCode.USAGE_ERROR):
        raise RuntimeError(f"mutants: pytest broke off:\n{runner.log.read_text()}")
    return code


def check_unchanged(family: str, runner: Runner) -> None:
    """Fail if a test does without any change: it would kill every mutant."""
    if _pytest([], family, runner, seconds=3600) != pytest.ExitCode.OK:
        raise RuntimeError(
            f"mutants: a test of {family} fails without a change:\n{runner.log.read_text()}"
        )


@app.command()
def main(
    family: Annotated[str, typer.Argument(help="a folder of emu3_kernels/ops")],
    most: Annotated[int, typer.Option(help="mutants of each kind, drawn at random; 0: all")] = 20,
    kinds: Annotated[str, typer.Option(help="which of triton,cpu,cuda")] = ",".join(KINDS),
    seed: Annotated[int, typer.Option(help="of the draw")] = 0,
    jobs: Annotated[int, typer.Option(help="mutants at a time")] = os.cpu_count() or 1,
    seconds: Annotated[float, typer.Option(help="a run that takes longer is killed")] = 300.0,
) -> None:
    """List the mutants of FAMILY that its tests do not notice."""
    listed = {kind: all_ for kind, all_ in mutants_of(family).items() if kind in kinds.split(",")}
    if not listed:
        raise typer.BadParameter(f"family must have kernels of {kinds}, got {family}")
    draw = random.Random(seed)
    chosen = [
        m for all_ in listed.values() for m in draw.sample(all_, min(most or len(all_), len(all_)))
    ]
    with tempfile.TemporaryDirectory(prefix="emu3-mutants-") as folder:
        runners: SimpleQueue[Runner] = SimpleQueue()
        for job in range(jobs):
            runners.put(Runner(copy_of_the_repository(Path(folder) / str(job))))

        def judge(mutant: Mutant) -> str:
            runner = runners.get()
            try:
                return verdict(mutant, family, runner, seconds)
            finally:
                runners.put(runner)

        first = runners.get()
        check_unchanged(family, first)
        runners.put(first)
        with ThreadPoolExecutor(jobs) as pool:
            results = track(pool.map(judge, chosen), f"mutants of {family}", len(chosen))
            verdicts = []
            for mutant, how in zip(chosen, results, strict=True):
                verdicts.append((mutant, how))
                console.print(f"{how}: {mutant}", markup=False, highlight=False)
    report(family, listed, verdicts)


def report(
    family: str, listed: dict[str, list[Mutant]], verdicts: list[tuple[Mutant, str]]
) -> None:
    table = Table(title=f"COUNTED: mutants of {family}")
    for column in ("kind", "sites", "tried", "killed", "survived", "share killed"):
        table.add_column(column, justify="left" if column == "kind" else "right")
    for kind, all_ in listed.items():
        ended = [how for m, how in verdicts if m.kind == kind and how != "does not build"]
        survived = ended.count("survived")
        share = f"{1 - survived / len(ended):.1%}" if ended else "-"
        numbers = len(all_), len(ended), len(ended) - survived, survived
        table.add_row(kind, *map(str, numbers), share)
    console.print(table)


if __name__ == "__main__":
    app()

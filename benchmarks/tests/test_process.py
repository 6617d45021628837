"""The processes of the benchmarks: one allocator for all, one process for each run."""

import os
import platform
import subprocess
import sys

import pytest

from benchmarks import __main__ as front
from benchmarks.harness import run


def test_the_process_starts_again_with_one_allocator_for_all(monkeypatch):
    started = {}
    monkeypatch.setenv("TRITON_INTERPRET", "1")

    def execve(path, arguments, environment):
        started.update(environment)
        raise SystemExit

    monkeypatch.setattr(os, "execve", execve)
    with pytest.raises(SystemExit):
        front.main()
    assert started.items() >= run.ALLOCATOR.items()
    assert "TRITON_INTERPRET" not in started


def test_a_run_tells_how_its_process_ended(tmp_path):
    unknown = run.Run("unknown", (1,), 0.0)
    assert run.run_pytest(unknown, tmp_path / "run.json") == pytest.ExitCode.USAGE_ERROR


FAULTS = """
import resource, torch
for _ in range(5):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(1 << 24)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the settings are glibc's")
def test_a_freed_block_is_used_again_for_one_as_large():
    """glibc cut a little off 64 MiB, so that the next 64 MiB were fresh: 16,384 pages a call."""
    environment = {**os.environ, **run.ALLOCATOR}
    done = subprocess.run(
        [sys.executable, "-c", FAULTS], env=environment, capture_output=True, text=True, check=True
    )
    first, _second, *others = map(int, done.stdout.split())  # the second may still be fresh
    assert first > 10_000
    assert max(others) < 1000

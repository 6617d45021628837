"""Killed curations, four times: ``python -m tests.e2e.curate_kills`` does it twenty times."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.e2e
def test_a_killed_curation_continues_to_the_same_manifest():
    """In a process of its own, whose forks have everything imported."""
    command = [sys.executable, "-m", "tests.e2e.curate_kills", "--times", "4"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr

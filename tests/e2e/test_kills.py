"""Killed runs, twenty times: ``python -m tests.e2e.kills`` does it as often as you like."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.e2e
def test_a_kill_damages_no_file_and_loses_no_step_before_the_checkpoint():
    """In a process of its own, whose forks have everything imported."""
    command = [sys.executable, "-m", "tests.e2e.kills", "--times", "20"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr

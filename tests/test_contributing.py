"""The example of CONTRIBUTING.md runs: a backend in one file, checked by one command."""

import re
import subprocess
import sys
from pathlib import Path

import torch

from emu3_kernels import record_backends, swiglu
from emu3_kernels.runtime import dispatch
from tests import fresh

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text()
EXAMPLE, REGISTRATION = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


def checked(example: str, folder: Path) -> subprocess.CompletedProcess:
    (folder / "my_backend.py").write_text(example)
    (command,) = re.findall(r"```sh\npython (-m emu3_kernels\.testing .*)\n```", TEXT)
    _, module, *options = command.split()
    return fresh.run_module(module, *options, cwd=folder)


def test_the_example_is_accurate(tmp_path):
    done = checked(EXAMPLE, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "float16 is not implemented" in done.stdout
    ran, total = re.search(r"my_backend: (\d+) of (\d+) calls are accurate", done.stdout).groups()
    assert ran == total != "0"


def test_a_wrong_gradient_fails_the_command(tmp_path):
    wrong = EXAMPLE.replace("1 + gate_f32 * (1 - sigmoid)", "1.02 + gate_f32 * (1 - sigmoid)")
    done = checked(wrong, tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "dgate: error" in done.stdout


def test_a_registered_backend_runs(tmp_path, monkeypatch):
    (tmp_path / "my_backend.py").write_text(EXAMPLE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_backend", raising=False)
    swiglus = dispatch.backends("swiglu")
    monkeypatch.setattr(swiglus, "_order", dict(swiglus._order))
    exec(REGISTRATION, {})
    try:
        with record_backends() as used:
            swiglu(torch.ones(2, 3), torch.ones(2, 3))
    finally:
        del swiglus["mine"]
    assert used == {"swiglu": "mine"}


def test_a_file_without_the_op_is_named(tmp_path):
    done = checked("BACKENDS = {}", tmp_path)
    assert done.returncode != 0
    assert "my_backend.py must have BACKENDS['swiglu'], got []" in done.stderr

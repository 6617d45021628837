"""Python code in a process that has imported torch and nothing of ours.

Such a process is a fork of one that waits: to start Python and import torch takes seconds.
"""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).parents[1]
SERVER = """
import json, os, sys
import torch

for line in sys.stdin:
    pid = os.fork()
    if not pid:
        break
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
else:
    sys.exit()
job = json.loads(line)
os.chdir(job["cwd"])
os.environ.clear()
os.environ.update(job["environment"])
for number, path in enumerate((os.devnull, job["stdout"], job["stderr"])):
    os.dup2(os.open(path, os.O_RDONLY if number == 0 else os.O_CREAT | os.O_WRONLY), number)
sys.argv = job["argv"]
exec(job["code"], {"__name__": "__main__"})
"""


def run(code: str, *argv: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    """Run ``code`` as ``python -W always -c code argv`` does, with what it prints as text."""
    with TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        job = {
            "code": code,
            "argv": ["-c", *argv],
            "cwd": str(cwd),
            "environment": {**os.environ, **environment},
            "stdout": str(out),
            "stderr": str(err),
        }
        server = _server()
        print(json.dumps(job), file=server.stdin, flush=True)
        returncode = int(server.stdout.readline())
        return subprocess.CompletedProcess(code, returncode, out.read_text(), err.read_text())


def run_module(
    module: str, *argv: str, cwd: Path = ROOT, **environment: str
) -> subprocess.CompletedProcess:
    """Run ``python -m module argv``."""
    code = f"import runpy; runpy.run_module({module!r}, run_name='__main__', alter_sys=True)"
    return run(code, *argv, cwd=cwd, **environment)


@cache
def _server() -> subprocess.Popen:
    """Start the process that is forked; it ends with this one, which closes its input."""
    command = [sys.executable, "-W", "always", "-c", SERVER]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(command, **pipes, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})

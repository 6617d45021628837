"""``emu3 serve`` as a process."""

import os
import re
import subprocess
import sys

import pytest

from emu3.weights import save_decoder, save_vision
from tests.serve.tiny_server import tiny_loaded


@pytest.fixture
def server(tmp_path):
    """A process and its address."""
    loaded = tiny_loaded(num_positions=4096)
    save_decoder(tmp_path / "decoder.safetensors", loaded.model)
    save_vision(tmp_path / "vision.safetensors", loaded.vision)
    model = str(tmp_path / "decoder.safetensors")
    command = [sys.executable, "-m", "emu3", "serve", "--model", model, "--port", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ})
    for line in process.stderr:
        if address := re.search(r"running on (http://\S+)", line):
            break
    yield process, address[1]
    process.kill()

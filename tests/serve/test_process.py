"""``emu3 serve`` as a process: where it listens, and how it ends."""

import re
import signal
from base64 import b64decode

import httpx
import pytest
from typer.testing import CliRunner

from emu3.cli import app
from emu3.serve.run import check_host


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org"])
def test_listening_beyond_this_machine_needs_a_token(host):
    done = CliRunner().invoke(app, ["serve", "--host", host])
    line = f"emu3: --host: beyond this machine a --token must be given, got {host}\n"
    assert (done.exit_code, done.stderr) == (1, line)
    check_host(host, "secret")


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_listening_on_this_machine_needs_none(host):
    check_host(host, None)


def test_a_model_that_is_not_there_is_told_in_one_line(tmp_path):
    done = CliRunner().invoke(app, ["serve", "--model", str(tmp_path / "none")])
    assert done.exit_code == 1
    assert done.stderr.startswith("emu3: weights: no file")
    assert done.stderr.count("\n") == 1


@pytest.mark.e2e
def test_sigterm_finishes_what_was_accepted_refuses_the_rest_and_exits_with_0(server):
    process, url = server
    path, large = f"{url}/v1/images/generations", {"prompt": "x", "size": "80x80", "n": 2}
    with httpx.stream("POST", path, json=large | {"stream": True, "partial_images": 1}) as answer:
        events = (line for line in answer.iter_lines() if line.startswith("data: "))
        next(events)
        process.send_signal(signal.SIGTERM)
        while (refused := httpx.post(path, json=large)).status_code != 503:
            assert refused.status_code == 200
        assert refused.json()["error"]["message"] == "the server is about to stop"
        assert httpx.get(f"{url}/health").json() == {"status": "draining"}
        rest = [*events]
    completed = [line for line in rest if '"image_generation.completed"' in line]
    assert len(completed) == 2
    for line in completed:
        assert b64decode(re.search(r'"b64_json": "([^"]+)"', line)[1]).startswith(b"\x89PNG")
    assert process.wait(30) == 0

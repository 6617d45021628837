"""Requests that wait, leave or fail: none of them harms another."""

import threading
import time

import httpx
import numpy as np
import openai
import pytest
import torch

from tests.serve.requests import alone, draw, pixels
from tests.serve.tiny_server import serving


class Held:
    """Lets the batch step only inside ``released``."""

    def __init__(self, served, monkeypatch):
        batch, self.gate = served.service.engine.batch, threading.Event()
        step = batch.step
        monkeypatch.setattr(batch, "step", lambda: (self.gate.wait(30), step())[1])


def until(holds):
    end = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.002)


def in_background(call):
    results = []
    thread = threading.Thread(target=lambda: results.append(call()))
    thread.start()
    return thread, results


def test_a_full_queue_gets_429_and_loses_nothing(monkeypatch):
    with serving(batch=2, queue=2) as served:
        held, engine = Held(served, monkeypatch), served.service.engine
        calls = []
        for running, waiting in ((1, 0), (1, 1), (1, 2)):
            calls.append(in_background(lambda: draw(served, prompt="x", size="8x8", seed=1)))
            until(lambda: (engine.running, engine.waiting) == (running, waiting))  # noqa: B023
        refused = draw(served, prompt="x", size="8x8")
        assert refused.status_code == 429
        assert refused.headers["retry-after"] == "1"
        assert refused.json()["error"]["message"] == "the queue is full: 2 requests wait"
        with pytest.raises(openai.RateLimitError):
            served.client().images.generate(prompt="x", size="8x8")
        held.gate.set()
        images = set()
        for thread, results in calls:
            thread.join()
            images.add(results[0].json()["data"][0]["b64_json"])
        assert len(images) == 1


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_rows(monkeypatch, stream):
    with serving(batch=2) as served:
        held, engine = Held(served, monkeypatch), served.service.engine
        body = {"prompt": "x", "size": "16x16", "n": 3, "stream": stream}
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{served.url}/v1/images/generations", json=body, timeout=0.3)
        assert engine.running == 1
        before = engine.forwards
        held.gate.set()
        until(lambda: engine.running == 0)
        assert engine.forwards - before < 10  # and not 3 times 63
        assert draw(served, prompt="x", size="8x8").status_code == 200


def test_a_request_whose_logits_are_not_finite_fails_alone(monkeypatch):
    with serving() as served:
        held = Held(served, monkeypatch)
        with torch.no_grad():
            served.loaded.model.embedding.weight[ord("q")] = torch.nan
        bad, wrong = in_background(lambda: draw(served, prompt="q", size="8x8", seed=1))
        good, right = in_background(lambda: draw(served, prompt="x", size="8x8", seed=1))
        engine = served.service.engine
        until(lambda: engine.running + engine.waiting == 2)
        held.gate.set()
        bad.join(), good.join()
        assert wrong[0].status_code == 500
        assert wrong[0].json()["error"]["message"] == "the server failed"
        expected = alone(served.loaded, "x", (4, 4), 1)
        assert np.array_equal(pixels(right[0].json()["data"][0]["b64_json"]), expected)


def test_an_error_of_a_step_ends_its_requests_and_no_later_one(monkeypatch):
    with serving() as served:
        batch = served.service.engine.batch
        with monkeypatch.context() as broken:
            broken.setattr(batch, "step", lambda: 1 / 0)
            assert draw(served, prompt="x", size="8x8").status_code == 500
            stream = draw(served, prompt="x", size="8x8", stream=True)
        assert 'data: {"error": {"message": "the server failed"' in stream.text
        assert draw(served, prompt="x", size="8x8").status_code == 200

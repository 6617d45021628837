"""Captions from an endpoint: what is sent, retries, errors, resumption and the cap of costs."""

import shutil
import tarfile
from pathlib import Path

import pytest

from tests.curate.endpoint import FakeEndpoint, fake_endpoint
from tests.curate.making import (
    SMALL,
    moving,
    without_text,
    write_clip,
    write_photo,
)
from tests.curate.test_curate import kept_records, rows_of

FAST = ["--set", "caption.backoff=0.01"]
PRICES = ["--set", "caption.price_in=1000", "--set", "caption.price_out=1000"]


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> Path:
    """Six photographs, two clips, and a small photograph that is dropped; the last in a tar."""
    given, out = tmp_path_factory.mktemp("in"), tmp_path_factory.mktemp("out")
    for seed in range(6):
        write_photo(given / f"{seed}.png", seed)
    write_photo(given / "small.png", 8, 40, 40)
    write_clip(given / "clip.mp4", moving(1, 30), moving(2, 40))
    with tarfile.open(given / "a.tar", "w") as tar:
        tar.add(given / "5.png", "5.png")
    (given / "5.png").unlink()
    done = without_text(given, "--out", out, *SMALL)
    assert done.exit_code == 0, done.stderr
    return out


@pytest.fixture
def out(measured, tmp_path) -> Path:
    return Path(shutil.copytree(measured, tmp_path / "out"))


@pytest.fixture
def endpoint() -> FakeEndpoint:
    with fake_endpoint() as fake:
        yield fake


def ask(out: Path, endpoint: FakeEndpoint, *words: object) -> object:
    asked = "--captions", endpoint.url, "--captioner", "m"
    return without_text("--out", out, *SMALL, *FAST, *asked, *words)


def captions_of(out: Path) -> list[str]:
    return [row["caption"] for row in rows_of(out).values() if row["caption"]]


def test_every_kept_row_is_captioned_through_an_overloaded_endpoint(out, endpoint, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    endpoint.plan = {1: 503, 2: 429, 4: 500, 6: 504, 9: 502}
    done = ask(out, endpoint, "--set", "caption.long_edge=100")
    assert (done.exit_code, done.stderr) == (0, "")
    assert "8 captions" in done.stdout
    assert endpoint.requests == 8 + 5
    assert set(endpoint.keys) == {"Bearer secret"}
    assert {row["id"]: row["caption"] for row in rows_of(out).values()} == {
        **{f"{n}.png": "1 images of 100 x 75" for n in range(5)},
        "a.tar/5.png": "1 images of 100 x 75",
        "clip.mp4#0-30": "8 images of 100 x 56",
        "clip.mp4#30-70": "8 images of 100 x 56",
        "small.png": None,
    }
    assert {record["text"] for record in kept_records(out)} == set(captions_of(out))
    assert "secret" not in "".join(p.read_text() for p in out.rglob("*.jsonl"))


def test_a_clip_is_sent_as_one_part_of_frames_with_their_places_as_vllm_takes_it(out, endpoint):
    words = "--set", "caption.video_part=video", "--set", "caption.frames=4"
    assert ask(out, endpoint, *words, "--set", "images.width.max=1").exit_code == 0
    assert captions_of(out) == ["4 images of 256 x 144"] * 2
    sent = sorted((body["media_io_kwargs"]["video"] for body in endpoint.bodies), key=str)
    assert sent[0]["frames_indices"] == [3, 11, 18, 26]
    assert (sent[0]["fps"], sent[0]["total_num_frames"], sent[0]["duration"]) == (12, 30, 2.5)
    (body,) = [b for b in endpoint.bodies if b["media_io_kwargs"]["video"] == sent[0]]
    assert (body["model"], body["max_tokens"], body["temperature"]) == ("m", 300, 0)
    assert [part["type"] for part in body["messages"][0]["content"]] == ["video_url", "text"]


def test_rows_with_a_caption_are_not_asked_for_again(out, endpoint):
    ask(out, endpoint, "--set", "videos.width.max=1")
    assert endpoint.requests == 6
    done = ask(out, endpoint)
    assert endpoint.requests == 8
    assert len(captions_of(out)) == 8
    assert "8 captions" in done.stdout
    ask(out, endpoint, "--set", "caption.prompt=In one word.")
    assert endpoint.requests == 16
    without_text("--out", out, *SMALL)
    assert len(captions_of(out)) == 8


def test_a_refused_row_costs_itself_and_is_asked_for_again(out, endpoint):
    endpoint.plan = {3: 400}
    done = ask(out, endpoint)
    assert done.exit_code == 1
    assert "answers 400: told so" in done.stderr
    assert len(captions_of(out)) == 7
    assert ask(out, endpoint).exit_code == 0
    assert len(captions_of(out)) == 8
    assert endpoint.requests == 9


def test_a_request_that_fails_at_every_attempt_costs_its_row(out, endpoint):
    """A server may break at one image alone."""
    endpoint.plan = {3: 500, 4: 500}
    words = "--set", "caption.attempts=2", "--set", "caption.concurrency=1"
    done = ask(out, endpoint, *words)
    assert done.exit_code == 1
    assert done.stderr.count("answers 500") == 1
    assert len(captions_of(out)) == 7


@pytest.mark.parametrize("status", [401, 404])
def test_an_endpoint_that_refuses_all_ends_the_run_in_one_line(status, out, endpoint):
    endpoint.plan = dict.fromkeys(range(99), status)
    done = ask(out, endpoint, "--set", "caption.concurrency=1")
    assert done.exit_code == 1
    assert f"answers {status}: told so" in done.stderr
    assert done.stderr.count("\n") == 1
    assert endpoint.requests < 5


def test_an_endpoint_that_is_not_there_ends_the_run(out, endpoint, monkeypatch):
    monkeypatch.setattr("emu3.tools.curate.endpoint._LIMIT", 3)
    endpoint.url = "http://127.0.0.1:9/v1"
    done = ask(out, endpoint, "--set", "caption.attempts=2", "--set", "caption.concurrency=1")
    assert done.exit_code == 1
    lines = done.stderr.splitlines()
    assert len(lines) == 3
    assert "refused; 3 requests in a row failed" in lines[-1]


def test_a_caption_that_is_cut_off_is_none(out, endpoint):
    endpoint.finish = "length"
    done = ask(out, endpoint)
    assert done.exit_code == 1
    assert done.stderr.count("raise caption.max_tokens") == 8
    assert captions_of(out) == []


def test_no_request_is_sent_that_could_exceed_the_cap_over_all_runs(out, endpoint):
    """A reply costs 0.11; before the first, 0.3 may be spent on its caption alone."""
    cap = "--set", "caption.max_cost=0.75", "--set", "caption.max_tokens=300"
    done = ask(out, endpoint, *PRICES, *cap)
    assert done.exit_code == 0, done.stderr
    assert endpoint.requests == 4
    assert "4 captions, which cost 0.44; 4 not asked for: caption.max_cost" in done.stdout
    assert "4 not asked for" in ask(out, endpoint, *PRICES, *cap).stdout
    assert endpoint.requests == 4
    more = "--set", "caption.max_cost=2"
    assert "8 captions, which cost 0.88" in ask(out, endpoint, *PRICES, *more).stdout


def test_a_cap_needs_an_endpoint_that_counts(out, endpoint):
    endpoint.usage = None
    done = ask(out, endpoint, *PRICES, "--set", "caption.max_cost=5")
    assert done.exit_code == 1
    assert "states no usage, so that caption.max_cost cannot be kept" in done.stderr

"""The server as OpenAI's own client sees it."""

import io
import json
import threading
import time
from base64 import b64decode, b64encode
from fractions import Fraction

import httpx
import numpy as np
import openai
import pytest
import torch
from PIL import Image

from emu3.data.media import write_video
from emu3.generate import Batch, Generation, Sampling, generate_images, generate_text
from emu3.generate.batch import GREEDY
from emu3.templates import SYSTEM, Turn, chat_prompt
from emu3.vision import postprocess
from tests.serve.tiny_server import NAME, serving, tiny_loaded


@pytest.fixture(scope="module")
def served():
    with serving() as one:
        yield one


JSON = {"Content-Type": "application/json; charset=utf-8"}


def pixels(b64_json):
    return np.array(Image.open(io.BytesIO(b64decode(b64_json))))


def alone(loaded, prompt, grid, seed, **how):
    codes = generate_images(loaded.model, loaded.text, [prompt], grid, Sampling(**how), seed)
    return np.array(postprocess(loaded.vision.decode(codes))[0])


def data_url(image, kind="image/png"):
    if isinstance(image, Image.Image):
        file = io.BytesIO()
        image.save(file, format="PNG")
        image = file.getvalue()
    return f"data:{kind};base64,{b64encode(image).decode()}"


def shown(image):
    return {"type": "image_url", "image_url": {"url": data_url(image)}}


def post(served, path, **body):
    return httpx.post(f"{served.url}{path}", json=body, timeout=60)


def draw(served, **body):
    return post(served, "/v1/images/generations", **body)


def say(served, *messages, **body):
    return post(served, "/v1/chat/completions", messages=[*messages], **body)


def user(content):
    return {"role": "user", "content": content}


def test_the_official_client_gets_the_images_of_its_seed(served):
    answer = served.client().images.generate(
        prompt="a red seven", model=NAME, n=2, size="12x8", extra_body={"seed": 5}
    )
    assert answer.size == "12x8"
    assert [one.seed for one in answer.data] == [5, 6]
    assert (answer.usage.output_tokens, answer.usage.total_tokens) == (48, 48 + 17)
    for one in answer.data:
        expected = alone(served.loaded, "a red seven", (4, 6), one.seed)
        assert np.array_equal(pixels(one.b64_json), expected)


def test_settings_of_an_image_are_those_of_generate_images(served):
    body = {"guidance": 1.5, "top_k": 40, "top_p": 0.9, "temperature": 0.8, "negative": "blue"}
    answer = draw(served, prompt="seven", ratio="2:1", area=128, seed=2**64 - 1, **body).json()
    how = body | {"negative": "blue"}
    expected = alone(served.loaded, "seven", (4, 8), 2**64 - 1, **how)
    assert np.array_equal(pixels(answer["data"][0]["b64_json"]), expected)
    words = draw(served, prompt="sev", positive="en", size="16x8", seed=2**64 - 1, **body).json()
    assert words["data"][0]["b64_json"] == answer["data"][0]["b64_json"]


def test_a_stream_shows_an_image_as_it_grows(served):
    events = [
        *served.client().images.generate(
            prompt="x", size="8x12", stream=True, partial_images=2, extra_body={"seed": 3}
        )
    ]
    kinds = [event.type.rpartition(".")[2] for event in events]
    assert kinds == ["partial_image", "partial_image", "completed"]
    assert [event.partial_image_index for event in events[:2]] == [0, 1]
    codes = generate_images(served.loaded.model, served.loaded.text, ["x"], (6, 4), seeds=3)
    grown = [pixels(event.b64_json) for event in events]
    for image, rows in zip(grown, (2, 4, 6), strict=True):
        expected = np.array(postprocess(served.loaded.vision.decode(codes[:, :rows]))[0])
        assert np.array_equal(image[: 2 * rows], expected)
        assert (image[2 * rows :] == 128).all()
    assert events[-1].usage.output_tokens == 24


def test_a_seed_is_drawn_where_none_is_given(served):
    first, second = (draw(served, prompt="x", size="8x8").json()["data"][0] for _ in range(2))
    assert first["seed"] != second["seed"]
    again = draw(served, prompt="x", size="8x8", seed=first["seed"]).json()["data"][0]
    assert again["b64_json"] == first["b64_json"]


def test_a_conversation_with_images_is_answered_as_alone(served):
    model, text, vision = served.loaded.model, served.loaded.text, served.loaded.vision
    images = [Image.linear_gradient("L").resize((16, 16)).rotate(turn) for turn in (0, 90)]
    codes = [
        vision.encode(
            torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None] / 127.5 - 1
        )[0]
        for image in images
    ]
    answer = served.client().chat.completions.create(
        model=NAME,
        messages=[
            {"role": "system", "content": "Be brief."},
            user([shown(images[0]), {"type": "text", "text": "What is it?"}]),
            {"role": "assistant", "content": "A ramp"},
            user([shown(images[1]), shown(images[0]), {"type": "text", "text": "And now?"}]),
        ],
        max_tokens=8,
    )
    turns = [Turn([codes[0], "What is it?"], "A ramp"), Turn([codes[1], codes[0], "And now?"])]
    prompt = chat_prompt(turns, text, "Be brief. ")
    assert answer.choices[0].message.content == generate_text(model, text, [prompt], 8)[0].strip()
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.prompt_tokens == len(prompt)
    assert answer.usage.completion_tokens == 8


def test_a_streamed_answer_is_the_whole_one_in_pieces_of_whole_characters(served):
    text = served.loaded.text
    request = {
        "model": NAME,
        "messages": [user("Tell me")],
        "max_completion_tokens": 40,
        "temperature": 1.5,
        "seed": 4,
    }
    stream = served.client().chat.completions.create(
        stream=True, stream_options={"include_usage": True}, **request
    )
    *chunks, last = stream
    pieces = [chunk.choices[0].delta.content for chunk in chunks]
    how = Sampling(1, None, None, 1.5)
    prompt = chat_prompt([Turn(["Tell me"])], text, SYSTEM)
    (expected,) = generate_text(served.loaded.model, text, [prompt], 40, how=how, seeds=4)
    assert "".join(pieces) == expected
    assert sum(map(bool, pieces)) > 3
    assert last.usage.completion_tokens == last.usage.total_tokens - len(prompt) > 3
    assert [chunk.choices[0].finish_reason for chunk in chunks][-1] in ("stop", "length")
    whole = served.client().chat.completions.create(**request)
    assert whole.choices[0].message.content == expected.strip()


def test_an_answer_ends_at_eos():
    """EOS wins where its head row points along the hidden state after the fifth token."""
    with serving() as served:
        model, text = served.loaded.model, served.loaded.text
        prompt = chat_prompt([Turn(["x"])], text, SYSTEM)
        five = Generation([prompt], 5, None, GREEDY)
        Batch(model, text.vocabulary, 1, five.capacity).run([five])
        with torch.no_grad():
            hidden = model(torch.tensor([[*prompt, *five.ids]]))[0]
            model.head.weight[text.vocabulary.eos] = 9 * (hidden[-1] - hidden[len(prompt) - 1])
        answer = say(served, user("x"), max_tokens=200).json()
        (expected,) = generate_text(model, text, [prompt], 200)
        assert answer["choices"][0]["finish_reason"] == "stop"
        assert answer["choices"][0]["message"]["content"] == expected.strip()
        assert answer["usage"]["completion_tokens"] <= 5


def test_models_health_and_metrics_are_told(served):
    assert [one.id for one in served.client().models.list()] == [NAME]
    assert served.client().models.retrieve(NAME).id == NAME
    with pytest.raises(openai.NotFoundError, match="model: 'x/y' is not served here, 'tiny' is"):
        served.client().models.retrieve("x/y")
    assert httpx.get(f"{served.url}/health").json() == {"status": "ok"}
    before = served.service.engine.forwards
    draw(served, prompt="x", size="8x8", n=3, guidance=3)
    after = served.service.engine
    assert after.forwards - before == 15  # the first code of 16 comes of the prompt
    metrics = httpx.get(f"{served.url}/metrics").text
    assert f"emu3_forwards_total {after.forwards}.0" in metrics
    assert 'emu3_requests_total{path="/v1/images/generations",status="200"}' in metrics


BAD = {
    "not JSON": (b"{", 400, "body: must be JSON"),
    "no object": (b"[1]", 400, "body: must be a JSON object, got list"),
    "no prompt": ({}, 400, "prompt: Field required"),
    "an empty prompt": ({"prompt": "  "}, 400, "prompt: must not be empty"),
    "a prompt that is no text": ({"prompt": 3}, 400, "prompt: Input should be a valid string"),
    "a long prompt": ({"prompt": "x" * 9000}, 400, "prompt: may have 8192 characters, got 9000"),
    "a prompt past the context": (
        {"prompt": "x" * 600},
        400,
        "prompt and image may have 510 tokens together, got",
    ),
    "too many": ({"prompt": "x", "n": 11}, 400, "n: may have 10 images, got 11"),
    "none": ({"prompt": "x", "n": 0}, 400, "n: Input should be greater than 0, got 0"),
    "a size in words": ({"prompt": "x", "size": "big"}, 400, 'size: must be "auto" or "WIDTHxHE'),
    "half a code": ({"prompt": "x", "size": "9x8"}, 400, "size: sides must be multiples of 2"),
    "a wide size": ({"prompt": "x", "size": "60x8"}, 400, "size: a side may be 5 times the other"),
    "a wide ratio": ({"prompt": "x", "ratio": "6:1"}, 400, "ratio must be 5 at most, got 6:1"),
    "size and ratio": (
        {"prompt": "x", "size": "8x8", "ratio": "1:1"},
        400,
        "size: must be auto beside ratio or area",
    ),
    "an unknown setting": (
        {"prompt": "x", "steps": 30},
        400,
        "steps: unknown setting; a request for images has area, guidance",
    ),
    "a URL": ({"prompt": "x", "response_format": "url"}, 400, "response_format: Input should be"),
    "a negative seed": ({"prompt": "x", "seed": -1}, 400, "seed: Input should be greater than or"),
    "not finite": (b'{"prompt": "x", "guidance": NaN}', 400, "guidance: Input should be a finite"),
    "another model": (
        {"prompt": "x", "model": "dall-e-3"},
        404,
        "model: 'dall-e-3' is not served here, 'tiny' is",
    ),
    "half a character": (b'{"prompt": "\\udcff"}', 400, "ByteTokenizer: text must be Unicode"),
}


@pytest.mark.parametrize(("body", "status", "line"), BAD.values(), ids=BAD)
def test_a_bad_request_for_images_gets_one_line(served, body, status, line):
    content = body if isinstance(body, bytes) else json.dumps(body)
    answer = httpx.post(f"{served.url}/v1/images/generations", content=content, headers=JSON)
    told = answer.json()["error"]
    assert answer.status_code == status
    assert told["message"].startswith(line)
    assert "\n" not in told["message"]
    assert (told["type"], told["code"]) == ("invalid_request_error", str(status))


BOMB = Image.new("1", (9000, 9000))
BAD_CHATS = {
    "nothing": ([], "messages: List should have at least 1 item"),
    "an empty message": ([user(" ")], "chat: something must be said, got an empty prompt"),
    "another role": ([{"role": "tool", "content": "x"}], "messages.0.role: Input should be"),
    "the last word": (
        [user("x"), {"role": "assistant", "content": "y"}],
        "messages: the last must be the user's, got assistant",
    ),
    "a late system": (
        [user("x"), {"role": "system", "content": "y"}, user("z")],
        "messages: what the system says must come first",
    ),
    "sound": (
        [user([{"type": "input_audio", "input_audio": {}}])],
        "messages.0.content.0: Input tag 'input_audio' found using 'type' does not match",
    ),
    "a link": (
        [user([{"type": "image_url", "image_url": {"url": "https://x.org/y.png"}}])],
        "image 1 must be a data URL in base64, got 'https://x.org/y.png'",
    ),
    "not base64": (
        [user([{"type": "image_url", "image_url": {"url": "data:image/png;base64,a?"}}])],
        "image 1 must be a data URL in base64, got other characters",
    ),
    "no image": (
        [user([{"type": "image_url", "image_url": {"url": data_url(b"words")}}])],
        "image: image 1 is not an image",
    ),
    "a bomb": ([user([shown(BOMB)])], "image 1 may have 50000000 pixels, got 9000 x 9000"),
    "many images": (
        [user([shown(Image.new("RGB", (2, 2)))] * 11)],
        "messages: may have 10 images and videos, got 11",
    ),
    "past the context": ([user("x" * 500)], "messages and answer may have 510 tokens together"),
    "no video": (
        [user([{"type": "video_url", "video_url": {"url": data_url(b"x", "video/mp4")}}])],
        "video: video 1 is not a video, or is truncated: Invalid data",
    ),
}


@pytest.mark.parametrize(("messages", "line"), BAD_CHATS.values(), ids=BAD_CHATS)
@pytest.mark.parametrize("stream", [False, True])
def test_a_bad_chat_gets_one_line_before_anything_is_streamed(served, messages, line, stream):
    answer = say(served, *messages, stream=stream)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"].startswith(line)
    assert "\n" not in answer.json()["error"]["message"]


def test_what_is_not_there_gets_one_line(served):
    for method, path, status in (
        ("GET", "/v1/nothing", 404),
        ("GET", "/v1/images/generations", 405),
    ):
        answer = httpx.request(method, f"{served.url}{path}")
        assert answer.status_code == status
        assert answer.json()["error"]["message"] in ("Not Found", "Method Not Allowed")


def test_a_form_of_another_page_is_refused(served):
    """A browser sends it to this machine from any page, and asks nobody."""
    body = {"content": b'{"prompt": "x"}', "headers": {"Content-Type": "text/plain"}}
    answer = httpx.post(f"{served.url}/v1/images/generations", **body)
    assert answer.status_code == 415
    line = "content-type: must be application/json, got 'text/plain'"
    assert answer.json()["error"]["message"] == line


@pytest.mark.parametrize("in_pieces", [False, True])
def test_a_body_beyond_the_limit_is_refused(in_pieces):
    """Also one that does not state its length."""
    body = b'{"prompt": "' + b"x" * 5000 + b'"}'
    with serving(body=4000) as served:
        content = iter([body[:3000], body[3000:]]) if in_pieces else body
        url = f"{served.url}/v1/images/generations"
        answer = httpx.post(url, content=content, headers=JSON)
        assert answer.status_code == 413
        assert answer.json()["error"]["message"] == "body: may have 4000 bytes, got more"


def test_a_token_is_needed_for_all_but_the_health(served):
    with serving(token="secret") as guarded:
        for header in ({}, {"Authorization": "Bearer other"}, {"Authorization": "Basic ???"}):
            answer = httpx.get(f"{guarded.url}/v1/models", headers=header)
            assert answer.status_code == 401
            assert answer.json()["error"]["type"] == "authentication_error"
        assert httpx.get(f"{guarded.url}/metrics").status_code == 401
        assert httpx.get(f"{guarded.url}/health").status_code == 200
        assert guarded.client(api_key="secret").models.list().data[0].id == NAME
        with pytest.raises(openai.AuthenticationError):
            guarded.client(api_key="wrong").models.list()
        browser = httpx.get(f"{guarded.url}/v1/models", auth=("anyone", "secret"))
        assert browser.status_code == 200


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


def moving(folder):
    """A video of a second."""
    frames = [torch.full((3, 16, 16), 20 * i, dtype=torch.uint8) for i in range(12)]
    write_video(folder / "x.mp4", frames, Fraction(12))
    url = data_url((folder / "x.mp4").read_bytes(), "video/mp4")
    return [{"type": "video_url", "video_url": {"url": url}}, {"type": "text", "text": "?"}]


def test_a_video_is_read_at_the_rate_asked_for(served, tmp_path):
    content = moving(tmp_path)
    every, some = (
        say(served, user(content), max_tokens=1, **rate).json()["usage"]["prompt_tokens"]
        for rate in ({}, {"fps": 4})
    )
    # Three frames of 8 rows of codes, or the four of a second in one.
    assert every - some == 2 * (8 * 9 + 1) + len("12 fps") - len("4 fps")


def test_a_video_beyond_the_limit_is_refused_and_one_for_images_alone(tmp_path):
    content = moving(tmp_path)
    for loaded, line in (
        (None, "video 1 may have 8 frames, got more: lower fps"),
        (tiny_loaded(temporal_factor=1), "video 1 must be an image: the vision tokenizer takes no"),
    ):
        with serving(loaded=loaded, frames=8) as served:
            answer = say(served, user(content))
        assert answer.status_code == 400
        assert answer.json()["error"]["message"].startswith(line)

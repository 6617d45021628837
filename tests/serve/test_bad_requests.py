"""Requests that a server refuses, each in one line."""

import json

import httpx
import openai
import pytest
from PIL import Image

from tests.serve.requests import data_url, say, shown, user
from tests.serve.tiny_server import NAME, serving


@pytest.fixture(scope="module")
def served():
    with serving() as one:
        yield one


JSON = {"Content-Type": "application/json; charset=utf-8"}
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

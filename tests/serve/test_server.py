"""The server as OpenAI's own client sees it."""

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
from tests.serve.requests import alone, data_url, draw, pixels, say, shown, user
from tests.serve.tiny_server import NAME, serving, tiny_loaded


@pytest.fixture(scope="module")
def served():
    with serving() as one:
        yield one


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

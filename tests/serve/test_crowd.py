"""Many clients at once, some of whom leave: nothing is lost, and nothing is another's."""

import asyncio
import io
import json
import random
from base64 import b64decode

import httpx
import numpy as np
import pytest
from PIL import Image

from emu3.generate import Sampling, generate_images, generate_text
from emu3.templates import SYSTEM, Turn, chat_prompt
from emu3.vision import postprocess
from tests.serve.tiny_server import serving

CLIENTS, REQUESTS = 16, 200
SIZES = [(4, 4), (3, 6), (6, 2), (5, 5), (2, 7)]


def requests():
    """Images of five grids and three settings, and answers; a fifth of the clients leave."""
    choose = random.Random(0)
    for number in range(REQUESTS):
        body = {"seed": number}
        if number % 8 == 7:
            path = "/v1/chat/completions"
            body |= {"max_tokens": 12, "messages": [{"role": "user", "content": f"tell {number}"}]}
        else:
            path, (height, width) = "/v1/images/generations", choose.choice(SIZES)
            body |= {"prompt": f"number {number}", "size": f"{2 * width}x{2 * height}"}
            body |= {"guidance": choose.choice([1.0, 3.0]), "top_k": choose.choice([20, None])}
        body["stream"] = number % 3 == 0
        leaves_after = choose.uniform(0.001, 0.3) if choose.random() < 0.2 else None
        yield path, body, leaves_after


async def ask(client, path, body, leaves_after):
    """The response, or None for a client that left."""
    try:
        answer = await asyncio.wait_for(client.post(path, json=body), leaves_after)
    except asyncio.TimeoutError:
        return None
    assert answer.status_code == 200, answer.text
    return answer


async def all_at_once(url):
    work, answers = list(requests()), {}
    left = list(enumerate(work))[::-1]

    async def one_client():
        async with httpx.AsyncClient(base_url=url, timeout=120) as client:
            while left:
                number, request = left.pop()
                answers[number] = await ask(client, *request)

    await asyncio.gather(*(one_client() for _ in range(CLIENTS)))
    return work, answers


@pytest.mark.e2e
def test_200_requests_of_16_clients_are_answered_each_as_alone():
    with serving(batch=12, queue=CLIENTS) as served:
        work, answers = asyncio.run(all_at_once(served.url))
        engine = served.service.engine
        forwards, rows = engine.forwards, engine.rows
        stayed = [number for number, (_, _, leaves) in enumerate(work) if leaves is None]
        assert len(stayed) > 140
        for number, answer in answers.items():
            assert answer is not None or number not in stayed
            if answer is not None:
                check(served.loaded, *work[number][:2], answer)
        assert rows > 4 * forwards  # they did share
        assert (engine.running, engine.waiting, engine.batch.free_rows) == (0, 0, 12)


def check(loaded, path, body, answer):
    if "messages" in body:
        said = body["messages"][0]["content"]
        prompt = chat_prompt([Turn([said])], loaded.text, SYSTEM)
        (expected,) = generate_text(loaded.model, loaded.text, [prompt], body["max_tokens"])
        got = "".join(pieces(answer)) if body["stream"] else message(answer)
        assert got.strip() == expected.strip()
        return
    width, height = (int(side) // 2 for side in body["size"].split("x"))
    how = Sampling(body["guidance"], body["top_k"])
    codes = generate_images(
        loaded.model, loaded.text, [body["prompt"]], (height, width), how, body["seed"]
    )
    data = events(answer)[-1] if body["stream"] else answer.json()["data"][0]
    got = np.array(Image.open(io.BytesIO(b64decode(data["b64_json"]))))
    assert np.array_equal(got, np.array(postprocess(loaded.vision.decode(codes))[0])), body


def message(answer):
    return answer.json()["choices"][0]["message"]["content"]


def events(answer):
    lines = [line for line in answer.text.splitlines() if line.startswith("data: {")]
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def pieces(answer):
    return [event["choices"][0]["delta"]["content"] for event in events(answer)]

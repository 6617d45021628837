"""The server as OpenAI's own client sees it."""

import io
from base64 import b64decode

import numpy as np
import pytest
from PIL import Image

from emu3.generate import Sampling, generate_images
from emu3.vision import postprocess
from tests.serve.tiny_server import NAME, serving

RED = Image.new("RGB", (16, 16), "red")


@pytest.fixture(scope="module")
def served():
    with serving() as one:
        yield one


def pixels(b64_json):
    return np.array(Image.open(io.BytesIO(b64decode(b64_json))))


def alone(loaded, prompt, grid, seed, **how):
    codes = generate_images(loaded.model, loaded.text, [prompt], grid, Sampling(**how), seed)
    return np.array(postprocess(loaded.vision.decode(codes))[0])


def test_the_official_client_gets_the_images_of_its_seed(served):
    answer = served.client().images.generate(
        prompt="a red seven", model=NAME, n=2, size="12x8", extra_body={"seed": 5}
    )
    assert answer.size == "12x8"
    assert [one.seed for one in answer.data] == [5, 6]
    for one in answer.data:
        expected = alone(served.loaded, "a red seven", (4, 6), one.seed)
        assert np.array_equal(pixels(one.b64_json), expected)

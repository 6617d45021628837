"""Requests of the tests to a server, and what ``emu3 generate`` would answer."""

import io
from base64 import b64decode, b64encode

import httpx
import numpy as np
from PIL import Image

from emu3.generate import Sampling, generate_images
from emu3.vision import postprocess


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

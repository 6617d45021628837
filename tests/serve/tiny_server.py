"""A server in this process, of a model of random weights that draws an image in milliseconds."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import uvicorn
from openai import OpenAI

from emu3.config import BYTE_VOCABULARY
from emu3.serve.app import app
from emu3.serve.service import Limits, Service
from emu3.text import ByteTokenizer
from emu3.vision import VisionTokenizer
from emu3.weights import Pretrained
from tests.model.tiny import TINY_VISION, tiny_model

NAME = "tiny"


def tiny_loaded(num_positions: int = 512, **vision) -> Pretrained:
    model = tiny_model(num_layers=1, max_position_embeddings=num_positions)
    vision = VisionTokenizer(TINY_VISION.model_copy(update=vision)).eval()
    torch.nn.init.normal_(vision.quantize.embedding.weight)
    return Pretrained(model, vision, ByteTokenizer(BYTE_VOCABULARY))


@dataclass
class Served:
    url: str
    service: Service
    loaded: Pretrained

    def client(self, **options) -> OpenAI:
        options = {"api_key": "none", "max_retries": 0} | options
        return OpenAI(base_url=f"{self.url}/v1", **options)


@contextmanager
def serving(
    token: str | None = None, loaded: Pretrained | None = None, name: str = NAME, **limits
) -> Iterator[Served]:
    loaded = loaded or tiny_loaded()
    service = Service(loaded, name, Limits(**limits))
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(app(service, token), log_config=None)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.005)
    try:
        yield Served(f"http://127.0.0.1:{listener.getsockname()[1]}", service, loaded)
    finally:
        server.should_exit = True
        thread.join()

"""An endpoint of OpenAI's form on this machine, which is overloaded, refuses, or dies as told."""

import base64
import io
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from PIL import Image


class FakeEndpoint:
    """Captions say how many images of what size came; ``plan`` has the status of each request."""

    def __init__(self) -> None:
        self.plan: dict[int, int] = {}
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.requests = 0
        self.finish = "stop"
        self.usage: dict[str, int] | None = {"prompt_tokens": 100, "completion_tokens": 10}
        self.lock = threading.Lock()
        self.url = ""

    def reply(self, body: dict[str, Any]) -> dict[str, Any]:
        sizes = []
        for part in body["messages"][-1]["content"]:
            if part["type"] == "image_url":
                head, image = part["image_url"]["url"].split(",")
                assert head == "data:image/jpeg;base64"
                sizes.append(_size(image))
            elif part["type"] == "video_url":
                head, *images = part["video_url"]["url"].split(",")
                assert head == "data:video/jpeg;base64"
                sizes += map(_size, images)
        words = f"{len(sizes)} images of {sizes[0][0]} x {sizes[0][1]}"
        message = {"role": "assistant", "content": words}
        choice = {"index": 0, "finish_reason": self.finish, "message": message}
        reply = {"id": "x", "object": "chat.completion", "choices": [choice]}
        return reply | ({"usage": self.usage} if self.usage else {})


def _size(image: str) -> tuple[int, int]:
    return Image.open(io.BytesIO(base64.b64decode(image))).size


@contextmanager
def fake_endpoint() -> Iterator[FakeEndpoint]:
    fake = FakeEndpoint()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with fake.lock:
                fake.requests += 1
                status = fake.plan.get(fake.requests, 200)
                if status == 200:
                    fake.bodies.append(body)
                fake.keys.append(self.headers["Authorization"])
            content = json.dumps(fake.reply(body)).encode() if status == 200 else b"told so"
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    fake.url = f"http://127.0.0.1:{server.server_port}/v1"
    try:
        yield fake
    finally:
        server.shutdown()
        thread.join()
        server.server_close()

"""An endpoint of OpenAI's form, asked for captions: retries, errors and costs."""

import base64
import json
import random
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from http.client import HTTPException
from io import BytesIO
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from PIL import Image
from torch import Tensor

from emu3.tools.curate.settings import CaptionSettings

_OVERLOADED = 429, 500, 502, 503, 504
_OF_ALL_REQUESTS = 401, 403, 404, 405
_SLOWEST = 60.0
"""Seconds between two attempts, at most."""
_MILLION = 1e6
_LIMIT = 20
"""Requests that fail in a row, after all their attempts, before the run ends."""


class EndpointError(OSError):
    """Every request would fail: the run ends."""


@dataclass(frozen=True)
class Clocking:
    """Where the frames of a clip are in their video, for vLLM."""

    fps: float
    frames: Sequence[int]
    count: int


@dataclass(frozen=True)
class Reply:
    """A caption and what it cost, or why there is none."""

    caption: str | None
    cost: float = 0.0
    prompt_cost: float = 0.0
    error: str | None = None


class Endpoint:
    """Asks for captions, from many threads, within a budget.

    Args:
        url: of the API, such as ``http://localhost:8000/v1``.
        key: sent as a bearer token; None sends none.
        budget: what this process may spend; None does not count.
        dearest_prompt: cost of the most expensive prompt so far, 0 if there was none: the first
            prompt of all may exceed the budget.
    """

    def __init__(
        self,
        url: str,
        model: str,
        settings: CaptionSettings,
        *,
        key: str | None = None,
        budget: float | None = None,
        dearest_prompt: float = 0.0,
    ) -> None:
        self._url, self._model, self._how = f"{url.rstrip('/')}/chat/completions", model, settings
        self._key = key
        self._left, self._reserved, self._under_way = budget, 0.0, 0
        self._dearest_prompt = dearest_prompt
        self._lock = threading.Lock()
        self._failed = 0
        self.is_spent = False
        """Whether a request was refused for its costs."""

    def ask(self, images: Sequence[Tensor], clocking: Clocking | None = None) -> Reply | None:
        """The caption of an image, or of frames ``[3, H, W]`` uint8; None if it may cost too much.

        Raises:
            EndpointError: the endpoint does not answer, or refuses the key, the model or the path.
        """
        reserved = self._reserve()
        if reserved is None:
            return None
        cost = 0.0
        try:
            found = self._send(self._body(images, clocking))
            if isinstance(found, Reply):
                return found
            prompt, generated = self._costs(found.get("usage"))
            cost = prompt + generated
            return Reply(cost=cost, prompt_cost=prompt, **_caption(found))
        finally:
            self._settle(reserved, cost)

    def _reserve(self) -> float | None:
        """Before a request: the most that it may cost, as far as known; None if that is too much.

        Until the price of a prompt is known, one request is under way at a time.
        """
        if self._left is None:
            return 0.0
        while True:
            with self._lock:
                most = self._dearest_prompt + self._how.max_tokens * self._how.price_out / _MILLION
                is_known = self._dearest_prompt or not self._how.price_in
                fits = most <= self._left - self._reserved
                if not (fits or self._under_way):
                    self.is_spent = True
                    return None
                if fits and (is_known or not self._under_way):
                    self._reserved += most
                    self._under_way += 1
                    return most
            time.sleep(0.01)

    def _settle(self, reserved: float, cost: float) -> None:
        if self._left is not None:
            with self._lock:
                self._reserved -= reserved
                self._under_way -= 1
                self._left -= cost

    def _costs(self, usage: Any) -> tuple[float, float]:
        """Of the prompt and of the caption."""
        if not isinstance(usage, dict):
            if self._left is not None:
                raise EndpointError(
                    f"curate: {self._url} states no usage, so that caption.max_cost cannot be kept"
                )
            return 0.0, 0.0
        prompt = usage.get("prompt_tokens", 0) * self._how.price_in / _MILLION
        self._dearest_prompt = max(self._dearest_prompt, prompt)
        return prompt, usage.get("completion_tokens", 0) * self._how.price_out / _MILLION

    def _send(self, body: bytes) -> "dict[str, Any] | Reply":
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        for attempt in range(1, self._how.attempts + 1):
            wait = min(_SLOWEST, self._how.backoff * 2 ** (attempt - 1) * random.uniform(0.5, 1.5))
            try:
                with urlopen(Request(self._url, body, headers), timeout=self._how.timeout) as reply:
                    found = json.load(reply)
                self._failed = 0
                return found
            except HTTPError as error:
                line = f"{self._url} answers {error.code}: {_told(error)}"
                if error.code in _OF_ALL_REQUESTS:
                    raise EndpointError(f"curate: {line}") from None
                if error.code not in _OVERLOADED:
                    return Reply(None, error=line)
                wait = max(wait, _retry_after(error))
            except (URLError, HTTPException, OSError, ValueError) as error:
                line = f"{self._url}: {getattr(error, 'reason', None) or repr(error)}"
            if attempt < self._how.attempts:
                time.sleep(wait)
        self._failed += 1
        if self._failed >= _LIMIT:
            raise EndpointError(f"curate: {line}; {_LIMIT} requests in a row failed")
        return Reply(None, error=line)

    def _body(self, images: Sequence[Tensor], clocking: Clocking | None) -> bytes:
        how = self._how
        pictures = [_jpeg(image, how.long_edge) for image in images]
        body: dict[str, Any] = {
            "model": self._model,
            "max_tokens": how.max_tokens,
            "temperature": how.temperature,
        }
        if clocking is not None and how.video_part == "video":
            url = "data:video/jpeg;base64," + ",".join(pictures)
            parts = [{"type": "video_url", "video_url": {"url": url}}]
            video = {
                "fps": clocking.fps,
                "frames_indices": list(clocking.frames),
                "total_num_frames": clocking.count,
                "duration": clocking.count / clocking.fps,
            }
            body["media_io_kwargs"] = {"video": video}
        else:
            urls = [f"data:image/jpeg;base64,{picture}" for picture in pictures]
            parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
        content = [*parts, {"type": "text", "text": how.prompt}]
        return json.dumps(body | {"messages": [{"role": "user", "content": content}]}).encode()


def _caption(found: dict[str, Any]) -> dict[str, str | None]:
    try:
        choice = found["choices"][0]
        words = (choice["message"]["content"] or "").strip()
    except (LookupError, TypeError, AttributeError):
        return {"caption": None, "error": f"no caption in the reply {str(found)[:120]}"}
    if choice.get("finish_reason") == "length":
        return {"caption": None, "error": "the caption is cut off: raise caption.max_tokens"}
    return {"caption": words or None, "error": None if words else "the caption is empty"}


def _told(error: HTTPError) -> str:
    return " ".join(error.read(300).decode(errors="replace").split()) or error.reason


def _retry_after(error: HTTPError) -> float:
    try:
        return min(_SLOWEST, float(error.headers.get("Retry-After", 0)))
    except ValueError:
        # A date; the back-off is waited for.
        return 0.0


def _jpeg(image: Tensor, long_edge: int) -> str:
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    picture.thumbnail((long_edge, long_edge), Image.Resampling.BICUBIC)
    file = BytesIO()
    picture.save(file, "JPEG", quality=90)
    return base64.b64encode(file.getvalue()).decode()

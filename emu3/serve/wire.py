"""Events of the service in the form of OpenAI's responses."""

import io
import json
import time
import uuid
from asyncio import to_thread
from base64 import b64encode
from collections.abc import AsyncIterator, Mapping
from typing import Any

from fastapi.responses import JSONResponse
from PIL import Image

from emu3.serve.jobs import ChatJob, ImageJob
from emu3.serve.requests import ChatRequest, ImageEvent

_KINDS = {401: "authentication_error", 429: "rate_limit_error"}
_IMAGE = {"background": "opaque", "output_format": "png", "quality": "high"}


def error_response(
    status: int, line: str, headers: Mapping[str, str] | None = None
) -> JSONResponse:
    return JSONResponse({"error": _error(status, line)}, status, headers)


def _error(status: int, line: str) -> dict[str, Any]:
    kind = _KINDS.get(status, "invalid_request_error" if status < 500 else "server_error")
    line = " ".join(line.split())
    return {"message": line, "type": kind, "param": None, "code": str(status)}


def sse(data: Mapping[str, Any] | str, event: str | None = None) -> str:
    """A server-sent event."""
    body = data if isinstance(data, str) else json.dumps(data)
    return f"event: {event}\ndata: {body}\n\n" if event else f"data: {body}\n\n"


async def image_response(job: ImageJob) -> dict[str, Any]:
    images: dict[int, dict[str, Any]] = {}
    size = ""
    async for event in job:
        size = _size(event.image)
        images[event.index] = {"b64_json": await _png(event.image), "seed": event.seed}
    data = [images[index] for index in sorted(images)]
    return {"created": int(time.time()), "data": data, "size": size, "usage": _usage(job)} | _IMAGE


async def image_stream(job: ImageJob) -> AsyncIterator[str]:
    async for event in job:
        yield await _image_event(job, event)


async def _image_event(job: ImageJob, event: ImageEvent) -> str:
    kind = "image_generation.completed"
    data = _IMAGE | {"index": event.index, "seed": event.seed, "size": _size(event.image)}
    if event.preview is not None:
        kind = "image_generation.partial_image"
        data["partial_image_index"] = event.preview
    else:
        data["usage"] = _usage(job, 1)
    data |= {"type": kind, "created_at": int(time.time()), "b64_json": await _png(event.image)}
    return sse(data, kind)


async def chat_response(job: ChatJob, name: str) -> dict[str, Any]:
    words = ""
    async for event in job:
        words += event.text
    message = {"role": "assistant", "content": words.strip(), "refusal": None}
    choice = {
        "index": 0,
        "message": message,
        "finish_reason": event.finish_reason,
        "logprobs": None,
    }
    usage = _chat_usage(job, event.tokens)
    return _chat_head(name) | {"object": "chat.completion", "choices": [choice], "usage": usage}


async def chat_stream(job: ChatJob, name: str, request: ChatRequest) -> AsyncIterator[str]:
    head = _chat_head(name) | {"object": "chat.completion.chunk"}
    wants_usage = request.stream_options is not None and request.stream_options.include_usage

    def chunk(delta: Mapping[str, Any], reason: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": reason, "logprobs": None}
        return sse(head | {"choices": [choice]} | ({"usage": None} if wants_usage else {}))

    yield chunk({"role": "assistant", "content": ""})
    async for event in job:
        yield chunk({"content": event.text}, event.finish_reason)
    if wants_usage:
        yield sse(head | {"choices": [], "usage": _chat_usage(job, event.tokens)})
    yield sse("[DONE]")


def stream_error(status: int, line: str) -> str:
    return sse({"error": _error(status, line)}, "error")


def _chat_head(name: str) -> dict[str, Any]:
    return {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": name}


def _chat_usage(job: ChatJob, tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": job.prompt_tokens,
        "completion_tokens": tokens,
        "total_tokens": job.prompt_tokens + tokens,
    }


def _usage(job: ImageJob, count: int | None = None) -> dict[str, Any]:
    generation = job.generations[0]
    given = len(generation.prompts[0])
    made = generation.length * (len(job.generations) if count is None else count)
    details = {"text_tokens": given, "image_tokens": 0}
    return {
        "input_tokens": given,
        "input_tokens_details": details,
        "output_tokens": made,
        "total_tokens": given + made,
    }


def _size(image: Image.Image) -> str:
    return f"{image.width}x{image.height}"


async def _png(image: Image.Image) -> str:
    """In base64."""

    def encode() -> str:
        file = io.BytesIO()
        image.save(file, format="PNG")
        return b64encode(file.getvalue()).decode()

    return await to_thread(encode)

"""The HTTP routes: OpenAI's images and chat, health and metrics; an error is one line."""

import asyncio
import json
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from emu3.serve import wire
from emu3.serve.engine import BusyError, DrainingError, Job
from emu3.serve.guard import Guard
from emu3.serve.metrics import Metrics, Observer
from emu3.serve.requests import ChatRequest, ImageRequest
from emu3.serve.service import NotFoundError, Service
from emu3.settings import parse

_STATUS = {BusyError: 429, DrainingError: 503, NotFoundError: 404, ValueError: 400}
_CLIENT_LEFT = 499


def app(service: Service, token: str | None = None) -> FastAPI:
    """The application of ``service``, whose engine runs as long as the application does.

    Args:
        service: generates.
        token: what every route but ``/health`` needs, those that are mounted too; None needs none.
    """
    metrics = Metrics(service.engine)

    @asynccontextmanager
    async def engine(_: FastAPI) -> AsyncIterator[None]:
        with service:
            yield

    web = FastAPI(title="emu3", lifespan=engine, docs_url=None, redoc_url=None, openapi_url=None)
    web.add_middleware(Guard, token=token, max_body=service.limits.body)
    web.add_middleware(Observer, metrics=metrics)
    for kind, status in _STATUS.items():
        web.add_exception_handler(kind, _teller(status))
    web.add_exception_handler(HTTPException, _tell_http)
    web.add_exception_handler(Exception, _teller(500))

    _add_generation(web, service)
    _add_state(web, service, metrics)
    return web


def _add_generation(web: FastAPI, service: Service) -> None:
    @web.post("/v1/images/generations", response_model=None)
    async def images(request: Request) -> Response:
        asked = parse(ImageRequest, await _json(request))
        job = await service.images(asked)
        if asked.stream:
            return _Stream(job, wire.image_stream(job))
        return await _answer(request, job, wire.image_response(job))

    @web.post("/v1/chat/completions", response_model=None)
    async def chat(request: Request) -> Response:
        asked = parse(ChatRequest, await _json(request))
        job = await service.chat(asked)
        if asked.stream:
            return _Stream(job, wire.chat_stream(job, service.name, asked))
        return await _answer(request, job, wire.chat_response(job, service.name))


def _add_state(web: FastAPI, service: Service, metrics: Metrics) -> None:
    model = {"id": service.name, "object": "model", "created": 0, "owned_by": "emu3"}

    @web.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model]}

    @web.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        service.check_model(name)
        return model

    @web.get("/health")
    async def health() -> JSONResponse:
        status = "draining" if service.engine.stopping else "ok"
        return JSONResponse({"status": status}, 200 if status == "ok" else 503)

    @web.get("/metrics")
    async def show_metrics() -> Response:
        return PlainTextResponse(metrics.text(), media_type="text/plain; version=0.0.4")


class _Stream(StreamingResponse):
    """Server-sent events of a job, which is cancelled if the client leaves."""

    def __init__(self, job: Job, events: AsyncIterator[str]) -> None:
        super().__init__(_with_errors(events), media_type="text/event-stream")
        self.job = job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self.job:
            await super().__call__(scope, receive, send)


async def _with_errors(events: AsyncIterator[str]) -> AsyncIterator[str]:
    """The status has been sent: an error is the last event."""
    try:
        async for event in events:
            yield event
    except Exception as error:
        yield wire.stream_error(_status_of(error), _line_of(error))


async def _answer(
    request: Request, job: Job, response: Coroutine[Any, Any, dict[str, Any]]
) -> Response:
    """Wait for the whole response, or for the client to leave."""
    async with job:
        work, left = asyncio.create_task(response), asyncio.create_task(_left(request))
        try:
            await asyncio.wait((work, left), return_when=asyncio.FIRST_COMPLETED)
            return JSONResponse(work.result()) if work.done() else Response(None, _CLIENT_LEFT)
        finally:
            work.cancel()
            left.cancel()


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _json(request: Request) -> dict[str, Any]:
    """The body; another type of it is what a browser may send from any page without asking."""
    kind = request.headers.get("content-type", "")
    if kind.partition(";")[0].strip().lower() != "application/json":
        raise HTTPException(415, f"content-type: must be application/json, got {kind[:40]!r}")
    body = await request.body()
    try:
        tree = json.loads(body)
    except (ValueError, RecursionError):
        raise ValueError("body: must be JSON") from None
    if not isinstance(tree, dict):
        raise ValueError(f"body: must be a JSON object, got {type(tree).__name__}")
    return tree


def _teller(status: int) -> Any:
    async def tell(_: Request, error: Exception) -> Response:
        headers = {"Retry-After": "1"} if status in (429, 503) else None
        return wire.error_response(status, _line_of(error), headers)

    return tell


async def _tell_http(_: Request, error: HTTPException) -> Response:
    return wire.error_response(error.status_code, str(error.detail), error.headers)


def _status_of(error: Exception) -> int:
    return next((status for kind, status in _STATUS.items() if isinstance(error, kind)), 500)


def _line_of(error: Exception) -> str:
    """What is not the client's fault is told in the log alone."""
    return "the server failed" if _status_of(error) == 500 else str(error)

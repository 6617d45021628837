"""The server as a process: where it listens, and how SIGTERM ends it."""

import ipaddress
import logging
from types import FrameType

import uvicorn
from fastapi import FastAPI

from emu3.serve.service import Service

_LAST_BYTES = 10
"""Seconds that connections have for what was generated, after the last generation."""


def check_host(host: str, token: str | None) -> None:
    """Raise unless ``host`` is this machine alone, or there is a token."""
    try:
        loopback = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = False
    if not (loopback or token):
        raise ValueError(f"--host: beyond this machine a --token must be given, got {host}")


def run(web: FastAPI, service: Service, host: str, port: int) -> None:
    """Serve until SIGTERM or Ctrl-C, and then until what was accepted is done."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s")
    config = uvicorn.Config(
        web, host=host, port=port, log_config=None, timeout_graceful_shutdown=_LAST_BYTES
    )
    _Server(config, service).run()


class _Server(uvicorn.Server):
    """Listens until the engine is done, to answer 503; a second signal ends it at once."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self.engine = service.engine

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.engine.stopping:
            self.engine.abort()
            self.should_exit = self.force_exit = True
        self.engine.drain()

    async def on_tick(self, counter: int) -> bool:
        if self.engine.stopping and not self.engine.is_alive:
            self.should_exit = True
        return await super().on_tick(counter)

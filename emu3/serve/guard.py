"""What a request must pass before any route: the token, and the limit on its body."""

import secrets
from base64 import b64decode

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from emu3.serve.wire import error_response

OPEN = "/health"
"""The route that takes no token."""


class Guard:
    """ASGI middleware.

    A token comes as ``Authorization: Bearer``, or as the password of a browser's log-in.
    """

    def __init__(self, app: ASGIApp, token: str | None, max_body: int) -> None:
        self.app, self.token, self.max_body = app, token, max_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        if self.token is not None and scope["path"] != OPEN and not self._has_token(headers):
            told = {"WWW-Authenticate": 'Basic realm="emu3"'}
            refused = error_response(401, "authorization: must be Bearer and the token", told)
            await refused(scope, receive, send)
            return
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > self.max_body:
            await self._too_large(scope, receive, send)
            return
        await self._limited(scope, receive, send)

    def _has_token(self, headers: dict[bytes, bytes]) -> bool:
        kind, _, given = headers.get(b"authorization", b"").partition(b" ")
        if kind.lower() == b"basic":
            try:
                given = b64decode(given).partition(b":")[2]
            except ValueError:
                return False
        elif kind.lower() != b"bearer":
            return False
        return secrets.compare_digest(given.strip(), (self.token or "").encode())

    async def _limited(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Count a body that comes in pieces and states no length."""
        left, started = self.max_body, False

        async def counted() -> Message:
            nonlocal left
            message = await receive()
            left -= len(message.get("body", b""))
            if left < 0:
                raise _TooLargeError
            return message

        async def noted(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self.app(scope, counted, noted)
        except _TooLargeError:
            if not started:
                await self._too_large(scope, receive, send)

    async def _too_large(self, scope: Scope, receive: Receive, send: Send) -> None:
        line = f"body: may have {self.max_body} bytes, got more"
        await error_response(413, line)(scope, receive, send)


class _TooLargeError(Exception):
    pass

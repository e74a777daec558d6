"""Requests are turned away before they cost anything: as many as run and wait in the engine are read, and no more.

The engine refuses what does not fit into its queue, but by then a body was read, parsed, rendered and turned into
tokens. In a flood that is what the server would do all day. A request counts from the last byte of its body on: who
sends slowly, or never ends, takes nobody's place.
"""

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sessile.errors import LimitReached
from sessile.server.calls import Service
from sessile.server.replies import Surface, error_reply

GENERATING = frozenset({"/generate", "/v1/completions", "/v1/chat/completions", "/v1/messages", "/v1/responses"})
"""Paths whose requests wait for rows."""


class Admission:
    """ASGI middleware that answers 429 to one generating request more than the engine could take."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._service = service
        self._admitted = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] not in GENERATING:
            await self._app(scope, receive, send)
            return
        try:
            self._check_room()
        except LimitReached as refusal:
            reply = error_reply(Surface.of(scope["path"]), refusal, retry_after_s=self._service.retry_after_s)
            await reply(scope, receive, send)
            return
        is_admitted = False

        async def admitting_receive() -> Message:
            nonlocal is_admitted
            message = await receive()
            if not is_admitted and message["type"] == "http.request" and not message.get("more_body", False):
                self._check_room()  # Others may have come while this one was sent.
                is_admitted = True
                self._admitted += 1
            return message

        try:
            await self._app(scope, admitting_receive, send)
        finally:
            self._admitted -= is_admitted

    def _check_room(self) -> None:
        """Raise LimitReached if no more requests are read."""
        most = self._service.admitted_max
        if most is not None and self._admitted >= most:
            raise LimitReached(f"{most} requests are running or waiting, which is the limit: try again later")

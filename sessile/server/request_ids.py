"""A name for each HTTP request: the client's X-Request-Id or one of ours, in the reply and in every log line."""

import re
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sessile.server.logs import request_id

STRAIGHT = "sessile.straight"
"""Where a scope keeps the way to the client that passes by what looks at headers alone."""

ACCEPTED = re.compile(r"[A-Za-z0-9_.:@=+/-]{1,128}")
"""What a client may call its request; anything else gets a name of ours."""


class RequestIds:
    """ASGI middleware."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        name = given if ACCEPTED.fullmatch(given) else uuid.uuid4().hex

        async def send_named(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["x-request-id"] = name
            await send(message)

        scope[STRAIGHT] = send
        token = request_id.set(name)
        try:
            await self._app(scope, receive, send_named)
        finally:
            request_id.reset(token)


def straight(scope: Scope, send: Send) -> Send:
    """What sends the chunks of a body, once its headers went out by `send`: five layers look at each in vain."""
    way: Send = scope.get(STRAIGHT, send)
    return way

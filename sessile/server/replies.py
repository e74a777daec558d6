"""JSON replies, and errors in the shape that each of the four surfaces promises."""

import logging
from enum import Enum
from typing import Any

import orjson
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Match

from sessile.errors import HistoryMismatch, InvalidRequest, UserError
from sessile.server.link import refusal_error

log = logging.getLogger(__name__)

NOT_READY_RETRY_S = 1
"""Retry-After of a 503. A server that starts is asked often; one that stops is soon gone, and asking costs nothing."""
CLIENT_CLOSED_REQUEST = 499
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE")
"""Those that a route may take."""


RESOURCE_PARAMS = {
    "session_id": "id",
    "session_params.id": "id",
    "session_params.expect_tokens": "expect_tokens",
    "timeout": "idle_timeout_s",
}
"""Fields that the engine names as native requests do → their names in /v1/sessions."""


ANTHROPIC_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
"""Status → what Anthropic's clients know it as."""


class Surface(Enum):
    """Whose conventions a path follows."""

    NATIVE = "native"
    """SGLang's: {"error": {"message"}}; refusals by the engine that are the client's fault are 400."""
    ANTHROPIC = "anthropic"
    """{"type": "error", "error": {"type", "message"}}; statuses as with OpenAI's."""
    OPENAI = "openai"
    """{"error": {"message", "type", "param", "code"}}; the same statuses, but an unknown model is 404."""
    RESOURCES = "resources"
    """Sessions and corpora as resources: the same shape, statuses of its own (docs/HTTP.md); malformed is 422."""

    @classmethod
    def of(cls, path: str) -> "Surface":
        """The surface that a path belongs to."""
        if path.startswith("/v1/messages"):
            return cls.ANTHROPIC
        if path.startswith(("/v1/sessions", "/v1/corpora", "/v1/pool")):
            return cls.RESOURCES
        return cls.OPENAI if path.startswith("/v1/") else cls.NATIVE


class JsonReply(Response):
    """A JSON body; content is encoded by orjson, which knows numpy arrays and dataclasses."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY)


def engine_refusal(status: int, code: str, message: str, param: str | None = None) -> UserError:
    """A refusal by the engine as native and OpenAI clients know it: what the client did wrong is 400.

    But for a history that differs from what the client expects: 409, so that a lost reply can be told from a mistake.
    """
    is_mistake = status in (404, 409, 410, 413) and code != HistoryMismatch.code
    return refusal_error(400 if is_mistake else status, code, message, param)


def error_content(surface: Surface, error: UserError) -> dict[str, Any]:
    """The JSON of an error on a surface."""
    if surface is Surface.NATIVE:
        return {"error": {"message": error.message}}
    if surface is Surface.ANTHROPIC:
        kind = ANTHROPIC_KINDS.get(error.status, "api_error" if error.status >= 500 else "invalid_request_error")
        return {"type": "error", "error": {"type": kind, "message": error.message}}
    code = "context_length_exceeded" if surface is Surface.OPENAI and error.code == "too_long" else error.code
    kind = "server_error" if error.status >= 500 else "invalid_request_error"
    kind = "rate_limit_error" if error.status == 429 else kind
    param = error.param
    if surface is Surface.RESOURCES and param is not None:
        param = RESOURCE_PARAMS.get(param, param)
    return {"error": {"message": error.message, "type": kind, "param": param, "code": code}}


def error_reply(surface: Surface, error: UserError, *, retry_after_s: int = NOT_READY_RETRY_S) -> JsonReply:
    """The whole reply for an error. retry_after_s: what a client that met a limit is told to wait."""
    status = error.status
    if surface is Surface.RESOURCES and status == 400:
        status = 409 if error.code == "duplicate_session" else 422
    headers = {
        401: {"www-authenticate": "Bearer"},
        429: {"retry-after": str(retry_after_s)},
        503: {"retry-after": str(NOT_READY_RETRY_S)},
    }
    return JsonReply(error_content(surface, error), status, headers=headers.get(status))


def _methods_of_path(request: Request) -> list[str]:
    """The methods of all routes of the application that answer the request's path."""
    # Asked for one by one: a route that is included with others does not say which it takes.
    return [
        method
        for method in METHODS
        if any(route.matches({**request.scope, "method": method})[0] is Match.FULL for route in request.app.routes)
    ]


def add_error_replies(app: FastAPI) -> None:
    """Make every error that leaves a route a JSON reply of the route's surface."""

    async def user_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, UserError)
        path = request.scope["path"]
        log.debug(
            "refused",
            extra={"method": request.method, "path": path, "status": error.status, "error": error.message},
        )
        return error_reply(Surface.of(path), error, retry_after_s=request.app.state.service.retry_after_s)

    async def http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        path = request.scope["path"]
        code, message, headers = "invalid_request", error.detail, dict(error.headers or {})
        if error.status_code == 404:
            code, message = "not_found", f"no such route: {request.method} {path}"
        elif error.status_code == 405:
            # The framework names those of the first route alone, and one path may have several.
            allowed = _methods_of_path(request)
            headers["Allow"] = ", ".join(allowed)
            code, message = "method_not_allowed", f"{path} takes {' or '.join(allowed)}, not {request.method}"
        reply = error_reply(Surface.of(path), refusal_error(error.status_code, code, message))
        reply.headers.update(headers)
        return reply

    async def query_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        fault = error.errors()[0]
        param = str(fault["loc"][-1])
        message = fault["msg"].replace("String should", "must").replace("Input should", "must")
        return error_reply(Surface.of(request.scope["path"]), InvalidRequest(f"{param}: {message}", param=param))

    async def client_left(request: Request, error: Exception) -> Response:
        # While its body was read: nobody is there to read a reply, and nothing has gone wrong on our side.
        log.debug("disconnected", extra={"method": request.method, "path": request.url.path})
        return Response(status_code=CLIENT_CLOSED_REQUEST)

    async def bug(request: Request, error: Exception) -> Response:
        refusal = refusal_error(500, "internal_error", f"internal error: {type(error).__name__}; see the server's log")
        return error_reply(Surface.of(request.scope["path"]), refusal)

    app.add_exception_handler(UserError, user_error)
    app.add_exception_handler(HTTPException, http_error)
    app.add_exception_handler(RequestValidationError, query_error)
    app.add_exception_handler(ClientDisconnect, client_left)
    app.add_exception_handler(Exception, bug)

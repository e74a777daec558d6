"""Who may do what: every route needs a valid key but those listed here, where a keys file is in use.

The decision hangs on the route that was matched, never on the path as it was sent nor on a Host header. It is made
before the body is read. Without a keys file everybody is the operator; a page that some other site has put into the
operator's browser is not.
"""

import dataclasses
from typing import Annotated, Any
from urllib.parse import urlsplit

from fastapi import Depends
from starlette.requests import Request

from sessile.errors import Forbidden, NotFound, Unauthenticated
from sessile.server.keys import OPERATOR, Caller, KeyRing

OPEN_ROUTES = frozenset({"/health", "/health/live", "/health/ready"})
"""Probes of load balancers and orchestrators carry no keys; what they learn is whether the server works."""

ADMIN_ROUTES = frozenset({"/flush_cache", "/get_server_info", "/metrics", "/v1/pool"})
"""What acts on, or shows, what all tenants have together."""


async def authenticate(request: Request) -> Caller:
    """Whom the request's key stands for. Raises Unauthenticated, or Forbidden on a route for administrators."""
    service = request.app.state.service
    _refuse_foreign_pages(request, service.origins)
    ring: KeyRing | None = service.key_ring
    route: Any = request.scope["route"]
    is_apart = _is_apart(request, service.options.admin_port)
    if is_apart and route.path in ADMIN_ROUTES:
        raise NotFound(f"no such route: {request.method} {route.path}")
    if ring is None:
        return dataclasses.replace(OPERATOR, is_admin=not is_apart)
    if route.path in OPEN_ROUTES:
        return Caller("", is_admin=False)
    caller = ring.caller_with(_bearer(request))
    if caller is None:
        raise Unauthenticated("the key is not valid; send one that is in this server's keys file")
    if is_apart:
        return dataclasses.replace(caller, is_admin=False)
    if route.path in ADMIN_ROUTES:
        require_admin(caller, f"{request.method} {route.path}")
    return caller


Asking = Annotated[Caller, Depends(authenticate)]
"""A parameter of a route: who sends the request."""


def _is_apart(request: Request, admin_port: int | None) -> bool:
    """Whether administration has a port of its own, and this is not it: by the socket, not by what a client says."""
    place = request.scope["server"]  # none for a unix socket
    return admin_port is not None and (place is None or place[1] != admin_port)


def require_admin(caller: Caller, what: str) -> None:
    """Raise Forbidden unless the caller's key has the role."""
    if not caller.is_admin:
        raise Forbidden(f"{what} needs a key with the role admin, at the port of administration if there is one")


def _refuse_foreign_pages(request: Request, origins: frozenset[str]) -> None:
    """Raise Forbidden for what a browser sends on behalf of another site: it may post, though it cannot read."""
    origin = request.headers.get("origin")
    if origin is None or origin in origins:
        return
    parts = urlsplit(origin)
    if origin == "null" or (parts.scheme in ("http", "https") and parts.netloc != request.headers.get("host")):
        raise Forbidden("pages of other sites may not send requests to this server")


def _bearer(request: Request) -> str:
    """The key of the request: as OpenAI's clients send it, or as Anthropic's do."""
    own = request.headers.get("x-api-key", "").strip()
    if own and "authorization" not in request.headers:
        return own
    scheme, _, key = request.headers.get("authorization", "").strip().partition(" ")
    if scheme.lower() != "bearer" or not key.strip():
        raise Unauthenticated("a key is required: send the header Authorization: Bearer KEY, or x-api-key: KEY")
    return key.strip()

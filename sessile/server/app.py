"""The ASGI application: which module answers which path."""

from collections.abc import Mapping
from typing import Any

from fastapi import Depends, FastAPI
from starlette.middleware.cors import CORSMiddleware

from sessile import __version__
from sessile.server import generate, openai, operations, sessions
from sessile.server.admission import Admission
from sessile.server.anthropic import routes as anthropic
from sessile.server.auth import authenticate
from sessile.server.body import BodyLimit
from sessile.server.calls import Service
from sessile.server.config import ServerOptions
from sessile.server.corpora import routes as corpora_routes
from sessile.server.corpora.store import CorpusStore
from sessile.server.described import DescribedApp
from sessile.server.keys import KeyRing
from sessile.server.link import EngineLink
from sessile.server.listening import allowed_origins
from sessile.server.replies import add_error_replies
from sessile.server.request_ids import RequestIds
from sessile.server.responses import routes as responses
from sessile.server.supervision import Supervisor
from sessile.server.tracing import TraceContext, Tracing
from sessile.text.tokenizer import Tokenizer


def create_app(
    link: EngineLink,
    tokenizer: Tokenizer,
    options: ServerOptions,
    *,
    settings: Mapping[str, Any] | None = None,
    key_ring: KeyRing | None = None,
    corpora: CorpusStore | None = None,
    supervisor: Supervisor | None = None,
    tracing: Tracing | None = None,
) -> FastAPI:
    """The application over a link to an engine; `app.state.service` is the Service that its routes share.

    settings: all settings of the deployment by section, to be shown by /get_server_info. key_ring: the keys that are
    accepted; None: none is needed. corpora: where they are kept; None: they are answered with 503. supervisor: of the
    engine; None: nobody replaces it. tracing: None: nothing is traced. All four stay the caller's.
    """
    service = Service(link, tokenizer, options, settings or {}, key_ring, corpora, supervisor, tracing)
    app = DescribedApp(title="Sessile", version=__version__, dependencies=[Depends(authenticate)])
    app.state.service = service
    app.add_middleware(Admission, service=service)
    app.add_middleware(BodyLimit, bytes_max=options.body_bytes_max, is_streamed=corpora_routes.is_upload)
    for module in (generate, openai, responses, anthropic, sessions, corpora_routes, operations):
        surface = module.__name__.removeprefix("sessile.server.").removesuffix(".routes")
        app.include_router(module.routes(service), tags=[surface])
    add_error_replies(app)
    if options.otlp_endpoint is not None:
        app.add_middleware(TraceContext)
    app.add_middleware(RequestIds)
    if origins := allowed_origins(options):
        # Outermost: a browser asks before it sends a key, and reads refusals as well.
        app.add_middleware(
            CORSMiddleware,
            allow_origins=sorted(origins),
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["authorization", "content-type", "x-request-id"],
            expose_headers=["retry-after", "x-request-id"],
        )
    return app

"""The ASGI application: which module answers which path."""

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI

from sessile import __version__
from sessile.server import generate, openai, operations, sessions
from sessile.server.body import BodyLimit
from sessile.server.calls import Service
from sessile.server.config import ServerOptions
from sessile.server.link import EngineLink
from sessile.server.replies import add_error_replies
from sessile.text.tokenizer import Tokenizer


def create_app(
    link: EngineLink, tokenizer: Tokenizer, options: ServerOptions, *, settings: Mapping[str, Any] | None = None
) -> FastAPI:
    """The application over a link to an engine; `app.state.service` is the Service that its routes share.

    settings: all settings of the deployment by section, to be shown by /get_server_info. The link stays the caller's.
    """
    service = Service(link, tokenizer, options, settings or {})
    app = FastAPI(title="Sessile", version=__version__)
    app.state.service = service
    app.add_middleware(BodyLimit, bytes_max=options.body_bytes_max)
    for module in (generate, openai, sessions, operations):
        app.include_router(module.routes(service))
    add_error_replies(app)
    return app

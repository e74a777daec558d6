"""What /openapi.json says of replies is what is replied."""

from typing import Any

import jsonschema_rs
import pytest

from sessile.server.app import create_app
from sessile.server.config import ServerOptions
from sessile.server.described import ACCEPTED, FAILURES, JSON_ANSWERS, STREAMS, TEXTS
from tests.http.conftest import Running

PATHS = create_app(NotImplemented, NotImplemented, ServerOptions()).openapi()["paths"]
EMPTY = {
    "POST /close_session", "POST /abort_request", "GET /health", "GET /health/ready", "GET /health/live",
    "GET /health_generate",
}  # fmt: skip
"""Routes whose status says it all."""
ASK = [{"role": "user", "content": "hi"}]
REQUESTS = [
    ("POST", "/generate", {"text": "a"}),
    ("POST", "/generate", {"text": "a", "sampling_params": {"n": 2}}),
    ("POST", "/open_session", {"capacity_of_str_len": 1}),
    ("GET", "/get_model_info", None),
    ("GET", "/get_server_info", None),
    ("POST", "/tokenize", {"prompt": "a"}),
    ("POST", "/detokenize", {"tokens": [97]}),
    ("POST", "/flush_cache", None),
    ("GET", "/v1/models", None),
    ("GET", "/v1/models/echo", None),
    ("POST", "/v1/completions", {"prompt": ["a", "b"], "logprobs": 1}),
    ("POST", "/v1/chat/completions", {"messages": ASK, "logprobs": True}),
    ("POST", "/v1/responses", {"input": "hi"}),
    ("POST", "/v1/conversations", {}),
    ("POST", "/v1/messages", {"model": "default", "max_tokens": 4, "messages": ASK}),
    ("POST", "/v1/messages/count_tokens", {"model": "default", "messages": ASK}),
    ("POST", "/v1/sessions", {}),
    ("GET", "/v1/sessions", None),
    ("GET", "/v1/pool", None),
]
REFUSALS = [
    ("POST", "/generate", {"text": 1}, 400),
    ("POST", "/open_session", {}, 400),
    ("POST", "/v1/completions", {"prompt": []}, 400),
    ("POST", "/v1/messages", {"model": "default"}, 400),
    ("POST", "/v1/sessions", {"id": ""}, 422),
    ("GET", "/v1/sessions?limit=x", None, 422),
    ("GET", "/v1/responses/none?stream=x", None, 400),
    ("GET", "/v1/conversations/none", None, 404),
    ("POST", "/add_external_corpus", {"documents": 1}, 400),
]


def described(method: str, path: str, status: str) -> Any:
    """The schema of a route's JSON reply with a status."""
    for pattern, methods in PATHS.items():
        parts, named = path.partition("?")[0].split("/"), pattern.split("/")
        fits = len(parts) == len(named) and all(
            one == other or other.startswith("{") for one, other in zip(parts, named, strict=True)
        )
        if fits and method.lower() in methods:
            return methods[method.lower()]["responses"][status]["content"]["application/json"]["schema"]
    raise AssertionError(f"{method} {path} is not described")


def test_every_route_says_what_it_answers() -> None:
    routes = {f"{method.upper()} {path}" for path, methods in PATHS.items() for method in methods}
    assert routes == set(JSON_ANSWERS) | TEXTS | EMPTY
    assert routes >= STREAMS | ACCEPTED | FAILURES
    assert not set(JSON_ANSWERS) & (TEXTS | EMPTY)


@pytest.mark.parametrize(("method", "path", "body"), REQUESTS)
def test_a_success_has_the_shape_that_is_described(server: Running, method: str, path: str, body: Any) -> None:
    reply = server.client.request(method, path, json=body)
    assert reply.status_code == 200, reply.text
    jsonschema_rs.validate(described(method, path, "200"), reply.json())


@pytest.mark.parametrize(("method", "path", "body", "status"), REFUSALS)
def test_a_refusal_has_the_shape_that_is_described(
    server: Running, method: str, path: str, body: Any, status: int
) -> None:
    reply = server.client.request(method, path, json=body)
    assert reply.status_code == status, reply.text
    jsonschema_rs.validate(described(method, path, "4XX"), reply.json())


def test_what_is_described_is_refused_where_it_is_not_so() -> None:
    whole = described("POST", "/v1/completions", "200")
    assert not jsonschema_rs.is_valid(whole, {"id": "x", "object": "text_completion"})
    assert not jsonschema_rs.is_valid(described("POST", "/v1/completions", "4XX"), {"error": {"message": "x"}})

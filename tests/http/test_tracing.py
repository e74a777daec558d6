"""Spans of requests at a collector: in the caller's trace, with figures and without text, and never in the way."""

import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from tests.http.serving import PATIENCE_S, Deployment, deployed

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


class Collector:
    """Takes OTLP over HTTP and keeps all spans."""

    def __init__(self) -> None:
        self.spans: list[Any] = []
        spans = self.spans

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                content = self.rfile.read(int(self.headers["content-length"]))
                for resource in ExportTraceServiceRequest.FromString(content).resource_spans:
                    for scope in resource.scope_spans:
                        spans.extend(scope.spans)
                self.send_response(200)
                self.end_headers()

            def log_message(self, format: str, *arguments: object) -> None:
                """Say nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1/traces"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def collector() -> Iterator[Collector]:
    made = Collector()
    yield made
    made.close()


def generate(deployment: Deployment, **headers: str) -> None:
    body = {"text": "a secret", "sampling_params": {"max_new_tokens": 3}, "rid": "r-1"}
    reply = httpx.post(f"{deployment.url}/generate", json=body, headers=headers, timeout=PATIENCE_S)
    assert reply.status_code == 200


def end(deployment: Deployment) -> None:
    deployment.process.terminate()
    assert deployment.process.wait(PATIENCE_S) == 0


def test_a_request_is_a_span_in_its_callers_trace(tmp_path: Path, collector: Collector) -> None:
    with deployed(tmp_path, otlp_endpoint=collector.url) as deployment:
        generate(deployment, traceparent=f"00-{TRACE}-{PARENT}-01")
        end(deployment)
    (span,) = collector.spans
    assert (span.trace_id.hex(), span.parent_span_id.hex(), span.name) == (TRACE, PARENT, "generate")
    attributes = {each.key: each.value for each in span.attributes}
    assert attributes["sessile.rid"].string_value == "r-1"
    assert attributes["sessile.completion_tokens"].int_value == 3
    assert b"secret" not in span.SerializeToString(), "no text leaves"


@pytest.mark.parametrize("given", [{}, {"traceparent": "nonsense"}, {"traceparent": f"00-{'0' * 32}-{PARENT}-01"}])
def test_a_request_without_a_proper_trace_begins_one(
    tmp_path: Path, collector: Collector, given: dict[str, str]
) -> None:
    with deployed(tmp_path, otlp_endpoint=collector.url) as deployment:
        generate(deployment, **given)
        end(deployment)
    (span,) = collector.spans
    assert span.trace_id.hex() not in (TRACE, "0" * 32) and not span.parent_span_id


def test_a_collector_that_is_not_there_is_in_nobodys_way(tmp_path: Path) -> None:
    with deployed(tmp_path, otlp_endpoint="http://127.0.0.1:9/v1/traces") as deployment:
        started_s = time.monotonic()
        for _ in range(5):
            generate(deployment)
        assert time.monotonic() - started_s < 30
        end(deployment)

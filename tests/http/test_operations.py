"""Health, figures, cache, tokenizer: what operators and dashboards look at."""

import json
from collections.abc import Iterator

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.http.conftest import Running, running_server


@pytest.fixture
def impatient_server() -> Iterator[Running]:
    with running_server(health_timeout_s=0.2) as running:
        yield running


def samples(server: Running) -> dict[str, float]:
    """Every sample of /metrics by name; with several label sets, their sum."""
    figures: dict[str, float] = {}
    for family in text_string_to_metric_families(server.client.get("/metrics").text):
        for sample in family.samples:
            figures[sample.name] = figures.get(sample.name, 0) + sample.value
    return figures


def test_figures_may_be_had_without_peers_names(server: Running) -> None:
    everything = {family.name for family in text_string_to_metric_families(server.client.get("/metrics").text)}
    own = server.client.get("/metrics", params={"names": "sessile"})
    names = {family.name for family in text_string_to_metric_families(own.text)}
    assert names == {name for name in everything if name.startswith("sessile_")} < everything
    refused = server.client.get("/metrics", params={"names": "theirs"})
    assert refused.status_code == 400 and "names" in refused.json()["error"]["message"]


def test_health_asks_the_step_loop(server: Running) -> None:
    assert server.client.get("/health").status_code == 200
    assert [type(message).__name__ for message in server.engine.received] == ["GetStats"]


def test_h54_a_stuck_step_loop_is_not_healthy(impatient_server: Running) -> None:
    impatient_server.engine.hang()
    reply = impatient_server.client.get("/health")
    assert reply.status_code == 503
    assert "did not answer within 0.2 s" in reply.json()["error"]["message"]
    assert impatient_server.client.get("/health_generate").status_code == 503
    assert samples(impatient_server)["sessile_engine_up"] == 0
    impatient_server.engine.resume()
    impatient_server.wait_until(lambda: impatient_server.client.get("/health").status_code == 200)


def test_health_generate_runs_one_token_end_to_end(server: Running) -> None:
    assert server.client.get("/health_generate").status_code == 200
    (submit,) = server.engine.submits()
    assert submit.sampling.max_new_tokens == 1


def test_metrics_have_our_names_and_those_of_peers(server: Running) -> None:
    server.generate("hello")
    samples(server)  # a rate is of what happened since the last look
    server.generate("hello", stream=True)
    figures = samples(server)
    for name in (
        "sessile_pages", "sessile_requests_running", "sessile_time_to_first_token_seconds_count",
        "sglang:num_running_reqs", "sglang:token_usage", "sglang:time_to_first_token_seconds_count",
        "vllm:num_requests_running", "vllm:kv_cache_usage_perc", "vllm:e2e_request_latency_seconds_count",
        "vllm:request_success_total", "vllm:request_generation_tokens_count", "vllm:request_prompt_tokens_sum",
        "vllm:time_per_output_token_seconds_count", "sglang:max_total_num_tokens", "sglang:gen_throughput",
        "sglang:num_aborted_requests_total", "sessile_sessions", "sessile_forks_total", "sessile_rewinds_total",
        "sessile_turns_replayed_total", "sessile_reserved_pages", "sessile_reprefilled_tokens_total",
    ):  # fmt: skip
        assert name in figures
    assert figures["sessile_engine_up"] == 1


def test_latencies_count_requests_and_gaps_between_tokens(server: Running) -> None:
    before = samples(server)
    server.engine.token_interval_s = 0.02
    server.generate("hello")
    server.generate("hello", stream=True)
    after = samples(server)

    def grown(name: str) -> float:
        return after[name] - before[name]

    assert grown("sessile_request_seconds_count") == 2
    assert grown("sessile_time_to_first_token_seconds_count") == 2
    assert grown("sessile_inter_token_latency_seconds_count") == 2 * 5
    assert grown("sessile_inter_token_latency_seconds_sum") > 2 * 5 * 0.01, "a first token may come late"


def test_a_request_in_flight_shows_until_its_client_leaves(server: Running) -> None:
    server.engine.pause()
    with server.in_background(rid="shown"):
        assert samples(server)["sessile_requests_running"] == 1
        assert samples(server)["sessile_http_requests_in_flight"] == 1
        server.client.post("/abort_request", json={"rid": "shown"})
    assert samples(server)["sessile_requests_running"] == 0


def test_violations_are_counted_by_kind(server: Running) -> None:
    text = server.client.get("/metrics").text
    assert 'sessile_audit_violations_total{kind="pages",model_name="echo"} 1.0' in text
    assert {"sessile_audit_checks_total", "sessile_quarantined_pages_total"} <= set(samples(server))


def test_the_pool_names_requests_by_their_rid(server: Running) -> None:
    server.engine.pause()
    with server.in_background(rid="shown"):
        pool = server.client.get("/v1/pool").json()
        server.client.post("/abort_request", json={"rid": "shown"})
    assert [(holder["kind"], holder["rid"]) for holder in pool["holders"]] == [("request", "shown")]


def test_model_and_server_say_what_they_are(server: Running) -> None:
    model = server.client.get("/get_model_info").json()
    assert (model["model_path"], model["context_length"], model["is_generation"]) == ("/models/echo", 512, True)
    assert (model["device"], model["attention"]) == ("cpu", "numba")
    content = server.client.get("/get_server_info").json()
    assert content["settings"]["server"]["port"] == 30000
    assert content["engine"]["page_size"] == 16
    assert content["internal_states"][0]["pages_total"] == 64


def test_flush_is_refused_while_anything_runs(server: Running) -> None:
    assert server.client.post("/flush_cache").json() == {"success": True, "pages": 3}
    server.engine.pause()
    with server.in_background(rid="runs"):
        reply = server.client.post("/flush_cache")
        assert reply.status_code == 400
        server.engine.resume()


@pytest.mark.parametrize("text", ["hello", "", "héllo 😀", "x" * 50])
def test_detokenize_undoes_tokenize(server: Running, text: str) -> None:
    tokens = server.client.post("/tokenize", json={"prompt": text}).json()
    assert tokens["count"] == len(tokens["tokens"]) == len(text.encode())
    assert server.client.post("/detokenize", json={"tokens": tokens["tokens"]}).json() == {"text": text}


def test_special_tokens_are_skipped_unless_asked_for(server: Running) -> None:
    body = {"tokens": [104, 256]}
    assert server.client.post("/detokenize", json=body).json() == {"text": "h"}
    kept = server.client.post("/detokenize", json={**body, "skip_special_tokens": False})
    assert kept.json() == {"text": "h<eos>"}


def test_the_api_describes_itself(server: Running) -> None:
    paths = server.client.get("/openapi.json").json()["paths"]
    schema = json.dumps(paths["/generate"]["post"]["requestBody"])
    assert "max_new_tokens" in schema
    assert {"/v1/chat/completions", "/v1/sessions/{session}", "/open_session"} <= set(paths)


def test_a_draining_server_is_not_healthy_and_takes_no_work(server: Running) -> None:
    server.service.draining = True
    try:
        assert server.client.get("/health").status_code == 503
        reply = server.generate()
        assert reply.status_code == 503
        assert reply.headers["retry-after"] == "1"
        assert server.client.get("/metrics").status_code == 200
    finally:
        server.service.draining = False


@pytest.mark.parametrize("path", ["/health", "/nowhere", "/v1/sessions/none"])
def test_a_request_keeps_the_name_that_its_client_gave_it(server: Running, path: str) -> None:
    assert server.client.get(path, headers={"x-request-id": "a/b-1"}).headers["x-request-id"] == "a/b-1"


@pytest.mark.parametrize("given", [None, "", "a b", "x" * 129, "a\tb"])
def test_a_request_without_a_proper_name_gets_one(server: Running, given: str | None) -> None:
    headers = {} if given is None else {"x-request-id": given}
    names = {server.client.get("/health", headers=headers).headers["x-request-id"] for _ in range(2)}
    assert len(names) == 2 and all(len(name) == 32 for name in names)


def test_a_stream_has_the_name_of_its_request(server: Running) -> None:
    reply = server.client.post("/generate", json={"text": "a", "stream": True}, headers={"x-request-id": "s-1"})
    assert reply.headers["x-request-id"] == "s-1"

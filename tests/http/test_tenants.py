"""Tenants over HTTP, on the real core: what one has, no other finds, uses, ends or learns of."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from sessile.core.limits import TenantPolicy
from tests.http.conftest import Running, ring_of, running_server
from tests.http.toy_engine import ToyEngine

POLICIES = (
    TenantPolicy("acme"),
    TenantPolicy("umbra"),
    TenantPolicy("small", requests_max=1, tokens_max=40, sessions_max=2, held_tokens_max=60),
    TenantPolicy("left", shares_prefixes=True),
    TenantPolicy("right", shares_prefixes=True),
    TenantPolicy("ops"),
)
RING = ring_of(acme="user", umbra="user", small="user", left="user", right="user", ops="admin")


@pytest.fixture(scope="module")
def toy() -> Iterator[Running]:
    with running_server(partial(ToyEngine, tenants=POLICIES), key_ring=RING) as running:
        yield running


@pytest.fixture
def small(toy: Running) -> Iterator[httpx.Client]:
    with toy.as_tenant("small") as client:
        yield client
        for session in client.get("/v1/sessions").json()["data"]:
            client.delete(f"/v1/sessions/{session['id']}")


def asked(client: httpx.Client, ids: list[int], session: str | None = None, **body: object) -> httpx.Response:
    params = {"session_params": {"id": session}} if session else {}
    sampling = {"max_new_tokens": 4, "temperature": 0}
    return client.post("/generate", json={"input_ids": ids, "sampling_params": sampling} | params | body)


def opened(client: httpx.Client, name: str) -> str:
    assert client.post("/v1/sessions", json={"id": name}).status_code == 200
    assert asked(client, [1, 2, 3], name).status_code == 200
    return name


@pytest.mark.parametrize(
    ("method", "place", "body"),
    [
        ("GET", "", None),
        ("GET", "/tokens", None),
        ("POST", "/append", {"input_ids": [1]}),
        ("POST", "/fork", {}),
        ("POST", "/rewind", {"to_tokens": 0}),
        ("DELETE", "", None),
    ],
)
def test_h55_anothers_session_is_404_and_stays_as_it_is(
    acme: httpx.Client, umbra: httpx.Client, method: str, place: str, body: dict | None
) -> None:
    name = opened(acme, f"mine-{method}-{place.strip('/')}")
    before = acme.get(f"/v1/sessions/{name}").json()
    reply = umbra.request(method, f"/v1/sessions/{name}{place}", json=body)
    unknown = umbra.request(method, f"/v1/sessions/nobody-{method}{place}", json=body)
    assert (reply.status_code, unknown.status_code) == (404, 404)
    assert reply.text.replace(name, "") == unknown.text.replace(f"nobody-{method}", "")
    assert acme.get(f"/v1/sessions/{name}").json() == before


def test_h55_a_turn_in_anothers_session_is_refused_as_in_an_unknown_one(
    acme: httpx.Client, umbra: httpx.Client
) -> None:
    name = opened(acme, "turned")
    refused, unknown = asked(umbra, [4], name), asked(umbra, [4], "unheard")
    assert (refused.status_code, unknown.status_code) == (400, 400)
    assert refused.text.replace(name, "") == unknown.text.replace("unheard", "")
    assert acme.get(f"/v1/sessions/{name}").json()["turns"] == 1


def test_h55_closing_anothers_session_is_200_as_for_an_unknown_one_and_closes_nothing(
    acme: httpx.Client, umbra: httpx.Client
) -> None:
    name = opened(acme, "closed-by-another")
    assert umbra.post("/close_session", json={"session_id": name}).status_code == 200
    assert acme.get(f"/v1/sessions/{name}").status_code == 200


def test_h55_tenants_use_the_same_id_for_sessions_of_their_own(acme: httpx.Client, umbra: httpx.Client) -> None:
    opened(acme, "same")
    assert umbra.post("/v1/sessions", json={"id": "same"}).json()["turns"] == 0
    assert "same" in [session["id"] for session in umbra.get("/v1/sessions").json()["data"]]
    assert umbra.get("/v1/sessions", params={"after": "mine-GET-"}).status_code == 404


def test_h71_anothers_prompt_does_not_show_in_cached_tokens(acme: httpx.Client, umbra: httpx.Client) -> None:
    prompt = list(range(60, 130))
    asked(acme, prompt)
    assert asked(umbra, prompt).json()["meta_info"]["cached_tokens"] == 0
    assert asked(acme, prompt).json()["meta_info"]["cached_tokens"] > 0


def test_tenants_that_share_their_prefixes_find_each_others(toy: Running) -> None:
    prompt = list(range(130, 200))
    with toy.as_tenant("left") as left, toy.as_tenant("right") as right:
        asked(left, prompt)
        assert asked(right, prompt).json()["meta_info"]["cached_tokens"] > 0


def test_rids_are_each_tenants_own(toy: Running, acme: httpx.Client, umbra: httpx.Client) -> None:
    toy.engine.device.step_s = 0.01
    sampling = {"max_new_tokens": 40, "temperature": 0}
    with ThreadPoolExecutor(2) as pool:
        mine = pool.submit(asked, acme, [1, 2], rid="job", sampling_params=sampling)
        theirs = pool.submit(asked, umbra, [1, 2], rid="job", sampling_params=sampling)
        toy.wait_until(lambda: len(toy.service.keys_by_rid) == 2)
        assert umbra.post("/abort_request", json={"rid": "job"}).status_code == 200
        toy.engine.device.step_s = 0.0
        assert theirs.result().json()["meta_info"]["finish_reason"]["type"] == "abort"
        assert mine.result().json()["meta_info"]["finish_reason"]["type"] == "length"


def limit_reached(reply: httpx.Response) -> str:
    """The message of a 429 that says when to come back."""
    assert reply.status_code == 429, reply.text
    assert int(reply.headers["retry-after"]) >= 1
    message: str = reply.json()["error"]["message"]
    return message


def test_h43_sessions_of_a_key_are_limited_with_a_clear_429(small: httpx.Client, acme: httpx.Client) -> None:
    for name in ("one", "two"):
        assert small.post("/v1/sessions", json={"id": name}).status_code == 200
    assert "2 sessions of this key are open" in limit_reached(small.post("/v1/sessions", json={}))
    flood = [small.post("/open_session", json={"capacity_of_str_len": 0, "streaming": True}) for _ in range(50)]
    assert all("close some first" in limit_reached(reply) for reply in flood)
    assert "2 sessions" in limit_reached(small.post("/v1/sessions/one/fork", json={}))
    assert acme.post("/v1/sessions", json={}).status_code == 200
    small.delete("/v1/sessions/one")
    assert small.post("/v1/sessions", json={"id": "three"}).status_code == 200


def test_a_request_that_exceeds_a_limit_of_its_key_by_itself_is_too_long_and_not_put_off(small: httpx.Client) -> None:
    native = asked(small, [1] * 41)
    assert native.status_code == 400 and "41 input tokens" in native.json()["error"]["message"]
    plain = small.post("/v1/completions", json={"prompt": [1] * 41})
    assert (plain.status_code, plain.json()["error"]["code"]) == (400, "context_length_exceeded")
    answers = small.post("/v1/completions", json={"prompt": [1], "n": 2})
    assert (answers.status_code, answers.json()["error"]["param"]) == (400, "n")


def test_requests_of_a_key_are_limited(toy: Running, small: httpx.Client) -> None:
    toy.engine.device.step_s = 0.01
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(asked, small, [1, 2], rid="first", sampling_params={"max_new_tokens": 100})
        toy.wait_until(lambda: ("small", "first") in toy.service.keys_by_rid)
        assert "1 requests of this key are in flight" in limit_reached(asked(small, [3]))
        with toy.as_tenant("acme") as acme:
            assert asked(acme, [3]).status_code == 200
        toy.engine.device.step_s = 0.0
        assert running.result().status_code == 200


def test_tokens_that_the_sessions_of_a_key_hold_are_limited(small: httpx.Client) -> None:
    small.post("/v1/sessions", json={"id": "growing"})
    assert asked(small, [1] * 30, "growing").status_code == 200
    before = small.get("/v1/sessions/growing").json()
    assert "hold 34 tokens, 60 is its limit" in limit_reached(asked(small, [1] * 27, "growing"))
    assert small.get("/v1/sessions/growing").json() == before
    small.post("/v1/sessions/growing/rewind", json={"to_tokens": 10})
    assert asked(small, [1] * 27, "growing").status_code == 200


def test_a_limit_met_on_a_stream_is_an_abort_event_with_its_status(toy: Running, small: httpx.Client) -> None:
    toy.engine.device.step_s = 0.01
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(asked, small, [1, 2], rid="first", sampling_params={"max_new_tokens": 100})
        toy.wait_until(lambda: ("small", "first") in toy.service.keys_by_rid)
        reply = asked(small, [3], stream=True)
        assert (reply.status_code, '"status_code":429' in reply.text) == (200, True)
        refused = small.post("/v1/completions", json={"prompt": [3], "stream": True})
        assert limit_reached(refused)
        toy.engine.device.step_s = 0.0
        assert running.result().status_code == 200


def test_metrics_have_labels_for_the_tenants_of_the_keys_file(toy: Running, acme: httpx.Client) -> None:
    opened(acme, "measured")
    with toy.as_tenant("ops") as ops:
        families = list(text_string_to_metric_families(ops.get("/metrics").text))
    by_tenant: dict[str, dict[str, float]] = {}
    for family in families:
        for sample in family.samples:
            if "tenant" in sample.labels:
                by_tenant.setdefault(sample.labels["tenant"], {})[sample.name] = sample.value
    assert set(by_tenant) == {policy.name for policy in POLICIES}
    assert by_tenant["acme"]["sessile_tenant_held_tokens"] >= 7
    assert by_tenant["acme"]["sessile_tenant_prompt_tokens_total"] >= 3
    assert by_tenant["acme"]["sessile_tenant_sessions_open"] >= 1
    assert by_tenant["ops"]["sessile_tenant_prompt_tokens_total"] == 0

"""What the Grafana dashboard and Prometheus' alerts ask for is what /metrics of running servers has."""

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from sessile.core.limits import TenantPolicy
from tests.http.conftest import bearer, ring_of, running_server
from tests.http.toy_engine import ToyEngine

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
DASHBOARD = json.loads((DEPLOY / "grafana" / "sessile.json").read_text("utf-8"))
ALERTS = yaml.safe_load((DEPLOY / "prometheus" / "alerts.yaml").read_text("utf-8"))
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
QUERIES = {f"{panel['title']}: {target['expr']}": target["expr"] for panel in PANELS for target in panel["targets"]} | {
    rule["alert"]: rule["expr"] for group in ALERTS["groups"] for rule in group["rules"]
}
FUNCTIONS = {"sum", "min", "max", "rate", "increase", "histogram_quantile", "min_over_time", "by", "on", "and"}
OF_PROMETHEUS = {"up": {"job", "instance"}}
SCRAPED = {"instance", "job"}
"""Labels that Prometheus adds."""


def labels_by_sample(text: str) -> dict[str, set[str]]:
    """Every name that the text has samples or a family of, with the labels seen on it."""
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(text):
        if family.type == "counter":
            found.setdefault(f"{family.name}_total", set())
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


@pytest.fixture(scope="module")
def exposed() -> dict[str, set[str]]:
    """What a server with tenants on the real core exposes after some work, and one whose engine saw a violation."""
    policies = (TenantPolicy("acme"), TenantPolicy("ops"))
    known: dict[str, set[str]] = {}
    with running_server(partial(ToyEngine, tenants=policies), key_ring=ring_of(acme="user", ops="admin")) as toy:
        body = {"input_ids": [1, 2, 3], "sampling_params": {"max_new_tokens": 2}}
        assert toy.client.post("/generate", json=body, headers=bearer("acme")).status_code == 200
        known |= labels_by_sample(toy.client.get("/metrics", headers=bearer("ops")).text)
    with running_server() as echo:
        for name, labels in labels_by_sample(echo.client.get("/metrics").text).items():
            known.setdefault(name, set()).update(labels)
    return known


def asked(query: str) -> tuple[set[str], set[str]]:
    """The names of samples and the labels that a query mentions."""
    bare = re.sub(r'"[^"]*"', '""', query)
    braces = " ".join(re.findall(r"\{([^}]*)\}", bare))
    labels = set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", braces))
    labels |= {name.strip() for inside in re.findall(r"\b(?:by|on) \(([^)]*)\)", bare) for name in inside.split(",")}
    rest = re.sub(r"\{[^}]*\}|\[[^]]*\]|\b(?:by|on) \([^)]*\)", " ", bare)
    return set(re.findall(r"[a-z_]\w+", rest)) - FUNCTIONS, labels


@pytest.mark.parametrize("query", QUERIES.values(), ids=list(QUERIES))
def test_every_query_asks_for_what_is_exposed(exposed: dict[str, set[str]], query: str) -> None:
    names, labels = asked(query)
    assert names, query
    known = exposed | OF_PROMETHEUS
    assert names - set(known) == set()
    assert labels - SCRAPED <= set.union(*(known[name] for name in names))
    assert all(query.count(opens) == query.count(closes) for opens, closes in ("()", "[]", "{}"))


def test_counters_are_asked_for_as_rates() -> None:
    for query in QUERIES.values():
        for name in re.findall(r"\b(\w+_total)\b", query):
            assert re.search(rf"(rate|increase)\({name}\b", query), f"{name} only ever grows: {query}"


def test_the_dashboard_shows_what_an_operator_looks_for() -> None:
    shown = " ".join(QUERIES.values())
    for name in ("sessile_sessions{", "sessile_pages{", "sessile_cached_tokens_total", "sessile_step_seconds_total",
                 "sessile_requests_waiting", "sessile_tenant_requests_in_flight", "sessile_audit_violations_total",
                 "sessile_drafts_accepted_total", "sessile_time_to_first_token_seconds_bucket"):  # fmt: skip
        assert name in shown


def test_no_page_is_counted_twice_among_owners() -> None:
    """`tree_pinned` is a part of `tree`, so that the stack adds up to the pool without it."""
    (query,) = [target["expr"] for panel in PANELS if panel["title"] == "Pages by owner" for target in panel["targets"]]
    assert 'owner!="tree_pinned"' in query


def test_panels_have_places_of_their_own() -> None:
    taken: dict[tuple[int, int], str] = {}
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                assert (x, y) not in taken, f"{panel['title']} lies over {taken[x, y]}"
                taken[x, y] = panel["title"]
    identities = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(identities)) == len(identities)


def test_every_query_goes_to_the_chosen_prometheus_and_model() -> None:
    for panel in PANELS:
        targets: list[dict[str, Any]] = panel["targets"]
        assert {target["datasource"]["uid"] for target in targets} == {"${datasource}"}
        assert all('model_name=~"$model"' in target["expr"] for target in targets), panel["title"]
    variables = {variable["name"] for variable in DASHBOARD["templating"]["list"]}
    assert variables == {"datasource", "model"}

"""What scripts/check_metrics.py asks a Prometheus, and how it is told to scrape."""

from pathlib import Path

import yaml

from scripts.check_metrics import DEPLOY, GRAFANA, PEERS_NAME, configured, queries


def test_no_variable_of_grafanas_is_left_in_a_query() -> None:
    assert len(queries()) > 40
    for query in queries():
        for variable, value in GRAFANA.items():
            query = query.replace(variable, value)
        assert "$" not in query


def test_only_the_target_and_its_key_differ_from_what_is_deployed(tmp_path: Path) -> None:
    deployed = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yaml").read_text("utf-8"))
    content = yaml.safe_load(configured(tmp_path, 31999, "a key").read_text("utf-8"))
    (job,), (theirs,) = content["scrape_configs"], deployed["scrape_configs"]
    assert job.pop("static_configs") == [{"targets": ["127.0.0.1:31999"]}]
    assert Path(job.pop("authorization")["credentials_file"]).read_text() == "a key"
    theirs.pop("static_configs")
    assert content == deployed
    assert all((tmp_path / rules).exists() for rules in content["rule_files"])


def test_promtool_may_say_one_thing_of_peers_names_alone() -> None:
    said = "metric names should not contain ':'"
    assert PEERS_NAME.fullmatch(f"vllm:num_requests_running {said}")
    assert not PEERS_NAME.fullmatch(f"sessile:rows {said}")
    assert not PEERS_NAME.fullmatch("vllm:num_requests_running no help text")

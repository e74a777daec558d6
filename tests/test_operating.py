"""What operators are given is there and right: docs/SECURITY.md and OPERATIONS.md, releases, the files in deploy/."""

import json
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml

from sessile.cli import COMMANDS, EXIT_WRONG_USE, parser_for
from sessile.config import Config, compose
from sessile.contract.messages import Stats
from sessile.contract.pool import PoolView
from sessile.core.watch import Report
from sessile.engine.loop import log_report
from sessile.errors import UserError
from sessile.server.logs import fields_of
from sessile.server.metrics import Metrics
from sessile.server.operations import pool_content
from sessile.server.replies import CLIENT_CLOSED_REQUEST
from tests.unit.stats import stats_of_nothing

ROOT = Path(__file__).resolve().parents[1]
DEPLOY = ROOT / "deploy"
DOCKERFILES = [DEPLOY / "Dockerfile", DEPLOY / "Dockerfile.cuda"]
TESTS = "\n".join(path.read_text("utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
each_dockerfile = pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)


def page(name: str) -> str:
    return (ROOT / "docs" / name).read_text("utf-8")


def test_every_class_of_vulnerability_shows_tests_that_exist() -> None:
    table = page("SECURITY.md").partition("## Classes of vulnerability")[2]
    rows = re.findall(r"^\| ([^|]+) \| ([^|]+) \| ([^|]*) \|$", table, re.MULTILINE)[2:]
    assert len(rows) >= 28
    for name, reason, tests in rows:
        shown = re.findall(r"`(test_\w+)`", tests)
        assert shown and reason, f"{name} shows no test"
        assert [test for test in shown if f"def {test}(" not in TESTS] == [], name


# -- the files under deploy/ -------------------------------------------------------------------------------------------


def instructions(path: Path) -> list[tuple[str, str]]:
    """The instructions of a Dockerfile with their arguments, lines joined."""
    text = re.sub(r"^#.*\n", "", path.read_text("utf-8"), flags=re.MULTILINE).replace("\\\n", " ")
    return [tuple(line.split(maxsplit=1)) for line in text.splitlines() if line.strip()]  # type: ignore[misc]


def configured_by(argv: list[str], environment: dict[str, str] | None = None) -> Config:
    """The configuration of a command line as it would start, by our own parser."""
    assert Path(argv[0]).name == "sessile" and argv[1] in COMMANDS
    arguments = parser_for(argv[1]).parse(argv[2:])
    return compose(arguments.flags, environment or {}, arguments.config)


@each_dockerfile
def test_an_image_starts_a_server_and_only_one_that_is_protected(path: Path) -> None:
    said = dict(instructions(path))
    config = configured_by(json.loads(said["ENTRYPOINT"]) + json.loads(said["CMD"]))
    assert (config.server.host, config.server.port) == ("0.0.0.0", int(said["EXPOSE"]))
    assert config.server.keys is None and config.server.allow_remote == "off", "the operator chooses one of them"
    assert config.device.device == ("cuda" if path.suffix == ".cuda" else "auto")
    assert said["STOPSIGNAL"] == "SIGTERM" and f":{said['EXPOSE']}/health" in said["HEALTHCHECK"]


@each_dockerfile
def test_an_image_is_built_in_stages_and_run_by_a_user_of_its_own(path: Path) -> None:
    order = [word for word, _ in instructions(path)]
    assert order.count("FROM") == 2
    last = order[len(order) - 1 - order[::-1].index("FROM") :]
    assert "USER" in last and last.index("USER") < last.index("ENTRYPOINT")
    assert dict(instructions(path))["USER"] not in ("root", "0")
    assert all(re.search(r":\d+\.\d+", rest) for word, rest in instructions(path) if word == "FROM")


@each_dockerfile
def test_what_an_image_copies_is_there_and_not_ignored(path: Path) -> None:
    ignored = (ROOT / ".dockerignore").read_text("utf-8").splitlines()
    copied = [name for word, rest in instructions(path) if word == "COPY" and "--from" not in rest
              for name in rest.split()[:-1]]  # fmt: skip
    assert {"constraints.txt", "pyproject.toml", "sessile"} <= set(copied)
    for name in copied:
        assert (ROOT / name).exists() and f"!{name}" in ignored, name


@each_dockerfile
def test_an_image_has_the_versions_that_were_tested(path: Path) -> None:
    steps = " ".join(rest for word, rest in instructions(path) if word == "RUN")
    assert "-c constraints.txt ." in steps
    pins = (ROOT / "constraints.txt").read_text("utf-8")
    patterns = re.findall(r"sed -n 's/([^']+?)/\\1/p' constraints.txt", steps)
    assert len(patterns) == 2
    for pattern in patterns:
        sought = pattern.replace("\\(", "(").replace("\\)", ")")
        assert re.search(sought, pins, re.MULTILINE), f"constraints.txt pins nothing like {sought}"


def test_no_file_for_deployment_names_a_host_of_someones() -> None:
    texts = [path for path in DEPLOY.rglob("*") if path.is_file()]
    assert len(texts) >= 9
    hosts = {
        host for path in texts for host in re.findall(r"https?://([\w.-]+)", path.read_text("utf-8"))
    }
    assert hosts <= {"127.0.0.1", "prometheus"}


def compose_services() -> dict[str, Any]:
    services: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text("utf-8"))["services"]
    return services


def test_compose_publishes_nothing_beyond_this_machine() -> None:
    ports = [port for service in compose_services().values() for port in service["ports"]]
    assert len(ports) == 3
    assert all(re.fullmatch(r"127\.0\.0\.1:(\d+):\1", port) for port in ports)


def test_compose_mounts_files_that_are_there_and_pins_images() -> None:
    services = compose_services()
    content = yaml.safe_load((DEPLOY / "compose.yaml").read_text("utf-8"))
    for service in services.values():
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            assert source in content["volumes"] or (DEPLOY / source).exists(), volume
        if "image" in service:
            assert re.search(r":v?\d+\.\d+\.\d+$", service["image"]), service["image"]
    assert (DEPLOY / services["sessile"]["build"]["context"] / services["sessile"]["build"]["dockerfile"]).exists()


def test_compose_starts_the_server_with_settings_that_exist() -> None:
    service = compose_services()["sessile"]
    said = dict(instructions(DEPLOY / "Dockerfile"))
    config = configured_by(json.loads(said["ENTRYPOINT"]) + json.loads(said["CMD"]), service["environment"])
    assert config.server.allow_remote == "on"
    assert int(service["stop_grace_period"].removesuffix("s")) > config.server.drain_timeout_s + 10


def test_prometheus_scrapes_the_server_of_compose_and_reads_our_rules() -> None:
    prometheus = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yaml").read_text("utf-8"))
    (job,) = prometheus["scrape_configs"]
    (target,) = job["static_configs"][0]["targets"]
    name, _, port = target.partition(":")
    assert compose_services()[name]["ports"] == [f"127.0.0.1:{port}:{port}"]
    mounted = " ".join(compose_services()["prometheus"]["volumes"])
    for rules in prometheus["rule_files"]:
        assert (DEPLOY / "prometheus" / rules).exists() and f"/etc/prometheus/{rules}" in mounted


def test_grafana_is_provisioned_with_our_dashboard_and_prometheus() -> None:
    provisioning = DEPLOY / "grafana" / "provisioning"
    (source,) = yaml.safe_load((provisioning / "datasources" / "prometheus.yaml").read_text("utf-8"))["datasources"]
    assert source["url"] == "http://prometheus:9090" and source["type"] == "prometheus"
    (provider,) = yaml.safe_load((provisioning / "dashboards" / "sessile.yaml").read_text("utf-8"))["providers"]
    mounted = compose_services()["grafana"]["volumes"]
    assert f"./grafana/sessile.json:{provider['options']['path']}/sessile.json:ro" in mounted


def unit_entries() -> Iterator[tuple[str, str]]:
    for line in (DEPLOY / "sessile.service").read_text("utf-8").splitlines():
        name, equals, value = line.partition("=")
        if equals and not line.startswith("#"):
            yield name, value


def test_the_unit_starts_a_server_with_keys_and_our_settings(tmp_path: Path) -> None:
    unit = dict(unit_entries())
    argv = shlex.split(unit["ExecStart"])
    assert argv[argv.index("--config") + 1] == "/etc/sessile/sessile.yaml"
    argv[argv.index("--config") + 1] = str(DEPLOY / "sessile.yaml")
    config = configured_by(argv)
    assert config.server.keys == "${CREDENTIALS_DIRECTORY}/keys.yaml"
    assert unit["LoadCredential"].startswith("keys.yaml:")
    assert int(unit["TimeoutStopSec"]) > config.server.drain_timeout_s + 10
    assert unit["KillMode"] == "mixed", "the server drains; its engine is not signalled by anybody else"


def test_the_unit_does_not_start_what_is_wrongly_set_up_again() -> None:
    unit = dict(unit_entries())
    assert unit["Restart"] == "on-failure" and int(unit["RestartPreventExitStatus"]) == EXIT_WRONG_USE
    assert "2 is not worth one" in page("OPERATIONS.md")


HARDENED = {
    "NoNewPrivileges": "yes", "ProtectSystem": "strict", "ProtectHome": "yes", "PrivateTmp": "yes",
    "DynamicUser": "yes", "CapabilityBoundingSet": "", "RestrictNamespaces": "yes", "RestrictSUIDSGID": "yes",
    "LockPersonality": "yes", "RestrictAddressFamilies": "AF_UNIX AF_INET AF_INET6", "PrivateDevices": "yes",
    "ProtectKernelModules": "yes", "ProtectKernelTunables": "yes", "ProtectControlGroups": "yes",
    "SystemCallArchitectures": "native",
}  # fmt: skip


@pytest.mark.parametrize("name", HARDENED)
def test_the_unit_takes_away_what_a_server_does_not_need(name: str) -> None:
    assert dict(unit_entries())[name] == HARDENED[name]
    assert "MemoryMax" in dict(unit_entries())


# -- releases ----------------------------------------------------------------------------------------------------------


def test_the_workflow_runs_our_own_script_on_the_versions_that_we_name() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yaml").read_text("utf-8"))
    job = workflow["jobs"]["test"]
    assert [step["run"] for step in job["steps"] if "run" in step] == [".ci/run"]
    classifiers = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["classifiers"]
    named = re.findall(r"Programming Language :: Python :: (3\.\d+)", "\n".join(classifiers))
    assert job["strategy"]["matrix"]["python"] == named
    assert workflow["permissions"] == {"contents": "read"}
    used = [step["uses"] for each in workflow["jobs"].values() for step in each["steps"] if "uses" in step]
    assert all(re.fullmatch(r"actions/[\w-]+@v\d+", name) for name in used)
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111


def test_every_file_that_the_release_and_the_workflow_name_exists() -> None:
    text = page("RELEASE.md") + (ROOT / ".github" / "workflows" / "ci.yaml").read_text("utf-8")
    named = set(re.findall(r"\b((?:scripts|tests|deploy|docs|sessile)/[\w./-]+\.(?:py|yaml|md))\b", text))
    assert {"scripts/check_package.py", "deploy/compose.yaml", "sessile/__init__.py"} <= named
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


# -- operations --------------------------------------------------------------------------------------------------------

OPERATIONS = page("OPERATIONS.md")


def table_after(heading: str) -> list[str]:
    """The first cells of the table under a heading of the page."""
    section = OPERATIONS.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    return [cell.strip().strip("`") for cell in re.findall(r"^\| ([^|]+) \|", section, re.MULTILINE)][1:]


def test_every_alert_is_explained_and_no_other() -> None:
    alerts = yaml.safe_load((DEPLOY / "prometheus" / "alerts.yaml").read_text("utf-8"))
    assert table_after("What to alert on") == [rule["alert"] for group in alerts["groups"] for rule in group["rules"]]


def errors(kind: type[UserError]) -> Iterator[type[UserError]]:
    yield kind
    for each in kind.__subclasses__():
        yield from errors(each)


def test_every_status_that_is_answered_is_explained() -> None:
    explained = {int(status) for status in table_after("What each status means")}
    beside = {405, 422, 431, CLIENT_CLOSED_REQUEST, 500}  # no exceptions of ours, or on one surface only
    assert explained == {each.status for each in errors(UserError)} | beside


def test_every_page_of_the_pool_is_explained() -> None:
    fields = msgspec.structs.fields(PoolView)
    view = PoolView(**{field.name: [] if "list" in str(field.type) else 0 for field in fields})
    shown = pool_content(view, {})
    assert {"total", *table_after("The pool")} == set(shown["pages"])
    assert {"holders", "rest"} <= set(shown)


def test_every_field_of_a_containment_report_is_explained(caplog: pytest.LogCaptureFixture) -> None:
    log_report(Report(found=["pages: x"], quarantined_pages=1, events=["e"]))
    (record,) = caplog.records
    assert record.levelname == "ERROR" and "an invariant was violated" in record.getMessage()
    assert set(fields_of(record)) == set(table_after("A containment report"))


def test_every_metric_that_is_named_is_exposed() -> None:
    text = Metrics(("acme",)).render(stats_of_something(), model="m", in_flight=0).decode()
    for name in set(re.findall(r"`(sessile_\w+)`", OPERATIONS)):
        assert re.search(rf"^# TYPE {name} ", text, re.MULTILINE), name


def stats_of_something() -> Stats:
    return msgspec.structs.replace(stats_of_nothing(), pages_total=10)


def test_every_file_for_deployment_that_is_named_exists() -> None:
    named = set(re.findall(r"`(deploy/[\w./-]*)`", OPERATIONS + page("SECURITY.md") + page("RELEASE.md")))
    assert len(named) >= 6 and [name for name in named if not (ROOT / name).exists()] == []

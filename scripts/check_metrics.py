"""Prometheus itself on a live server: `python scripts/check_metrics.py --prometheus FOLDER` with its two programs.

A server with a tiny model, keys and speculation serves requests of every kind while a Prometheus scrapes it as
deploy/prometheus/prometheus.yaml says. What must hold: `promtool check metrics`, `check config` and `check rules` have
nothing to say but that peers' names have colons, the target is up, every query of the dashboard has a result, and every
alert is evaluated without an error. Exit status 1 otherwise.
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

from sessile.keyfile import draw_key  # noqa: E402  (found by the line above)
from tests.unit.tiny_folder import write_tiny_model  # noqa: E402

DEPLOY = ROOT / "deploy"
START_S_MAX = 600.0
SETTINGS = {
    "load-format": "dummy", "dtype": "float32", "context-tokens": 512, "kv-memory": "1M", "rows-max": 8, "threads": 1,
    "speculate": "on", "log-level": "warning",
}  # fmt: skip
GRAFANA = {"$__rate_interval": "30s", "$model": ".*", "1h": "1m"}
"""What stands for Grafana's variables; an increase over an hour is one over the time that there is."""
SOMETIMES_EMPTY = {"sessile_audit_violations_total"}
"""Has a series for each kind of violation from the first one on; here there is none."""
PEERS_NAME = re.compile(r"(sglang|vllm):\w+ metric names should not contain ':'")
"""The one thing that promtool may say: names with a colon are for recording rules, and peers chose theirs before us."""
HI = [{"role": "user", "content": "hi"}]


def short(**sampling: Any) -> dict[str, Any]:
    """Sampling parameters of a short answer."""
    return {"max_new_tokens": 12, "ignore_eos": True, **sampling}


REQUESTS: list[tuple[str, Any]] = [
    ("/generate", {"text": "one two three one two three one two", "sampling_params": short(temperature=0)}),
    ("/generate", {"text": " and", "session_params": {"id": "s"}, "sampling_params": short()}),
    ("/generate", {"text": "many", "sampling_params": short(n=3)}),
    ("/generate", {"text": "a", "sampling_params": {"max_new_tokens": 12, "json_schema": {"type": "integer"}}}),
    ("/v1/completions", {"model": "default", "prompt": "a", "max_tokens": 4}),
    ("/v1/sessions/s/fork", {"id": "child"}),
    ("/generate", {"text": "b", "session_params": {"id": "child"}, "sampling_params": short(seed=1)}),
    ("/v1/sessions/child/rewind", {"to_tokens": 3}),
    ("/close_session", {"session_id": "child"}),
    ("/generate", {"text": 1}),
    ("/generate", {"text": "a", "session_params": {"id": "none"}}),
    ("/generate", {"text": "a" * 600}),
    ("/generate", {"text": "a", "sampling_params": {"regex": "a("}}),
    ("/v1/sessions/none/fork", {}),
    ("/v1/sessions/s/append", {"text": "a" * 600}),
]
"""In turn: drafts, a turn, several answers, a grammar, a fork and a rewind, then refusals, the last two 404 and 413."""


@contextlib.contextmanager
def running(command: list[str], log: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """A process that is gone on leaving."""
    with log.open("wb") as sink:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=sink, stderr=sink, cwd=ROOT)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def wait_for(url: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
    """Until a process answers at a URL with 200."""
    for _ in range(int(START_S_MAX / 0.2)):
        if process.poll() is not None:
            raise SystemExit(f"{process.args}: {log.read_text()}")
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(url, timeout=5, trust_env=False).status_code == 200:
                return
        time.sleep(0.2)
    raise SystemExit(f"nothing answers at {url}")


def serve_all_kinds(url: str, key: str, ending: threading.Event, statuses: dict[int, int]) -> None:
    """Send requests of every kind, again and again."""
    with httpx.Client(base_url=url, headers={"authorization": f"Bearer {key}"}, timeout=120, trust_env=False) as http:
        http.post("/open_session", json={"capacity_of_str_len": 1, "streaming": True, "session_id": "s"})
        while not ending.is_set():
            for path, body in REQUESTS:
                status = http.post(path, json=body).status_code
                statuses[status] = statuses.get(status, 0) + 1
            http.post("/v1/sessions/s/rewind", json={"to_tokens": 1})
            http.post("/v1/chat/completions", json={"messages": HI, "max_tokens": 3, "stream": True})
            ending.wait(0.2)


def promtool(folder: Path, *arguments: str, text: str = "", peers_names: bool = False) -> list[str]:
    """What it has to say, if anything. peers_names: are in the text, so it may complain of them."""
    said = subprocess.run([str(folder / "promtool"), *arguments], input=text, capture_output=True, text=True)
    told = [line for line in said.stderr.splitlines() if line]
    lines = [line for line in told if not (peers_names and PEERS_NAME.fullmatch(line))]
    if said.returncode and len(lines) == len(told):
        lines.append(f"status {said.returncode}: {said.stdout}")
    return [f"promtool {' '.join(arguments[:2])}: {line}" for line in lines]


def configured(folder: Path, port: int, key: str) -> Path:
    """The configuration of deploy/, with this server for its target and a key as its comment says; its path."""
    shutil.copy(DEPLOY / "prometheus" / "alerts.yaml", folder)
    content = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yaml").read_text("utf-8"))
    (folder / "sessile.key").write_text(key)
    (job,) = content["scrape_configs"]
    job["static_configs"] = [{"targets": [f"127.0.0.1:{port}"]}]
    job["authorization"] = {"credentials_file": str(folder / "sessile.key")}
    path = folder / "prometheus.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def queries() -> list[str]:
    """Every query of the dashboard."""
    panels = json.loads((DEPLOY / "grafana" / "sessile.json").read_text("utf-8"))["panels"]
    return [target["expr"] for panel in panels for target in panel.get("targets", ())]


def judged(api: httpx.Client) -> tuple[list[str], str]:
    """What a Prometheus has to say against its target, the dashboard and the alerts; and how much was asked."""
    failures = []
    (target,) = api.get("/targets").json()["data"]["activeTargets"]
    if target["health"] != "up":
        failures.append(f"the target is {target['health']}: {target['lastError']}")
    up = api.get("/query", params={"query": 'up{job="sessile"}'}).json()["data"]["result"]
    if [sample["value"][1] for sample in up] != ["1"]:
        failures.append(f"up is {up}")
    for query in queries():
        asked = query
        for variable, value in GRAFANA.items():
            asked = asked.replace(variable, value)
        reply = api.get("/query", params={"query": asked}).json()
        if reply["status"] != "success":
            failures.append(f"{query}: {reply['error']}")
        elif not reply["data"]["result"] and not any(name in query for name in SOMETIMES_EMPTY):
            failures.append(f"{query}: no result")
    models = api.get("/label/model_name/values").json()["data"]
    if len(models) != 1:
        failures.append(f"the dashboard can choose among {models}")
    rules = [rule for group in api.get("/rules").json()["data"]["groups"] for rule in group["rules"]]
    failures += [f"{rule['name']}: {rule.get('lastError')}" for rule in rules if rule["health"] != "ok"]
    fired = [rule["name"] for rule in rules if rule["state"] == "firing"]
    failures += [f"{name} fires on a server that is well" for name in fired]
    series = api.get("/query", params={"query": 'count({job="sessile"})'}).json()["data"]["result"][0]["value"][1]
    return failures, f"{len(queries())} queries and {len(rules)} alerts over {series} series"


def check(programs: Path, port: int, seconds: int, folder: Path) -> list[str]:
    """Serve, scrape and judge; what does not hold."""
    (admin, entry), (user, other) = draw_key("ops", "admin"), draw_key("acme", "user")
    keys = folder / "keys.yaml"
    keys.write_text(f"tenants:\n  ops:\n  acme: {{weight: 2}}\nkeys:\n{entry}{other}")
    settings = SETTINGS | {"port": port, "keys": keys, "model": write_tiny_model(folder)}
    flags = [f"--{name}={value}" for name, value in settings.items()]
    command = [sys.executable, "-m", "sessile", "serve", "--exit-with-stdin", *flags]
    config = configured(folder, port, admin)
    url, ours = f"http://127.0.0.1:{port}", folder / "server.log"
    with running(command, ours) as server:
        wait_for(f"{url}/health/ready", server, ours)
        looked = {"authorization": f"Bearer {admin}"}
        fresh = httpx.get(f"{url}/metrics", headers=looked, trust_env=False).text
        scraping = [
            str(programs / "prometheus"), f"--config.file={config}", f"--web.listen-address=127.0.0.1:{port + 1}",
            f"--storage.tsdb.path={folder / 'tsdb'}",
        ]  # fmt: skip
        ending, statuses, theirs = threading.Event(), dict[int, int](), folder / "prometheus.log"
        client = threading.Thread(target=serve_all_kinds, args=(url, user, ending, statuses))
        with running(scraping, theirs) as prometheus:
            wait_for(f"http://127.0.0.1:{port + 1}/-/ready", prometheus, theirs)
            client.start()
            time.sleep(seconds)
            with httpx.Client(base_url=f"http://127.0.0.1:{port + 1}/api/v1", timeout=60, trust_env=False) as api:
                failures, amount = judged(api)
        ending.set()
        client.join()
        text = httpx.get(f"{url}/metrics", headers=looked, trust_env=False).text
        own_names = httpx.get(f"{url}/metrics?names=sessile", headers=looked, trust_env=False).text
    for page in (fresh, text):
        failures += promtool(programs, "check", "metrics", text=page, peers_names=True)
    failures += promtool(programs, "check", "metrics", text=own_names)
    failures += promtool(programs, "check", "config", str(config))
    failures += promtool(programs, "check", "rules", str(DEPLOY / "prometheus" / "alerts.yaml"))
    if not {200, 400, 404, 413} <= set(statuses):
        failures.append(f"the requests were answered with {statuses}")
    told = subprocess.run([str(programs / "prometheus"), "--version"], capture_output=True, text=True, check=True)
    version = told.stdout.split()[2]
    print(f"Prometheus {version}: {amount}, {len(text.splitlines())} lines of metrics, answers by status {statuses}")
    return failures


def main() -> int:
    """Check; 0 if everything holds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prometheus", type=Path, required=True, help="folder of prometheus and promtool")
    parser.add_argument("--seconds", type=int, default=60, help="how long it is scraped")
    parser.add_argument("--port", type=int, default=31700, help="for the server; Prometheus gets the next one")
    arguments = parser.parse_args()
    for program in ("prometheus", "promtool"):
        if not (arguments.prometheus / program).is_file():
            parser.error(f"there is no {arguments.prometheus / program}: name the folder of both programs")
    os.environ["PYTHONPATH"] = str(ROOT)
    with tempfile.TemporaryDirectory() as folder:
        failures = check(arguments.prometheus.resolve(), arguments.port, arguments.seconds, Path(folder))
    for failure in failures:
        print(f"  {failure}")
    print(f"{len(failures)} failures")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())

"""`sessile bench throughput` on a served core: what it counts, and wrong use in one line."""

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from sessile.bench.throughput import RequestTimes, Spread, ThroughputBenchOptions, summarise
from sessile.cli import main
from tests.http.conftest import Running, running_server
from tests.http.toy_engine import ToyEngine

SMALL = ("--prompts=10", "--input-tokens=20", "--output-tokens=8", "--batch=4", "--lowest-id=1", "--highest-id=250")


@pytest.fixture(scope="module")
def toy() -> Iterator[Running]:
    with running_server(partial(ToyEngine, pages=600)) as running:
        # An answer that came in one piece would have no time between tokens.
        running.engine.device.step_s = 0.01
        yield running


def test_a_server_is_measured_request_by_request(
    toy: Running, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "report.json"
    assert main(["bench", "throughput", "--url", toy.url, *SMALL, "--rate=100", f"--json={report}"]) == 0
    measured = json.loads(report.read_text())
    assert [each["output_tokens"] for each in measured["requests"]] == [8] * 10
    summary = measured["summary"]
    assert (summary["requests"], summary["input_tokens"], summary["output_tokens"]) == (10, 200, 80)
    assert summary["total_tokens_per_s"] == pytest.approx(280 / summary["duration_s"])
    assert all(0 < summary[name]["median_ms"] <= summary[name]["p99_ms"] for name in ("ttft", "tpot", "itl", "e2el"))
    shown = capsys.readouterr().out
    assert "10 requests of 20 + 8 tokens, 100 requests/s, at most 4 in flight" in shown
    assert all(name in shown for name in ("TTFT", "TPOT", "ITL", "E2EL", "output tokens"))


def test_figures_follow_from_the_times() -> None:
    times = [RequestTimes(first_token_s=1.0, total_s=3.0, gaps_s=[0.5, 1.5], output_tokens=3, cached_tokens=2)] * 2
    summary = summarise(ThroughputBenchOptions(input_tokens=10), 4.0, times)
    assert (summary.requests_per_s, summary.input_tokens_per_s, summary.output_tokens_per_s) == (0.5, 5.0, 1.5)
    assert summary.total_tokens_per_s == 6.5 and summary.cached_tokens == 4
    assert summary.ttft == Spread(1000.0, 1000.0, 1000.0)
    assert summary.tpot == Spread(1000.0, 1000.0, 1000.0)
    assert summary.itl is not None and (summary.itl.mean_ms, summary.itl.p99_ms) == (1000.0, 1500.0)
    assert summarise(ThroughputBenchOptions(), 1.0, [RequestTimes(output_tokens=1)]).tpot is None


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(["bench", "throughput", *argv]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_wrong_use_is_one_line(toy: Running, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--prompts must be" in refused(capsys, "--prompts=0")
    assert "--highest-id must be above" in refused(capsys, "--highest-id=5")
    assert "cannot be reached" in refused(capsys, "--url=http://127.0.0.1:9", *SMALL)
    assert "context length" in refused(capsys, "--url", toy.url, *SMALL, "--input-tokens=600")
    assert "must fit the model's context" in refused(capsys, "--url", toy.url, *SMALL, "--output-tokens=505")
    assert "nowhere" in refused(capsys, "--model=nowhere")

"""H67: requests that leave max_tokens unset and end far below their bound, in pools that are short."""

import json
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from sessile.bench.admission import (
    CONTEXT_TOKENS,
    PAGE_SIZE,
    POOL_SHARES,
    SHARE_MIN,
    AdmissionBenchOptions,
    Need,
    Run,
    measure_admission,
    needs,
    pool_pages,
    run_needs,
)
from sessile.bench.admission_model import measure_on_model
from tests.unit.tiny_files import write_tiny_folder

WANTED = needs(256, seed=1)


@pytest.fixture(scope="module", params=POOL_SHARES)
def runs(request: pytest.FixtureRequest) -> tuple[int, Run, Run]:
    """(pages of the pool, the run with exact limits, the run without limits)"""
    pages = pool_pages(WANTED, request.param)
    return pages, run_needs(WANTED, pages, exact=True), run_needs(WANTED, pages, exact=False)


def test_h67_by_the_bound_only_a_few_could_run(runs: tuple[int, Run, Run]) -> None:
    pages, _, _ = runs
    assert pages * PAGE_SIZE // CONTEXT_TOKENS < len(WANTED) // 20


def test_h67_unset_limits_reach_the_throughput_of_exact_ones(runs: tuple[int, Run, Run]) -> None:
    _, exact, unset = runs
    assert unset.throughput >= SHARE_MIN * exact.throughput
    assert unset.steps <= exact.steps / SHARE_MIN


def test_h67_nothing_starves_because_limits_are_unset(runs: tuple[int, Run, Run]) -> None:
    _, exact, unset = runs
    assert len(unset.lengths_tokens) == len(WANTED)
    assert max(unset.first_steps.values()) <= 1.1 * max(exact.first_steps.values())
    assert max(unset.pauses_steps.values()) <= 0.1 * unset.steps


def test_the_same_requests_take_the_same_steps_every_time() -> None:
    pages = pool_pages(WANTED[:40], 0.25)
    assert run_needs(WANTED[:40], pages, exact=False) == run_needs(WANTED[:40], pages, exact=False)


def test_outputs_that_use_all_they_may_are_no_slower_for_being_unset() -> None:
    """Nothing ends early: optimism costs preemptions, and has to stop."""
    wanted = [Need(64, CONTEXT_TOKENS // 8)] * 24
    pages = pool_pages(wanted, 0.5)
    exact, unset = (run_needs(wanted, pages, exact=each) for each in (True, False))
    assert unset.throughput >= SHARE_MIN * exact.throughput


def test_the_table_says_how_each_pool_did(capsys: pytest.CaptureFixture[str]) -> None:
    assert measure_admission(AdmissionBenchOptions(requests=64)) in (0, 1)
    shown = capsys.readouterr().out
    assert shown.count("exact") == shown.count("unset") == len(POOL_SHARES)


def test_on_a_model_each_pair_gives_a_ratio(tmp_path: Path) -> None:
    folder, shown = write_tiny_folder(tmp_path), StringIO()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 1024}))
    share = measure_on_model(str(folder), 12, 3, Console(file=shown, width=200))
    (line,) = [line for line in shown.getvalue().splitlines() if "by the clock" in line]
    ratios = [float(part) for part in line.split(":")[1].split(";")[0].split("·")]
    assert len(ratios) == 3
    assert sorted(ratios)[1] == pytest.approx(share, abs=1e-3)

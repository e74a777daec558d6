"""The command line of the simulator, and shrinking."""

from pathlib import Path

import pytest

from sessile.sim.faults import MUTANTS
from sessile.sim.planting import planted
from sessile.sim.run import main, parse_faults
from sessile.sim.shrink import shrink
from sessile.sim.world import FAULTS, make_world


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """Standard error of a command line that is refused: one line, status 2."""
    assert main(argv) == 2
    output = capsys.readouterr()
    assert output.out == "" and output.err.startswith("sessile: ") and output.err.count("\n") == 1
    return output.err


def test_one_seed_prints_its_steps_and_trace(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--seed", "5", "--steps", "50"]) == 0
    out = capsys.readouterr().out
    assert "trace" in out and "tokens" in out


def test_several_seeds_print_totals_and_a_verdict(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--seeds", "2", "--steps", "50", "--workers", "1"]) == 0
    out = capsys.readouterr().out
    assert "2 seeds" in out and "nothing found" in out and "done length" in out


def test_faults_can_be_chosen_by_name() -> None:
    assert parse_faults("all") == frozenset(FAULTS)
    assert parse_faults("none") == frozenset()
    assert parse_faults("late,drafts") == {"late", "drafts"}


def test_an_unknown_fault_is_refused_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert "unknown gremlins" in refused(capsys, "--faults", "gremlins")


@pytest.mark.parametrize(
    ("argv", "flag"),
    [("--seeds -3", "--seeds"), ("--seeds 0", "--seeds"), ("--seeds many", "--seeds"), ("--steps 0", "--steps"),
     ("--steps -1", "--steps"), ("--workers 0", "--workers"), ("mutants --seeds 0", "--seeds"),
     ("mutants --steps 0", "--steps"), ("closure --workers 0", "--workers")],
)  # fmt: skip
def test_a_run_of_nothing_is_refused(capsys: pytest.CaptureFixture[str], argv: str, flag: str) -> None:
    assert f"{flag}: must be a whole number from 1 on" in refused(capsys, *argv.split())


def test_a_log_that_is_not_there_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "nofile: No such file" in refused(capsys, "replay", str(tmp_path / "nofile"))


def test_a_failing_workload_shrinks_to_few_messages() -> None:
    mutant = next(mutant for mutant in MUTANTS if mutant.name == "alias with balanced counts")
    with planted(mutant.edits) as simulation:
        world = make_world(0)
        report = simulation.Simulation(world).run(200)
        script, failure = shrink(world, 200, report, runs_max=40, simulation=simulation.Simulation)
    assert sum(map(len, script.values())) < sum(map(len, report.script.values()))
    assert failure.checker == report.failure.checker


def test_a_failure_is_told_in_words() -> None:
    mutant = next(mutant for mutant in MUTANTS if mutant.name == "emitted twice on resume")
    with planted(mutant.edits) as simulation:
        reports = (simulation.Simulation(make_world(seed)).run(200) for seed in range(20))
        failure = next(report.failure for report in reports if report.failure)
    story = "\n".join(failure.events)
    assert "sent Submit key=" in story and "launched" in story and "says [" in story and "settled" in story

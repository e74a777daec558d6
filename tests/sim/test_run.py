"""The command line of the simulator, and shrinking."""

import pytest

from sessile.sim.faults import MUTANTS
from sessile.sim.planting import planted
from sessile.sim.run import main, parse_faults
from sessile.sim.shrink import shrink
from sessile.sim.world import FAULTS, make_world


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
    with pytest.raises(SystemExit) as stopped:
        main(["--faults", "gremlins"])
    assert stopped.value.code == 2
    assert "gremlins" in capsys.readouterr().err


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

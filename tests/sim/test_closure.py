"""Small worlds explored to closure: how many states, what merging may merge, and faults that it finds."""

from collections.abc import Iterator
from random import Random

import pytest

from sessile.sim import run
from sessile.sim.closure import Task, explore
from sessile.sim.faults import MUTANTS
from sessile.sim.planting import Edit, planted
from sessile.sim.small_world import FAULTS, Action, Shape, SmallWorld
from sessile.sim.twin import twin

TINY = Task(Shape(pages=3, page_size=3, clients=1), faults_max=1)


def walk(shape: Shape, seed: int, length: int) -> Iterator[SmallWorld]:
    """Every state of a random walk, a fault at most once a client."""
    draw = Random(seed)
    world = SmallWorld(shape)
    committed: list[tuple[str, int]] = []
    for _ in range(length):
        yield world
        actions = [action for action in world.actions() if (action.kind, action.client) not in committed]
        if not actions:
            return
        action = draw.choice(actions)
        if action.is_fault:
            committed.append((action.kind, action.client))
        world.do(action)


def test_a_tiny_world_closes_with_its_exact_number_of_states() -> None:
    closure = explore(TINY)
    assert closure.violation is None
    assert (closure.states, closure.transitions, closure.ends) == (108, 199, 14)


def test_faults_add_states_and_no_violation() -> None:
    two_faults = explore(Task(TINY.shape, 2))
    assert two_faults.violation is None
    assert two_faults.states > explore(TINY).states


def test_prompt_clients_leave_fewer_orders_and_a_faultless_one_commits_nothing() -> None:
    free, prompt = (explore(Task(Shape(3, 3, prompt=prompt), 0)) for prompt in (False, True))
    assert (free.states, prompt.states) == (189, 15)
    both, first = (explore(Task(Shape(3, 3, prompt=True), 1, faulty=faulty)) for faulty in (2, 1))
    assert (both.states, first.states) == (332, 202)
    assert {closure.violation for closure in (free, prompt, both, first)} == {None}


@pytest.mark.parametrize("shape", [Shape(3, 3), Shape(5, 2)], ids=str)
def test_states_with_equal_digests_have_equal_successors(shape: Shape) -> None:
    """Met on different ways, and so with other page ids, keys, steps and clocks behind the same form."""
    met: dict[bytes, tuple[SmallWorld, str]] = {}
    pairs = 0
    for seed in range(40):
        for world in walk(shape, seed, 24):
            earlier, names = met.setdefault(world.digest(), (twin(world), names_of(world)))
            if names == names_of(world):
                continue
            pairs += 1
            assert list(earlier.actions()) == list(world.actions())
            for action in earlier.actions():
                one, other = twin(earlier), twin(world)
                one.do(action)
                other.do(action)
                assert one.digest() == other.digest(), f"after {action}"
    assert pairs > 20


def names_of(world: SmallWorld) -> str:
    """What the form leaves out: pages in their order, steps, clocks and keys."""
    core = world._machine._books
    return str((core.ledger.tags.tolist(), core.planned_step, core.tree.clock, core.arrivals, world._names))


def test_a_twin_goes_its_own_way() -> None:
    world = SmallWorld(TINY.shape)
    before = world.digest()
    other = twin(world)
    for action in (Action("send", 0), Action("turn"), Action("turn")):
        other.do(action)
    assert world.digest() == before != other.digest()
    world.do(Action("send", 0))


@pytest.mark.parametrize(("name", "clients", "faults"), [
    ("free before drain", 2, 1),
    ("stuck busy mark", 1, 1),
    ("skipped roll-back", 1, 2),
    ("double count at the borrow", 1, 1),
    ("copy forgotten", 1, 1),
])  # fmt: skip
def test_a_planted_fault_is_found_and_its_script_leads_there(name: str, clients: int, faults: int) -> None:
    mutant = next(mutant for mutant in MUTANTS if mutant.name == name)
    with planted(mutant.edits, "sessile.sim.closure") as closure:
        task = closure.Task(closure.Shape(3, 3, clients), faults)
        violation = closure.explore(task).violation
        assert violation is not None
        world = closure.SmallWorld(task.shape)
        for action in violation.script[:-1]:
            world.do(action)
        with pytest.raises(Exception, match=r".") as raised:
            world.do(violation.script[-1])
        assert violation.message.startswith(str(raised.value))


def test_a_turn_that_is_never_answered_is_found() -> None:
    idle = Edit("sessile.core.machine", "        planned = self._planned()\n", "        planned = None\n")
    with planted([idle], "sessile.sim.closure") as closure:
        violation = closure.explore(closure.Task(closure.Shape(3, 3, clients=1), 0)).violation
    assert violation is not None
    assert violation.checker == "liveness"
    assert [str(action) for action in violation.script] == ["and so on"]


def test_the_command_explores_and_says_what_it_found(capsys: pytest.CaptureFixture[str]) -> None:
    bounds = ["--faults", "0", "--faults-prompt", "1", "--faults-alone", "1"]
    assert run.main(["closure", "--pages", "3", *bounds, "--workers", "1"]) == 0
    printed = capsys.readouterr().out
    assert "2 clients, 3 pages of 3 tokens, 0 faults: 189 states" in printed
    assert "2 prompt clients, 3 pages of 3 tokens, 1 faults: 332 states" in printed
    assert "2 prompt clients, 3 pages of 3 tokens, 1 faults of the first: 202 states" in printed
    assert "1 client, 3 pages of 3 tokens, 1 faults: 108 states" in printed
    assert "no violation" in printed


def test_every_fault_can_be_committed() -> None:
    kinds = {action.kind for seed in range(20) for world in walk(Shape(3, 3), seed, 24) for action in world.actions()}
    assert {kind for kind in FAULTS if kind != "disconnect"} <= kinds


def test_a_copy_that_is_due_is_work_though_nobody_asks_for_a_token() -> None:
    world = SmallWorld(Shape(pages=4, page_size=2, clients=1))
    for action in (Action("send", 0), Action("turn"), Action("turn"), Action("turn"), Action("rewind", 0, 2)):
        world.do(action)
    assert world.default() == Action("turn")

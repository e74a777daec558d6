"""Small worlds to closure: every state that two clients, a few pages and the faults of both can lead to.

Breadth-first from two open sessions, over canonical states (canonical.py): from each, everything that may happen next
is tried on a copy of its own (twin.py), with all checks made after it. Each client has two turns of two tokens in and
two out, and commits each of {cancel, disconnect, close, retract, fork, rewind, demote} at most once, between any two
steps of the loop. The worlds of a pool:

  two clients          who send when they like, while steps settle when they like; `--faults` faults in all
  two prompt clients   who send as soon as they may; `--faults-prompt` faults in all
  one against another  two prompt clients, of whom the first commits all seven faults (`--faults-alone`), the other none
  one client           alone, who sends when it likes and commits all seven

All fourteen faults of two clients are beyond these: a client with all seven multiplies the states of a world by some
thousand, and a second one does so again.

A pool of 3 pages has pages of 3 tokens, the smallest in which a second turn fits: a first turn's KV is then exactly one
page, a second turn's two and a part. Pools of 4 to 6 have pages of 2: the first prompt fills a page, which both clients
share through the tree, a first turn ends in the middle of a page, and forks and rewinds copy. Two full sessions need 8
of these pages, so every pool but that of a lone client is short, and sessions lose their KV to each other too.

What a client may still commit decides what can follow, but never hinders it: a state is left aside if it was met before
with the same faults left, or more. So a state counts once, whatever was left. Liveness is shown for every state: if no
client commits a fault any more, exactly one thing happens next, and following it from any state ends where all turns
are answered; there every session that is left answers once more, and then all pages and rows are free.
"""

import argparse
import multiprocessing
import sys
import time
import traceback
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from sessile.sim.arguments import count
from sessile.sim.records import CheckFailed
from sessile.sim.small_world import FAULTS, Action, Shape, SmallWorld
from sessile.sim.twin import twin

_DONE, _OPEN = -1, -2
_REPORT_STATES = 5_000


@dataclass(frozen=True)
class Task:
    """A world to explore. faults_max: most faults on the way to a state, of the first `faulty` clients together."""

    shape: Shape
    faults_max: int
    faulty: int = 2

    def __str__(self) -> str:
        faulty = min(self.faulty, self.shape.clients)
        faults = min(self.faults_max, len(FAULTS) * faulty)
        return f"{self.shape}, {faults} faults{' of the first' if faulty < self.shape.clients else ''}"


@dataclass(frozen=True)
class Violation:
    """What was found wrong, and the shortest way there in faults, then in actions."""

    checker: str
    message: str
    script: tuple[Action, ...]


@dataclass(frozen=True)
class Closure:
    """What an exploration came to: it is complete unless there is a violation."""

    task: Task
    states: int
    transitions: int
    ends: int
    """States in which all turns are answered."""
    seconds: float
    """Of the processor."""
    violation: Violation | None


@dataclass
class _Visit:
    """A state that waits to be gone on from. left: a bit for each fault of each client that is not used up."""

    world: SmallWorld
    left: int
    index: int


class _Explorer:
    """The states found so far, by index in the order of their finding."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._indices: dict[bytes, int] = {}
        self._left: list[list[int]] = []
        """By state: the sets of faults left with which it was met, none within another."""
        self._came: list[tuple[int, Action] | None] = []
        self._next: list[int] = []
        """By state: what follows it without further faults."""
        self.transitions = 0
        self.ends = 0

    @property
    def states(self) -> int:
        """How many were found."""
        return len(self._next)

    def explore(self) -> Violation | None:
        """Until nothing new is found, or something wrong."""
        faulty = min(self._task.faulty, self._task.shape.clients)
        level = deque([_Visit(SmallWorld(self._task.shape), (1 << len(FAULTS) * faulty) - 1, 0)])
        self._meet(level[0].world.digest(), level[0].left, None)
        for faults in range(self._task.faults_max + 1):
            further: deque[_Visit] = deque()
            while level:
                failed = self._go_on(level.popleft(), level, further, is_last=faults == self._task.faults_max)
                if failed is not None:
                    return failed
            level = further
        return self._check_liveness()

    def _go_on(
        self, visit: _Visit, level: deque[_Visit], further: deque[_Visit], *, is_last: bool
    ) -> Violation | None:
        """Try all that may happen next. level, further: where states go that were reached without, or by, a fault."""
        default = visit.world.default()
        if default is None and self._next[visit.index] == _OPEN:
            failed = self._finish(visit)
            if failed is not None:
                return failed
        choices = self._choices(visit, is_last)
        for number, (action, left) in enumerate(choices, 1):
            # The last one may have the state itself: it is not needed any more.
            world = visit.world if number == len(choices) else twin(visit.world)
            try:
                world.do(action)
            except Exception as error:  # Whatever the core raises is a finding, and what it raised is reported.
                return _violation(error, self._script(visit.index, action))
            self.transitions += 1
            index, is_news = self._meet(world.digest(), left, (visit.index, action))
            if action == default:
                self._next[visit.index] = index
            if is_news:
                (further if action.is_fault else level).append(_Visit(world, left, index))
        return None

    def _choices(self, visit: _Visit, is_last: bool) -> list[tuple[Action, int]]:
        """What may happen next, each with the faults that are left then. is_last: no fault may be added."""
        choices = []
        for action in visit.world.actions():
            left = visit.left & ~_bit_of(action, visit.left) if action.is_fault else visit.left
            if not action.is_fault or (left != visit.left and not is_last):
                choices.append((action, left))
        return choices

    def _finish(self, visit: _Visit) -> Violation | None:
        self._next[visit.index] = _DONE
        self.ends += 1
        try:
            twin(visit.world).wind_down()
        except Exception as error:  # As above.
            return _violation(error, self._script(visit.index, Action("wind down")))
        return None

    def _meet(self, digest: bytes, left: int, came: tuple[int, Action] | None) -> tuple[int, bool]:
        """The index of a state, and whether it has to be gone on from."""
        index = self._indices.setdefault(digest, len(self._indices))
        if index == len(self._next):
            self._left.append([left])
            self._came.append(came)
            self._next.append(_OPEN)
            if index % _REPORT_STATES == 0 and sys.stderr.isatty():
                print(f"\r{self._task}: {index:,} states", end="\r", file=sys.stderr, flush=True)
            return index, True
        known = self._left[index]
        if any(left | other == other for other in known):
            return index, False
        self._left[index] = [*(other for other in known if left | other != left), left]
        return index, True

    def _check_liveness(self) -> Violation | None:
        """Follow each state to the end: no way may come back to itself."""
        ends = [following == _DONE for following in self._next]
        for index in range(len(ends)):
            way = []
            while not ends[index]:
                ends[index] = True
                way.append(index)
                index = self._next[index]
                if index in way:
                    script = self._script(way[0], Action("and so on"))
                    return Violation("liveness", "without further faults the turns are never answered", script)
        return None

    def _script(self, index: int, last: Action) -> tuple[Action, ...]:
        script = [last]
        while (came := self._came[index]) is not None:
            index, action = came
            script.append(action)
        return tuple(reversed(script))


def _bit_of(action: Action, left: int) -> int:
    """The fault that an action uses up: a second cancel is a disconnect, which is the same to the core."""
    first = action.client * len(FAULTS)
    fault = FAULTS.index(action.kind)
    if action.kind == "cancel" and not left >> first + fault & 1:
        fault = FAULTS.index("disconnect")
    return 1 << first + fault


def _violation(error: Exception, script: tuple[Action, ...]) -> Violation:
    if isinstance(error, CheckFailed):
        return Violation(error.checker, str(error), script)
    place = traceback.extract_tb(error.__traceback__)[-1]
    message = f"{error or place.line} ({Path(place.filename).name}:{place.lineno})"
    return Violation(type(error).__name__, message, script)


def explore(task: Task) -> Closure:
    """Explore one world to its closure. A top-level function, so that worker processes can be given it."""
    started_s = time.process_time()
    explorer = _Explorer(task)
    violation = explorer.explore()
    seconds = time.process_time() - started_s
    return Closure(task, explorer.states, explorer.transitions, explorer.ends, seconds, violation)


def tasks_of(pools: Sequence[int], faults_max: int, faults_prompt_max: int, faults_alone_max: int) -> list[Task]:
    """The worlds of these pools, those that take longest first."""
    sizes = [(pages, 3 if pages == 3 else 2) for pages in pools]
    return [
        *(Task(Shape(*size, prompt=True), faults_prompt_max) for size in sizes),
        *(Task(Shape(*size), faults_max) for size in sizes),
        *(Task(Shape(*size, prompt=True), faults_alone_max, faulty=1) for size in sizes),
        *(Task(Shape(*size, clients=1), faults_alone_max, faulty=1) for size in sizes),
    ]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of `python -m sessile.sim closure`."""
    parser.add_argument("--pages", type=int, nargs="+", default=[3, 4, 5, 6], help="pools, in pages, 3 or more")
    parser.add_argument("--faults", type=int, default=2, help="most faults of two clients together, up to 14")
    parser.add_argument("--faults-prompt", type=int, default=4, help="most faults of two prompt clients, up to 14")
    parser.add_argument("--faults-alone", type=int, default=7, help="most faults where only one commits any, up to 7")
    parser.add_argument("--workers", type=count, default=2, help="processes")


def main(options: argparse.Namespace) -> int:
    """Explore all worlds and print what they came to; the exit code: 0 if nothing was found."""
    started_s = time.perf_counter()
    tasks = tasks_of(options.pages, options.faults, options.faults_prompt, options.faults_alone)
    found: list[Closure] = []
    for closure in run_tasks(tasks, options.workers):
        found.append(closure)
        _print(closure)
    states = sum(closure.states for closure in found)
    failed = sum(closure.violation is not None for closure in found)
    verdict = f"{failed} FAILED" if failed else "no violation"
    print(f"{len(found)} worlds, {states:,} states, {time.perf_counter() - started_s:.0f} s: {verdict}")
    return 1 if failed else 0


def run_tasks(tasks: Sequence[Task], workers: int) -> Iterator[Closure]:
    """Closures in the order of the tasks."""
    if workers <= 1 or len(tasks) == 1:
        yield from map(explore, tasks)
        return
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        yield from pool.imap(explore, tasks)


def _print(closure: Closure) -> None:
    violation = closure.violation
    print(f"{closure.task}: {closure.states:,} states, {closure.transitions:,} transitions, "
          f"{closure.ends:,} ends, {closure.seconds:.0f} s of processor time", flush=True)
    if violation is not None:
        print(f"VIOLATION ({violation.checker}): {violation.message}\n  {'; '.join(map(str, violation.script))}")

"""Whether an engine moves, by its own answers (H54)."""

import asyncio
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from sessile.contract.messages import Stats
from sessile.errors import NotReady
from sessile.server import pulse
from sessile.server.pulse import Pulse

BUSY = {"requests_running": 2}
IDLE = {"requests_running": 0}


def stats(settled_steps: int, **figures: int) -> Stats:
    empty: dict[Any, Any] = {int: 0, float: 0.0}
    fields: dict[str, Any] = {each.name: empty.get(each.type, {}) for each in msgspec.structs.fields(Stats)}
    return Stats(**(fields | {"settled_steps_total": settled_steps} | figures))


class Engine:
    """What answers: `answer` gives the figures, or None for no answer at all."""

    def __init__(self, answer: Callable[[int], Stats | None]) -> None:
        self._answer = answer
        self._asked = 0

    async def ask(self, make: object) -> Stats:
        self._asked += 1
        given = self._answer(self._asked)
        if given is None:
            await asyncio.get_running_loop().create_future()
        assert given is not None
        return given


def stalls(answer: Callable[[int], Stats | None], monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether an engine that answers so is found to stand still, within eight times what that takes."""
    monkeypatch.setattr(pulse, "ASK_EVERY_S", 0.02)
    monkeypatch.setattr(pulse, "TICK_S", 0.01)
    watch = Pulse(Engine(answer), stall_timeout_s=0.1)  # type: ignore[arg-type]

    async def main() -> bool:
        try:
            await asyncio.wait_for(watch.wait_stalled(), 0.8)
        except TimeoutError:
            return False
        return watch.is_stalled

    return asyncio.run(main())


def test_an_engine_that_does_not_answer_stands_still(monkeypatch: pytest.MonkeyPatch) -> None:
    assert stalls(lambda n: None, monkeypatch)


def test_an_engine_that_answers_and_settles_nothing_stands_still(monkeypatch: pytest.MonkeyPatch) -> None:
    assert stalls(lambda n: stats(7, **BUSY), monkeypatch)


def test_an_engine_with_nothing_to_do_does_not_stand_still(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not stalls(lambda n: stats(7, **IDLE), monkeypatch)


def test_an_engine_that_settles_steps_does_not_stand_still(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not stalls(lambda n: stats(n, **BUSY), monkeypatch)


def test_an_engine_that_is_gone_is_somebody_elses_affair(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(n: int) -> Stats:
        raise NotReady("gone")

    assert not stalls(gone, monkeypatch)


def test_time_in_which_this_process_did_not_run_is_not_the_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pulse, "TICK_S_MAX", 0.001)  # every tick seems late, as after a stop
    assert not stalls(lambda n: None, monkeypatch)

"""When the next engine is started, and when none is any more."""

import asyncio
from typing import Any

import pytest

from sessile.errors import NotReady
from sessile.server import supervision
from sessile.server.config import ServerOptions
from sessile.server.supervision import Supervisor
from tests.http.fake_engine import READY

PATIENCE_S = 20.0


class Engine:
    """A process that ends when it is killed. stands: whether it comes up, and dies then."""

    address = "ipc://nowhere"

    def __init__(self, stands: bool) -> None:
        self.stands = stands
        self._ended = asyncio.Event()

    async def exit(self) -> int:
        if not self.stands:
            await self._ended.wait()
        await asyncio.sleep(0.05)
        return 1

    async def stacks(self) -> str:
        return ""

    def kill(self) -> None:
        self._ended.set()


class Link:
    """The way to whichever engine was launched last."""

    def __init__(self) -> None:
        self.engine = Engine(stands=True)
        self._failed = asyncio.Event()
        self.failure: str | None = None

    async def wait_ready(self) -> Any:
        if not self.engine.stands:
            await asyncio.get_running_loop().create_future()
        return READY

    async def ask(self, make: object) -> Any:
        await self.wait_failed()
        raise NotReady("gone")

    def fail(self, reason: str) -> None:
        self.failure = self.failure or reason
        self._failed.set()

    async def wait_failed(self) -> str:
        await self._failed.wait()
        assert self.failure is not None
        return self.failure

    async def reopen(self, address: str) -> None:
        self.failure = None
        self._failed.clear()


def run_through(monkeypatch: pytest.MonkeyPatch, *stands: bool) -> int:
    """Supervise engines of which these stand up, then die, and the others hang; how many were started in their place.

    Each takes far longer to fall than falls are remembered.
    """
    monkeypatch.setattr(supervision, "RESTARTS_WINDOW_S", 0.01)
    monkeypatch.setattr(supervision, "PAUSE_S", 0.001)
    monkeypatch.setattr(supervision, "KILL_AFTER_S", 0.2)
    monkeypatch.setattr(supervision, "LAST_WORDS_S", 0.01)

    async def main() -> int:
        link, rest = Link(), list(stands)
        link.engine = Engine(rest.pop(0))

        class Launcher:
            def launch(self) -> Engine:
                assert rest, "another engine was started"
                link.engine = Engine(rest.pop(0))
                return link.engine

        options = ServerOptions(engine_restarts_max=2, engine_start_timeout_s=0.1)
        supervisor = Supervisor(link, Launcher(), link.engine, options, lambda: None)  # type: ignore[arg-type]
        await asyncio.wait_for(supervisor.run(), PATIENCE_S)
        return supervisor.restarts

    return asyncio.run(main())


def test_an_engine_that_hangs_at_each_later_start_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_through(monkeypatch, True, False, False, False, False) == 2


def test_an_engine_that_falls_seldom_is_replaced_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AssertionError, match="another engine was started"):
        run_through(monkeypatch, True, True, True, True, True)


def test_an_engine_that_never_stood_is_not_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_through(monkeypatch, False, True) == 0

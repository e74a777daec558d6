"""Keeps an engine behind the link: watches one after the other, and starts the next when one has died or stands still.

Clients of an engine that is gone get its reason at once; those that come before the next one is there get 503. Sessions
come back with their tokens as far as they are held (histories.py). Who falls again and again is not started any more.
"""

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Callable

from sessile.contract.messages import EngineReady, Shutdown
from sessile.contract.watching import EXIT_CANNOT_START
from sessile.errors import NotReady
from sessile.server.config import ServerOptions
from sessile.server.engine_process import KILL_AFTER_S, EngineProcess, Launcher, describe_exit
from sessile.server.link import EngineLink
from sessile.server.pulse import Pulse

LAST_WORDS_S = 2.0
"""How long after the engine's exit its last message, the reason, may take to be read."""
PROGRESS_AFTER_S, PROGRESS_EVERY_S = 2.0, 10.0
RESTARTS_WINDOW_S = 600.0
"""Restarts are counted over so long."""
PAUSE_S = 0.5
"""Before the first restart; each further one of the window waits twice as long as the one before."""
PAUSE_S_MAX = 30.0

log = logging.getLogger("sessile.server")


class Supervisor:
    """Owns the engine processes of one server; not the link. For one run only."""

    def __init__(
        self,
        link: EngineLink,
        launcher: Launcher,
        engine: EngineProcess,
        options: ServerOptions,
        note_replaced: Callable[[], None],
    ) -> None:
        """engine: the first one, started already. note_replaced: called whenever another is on its way."""
        self.engine = engine
        self.pulse = Pulse(link, options.stall_timeout_s)
        self.restarts = 0
        """Engines started after the first."""
        self.cannot_start = False
        """Whether the first engine ended, as any other would: a flag, a setting or a file is wrong."""
        self._link = link
        self._launcher = launcher
        self._options = options
        self._note_replaced = note_replaced
        self._falls_s: deque[float] = deque()
        self._was_ready = False
        """Whether any engine ever was."""
        self._stood = False
        """Whether the one that is watched, or has just fallen, was."""
        self._stopping = asyncio.Event()

    async def run(self) -> str:
        """Keep an engine there until it is gone for good; why it is."""
        while True:
            await self._see_through()
            reason = self._link.failure
            assert reason is not None
            if self._stopping.is_set() or not self._may_restart():
                return reason
            pause_s = min(PAUSE_S_MAX, PAUSE_S * 2 ** (len(self._falls_s) - 1))
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), pause_s)
                return reason
            self.restarts += 1
            log.warning("starting another engine", extra={"restarts": self.restarts, "reason": reason})
            self.engine = self._launcher.launch()
            await self._link.reopen(self.engine.address)
            self._note_replaced()

    def shut_down(self) -> None:
        """End the engine in order: it is not replaced."""
        self._stopping.set()
        try:
            self._link.check_ready()
            self._link.send(Shutdown())  # whatever is left ends as an abort
        except NotReady:
            self.engine.terminate()  # it does not read messages yet

    def _may_restart(self) -> bool:
        """Whether another engine may be started for the one that has just fallen. If none ever stood, it may not.

        Falls are forgotten with time, but not when an engine falls at its start: one that hangs there takes so long to
        be given up that it would be started for ever.
        """
        now_s = asyncio.get_running_loop().time()
        self._falls_s.append(now_s)
        while self._stood and now_s - self._falls_s[0] > RESTARTS_WINDOW_S:
            self._falls_s.popleft()
        if self._was_ready and len(self._falls_s) > self._options.engine_restarts_max > 0:
            how = f"within {RESTARTS_WINDOW_S / 60:g} minutes" if self._stood else "and does not come up any more"
            log.error(f"the engine has fallen {len(self._falls_s)} times {how}: no more (--engine-restarts-max)")
        return self._was_ready and len(self._falls_s) <= self._options.engine_restarts_max

    async def _see_through(self) -> None:
        """Watch one engine to its end, and see to it that link and process are both gone then."""
        self._stood = False
        loop = asyncio.get_running_loop()
        exited = loop.create_task(self.engine.exit())
        stalled = loop.create_task(self._watch_start_and_pulse())
        failed = loop.create_task(self._link.wait_failed())
        try:
            await asyncio.wait({exited, stalled, failed}, return_when=asyncio.FIRST_COMPLETED)
            if exited.done():
                await self._note_exit(exited.result())
            elif stalled.done() and self._link.failure is None:
                await stalled  # raises what went wrong with the watching
                self._link.fail(self._why_stalled())
                await self._log_stacks()
            await self._bury(exited)
            self.cannot_start = not self._was_ready and exited.result() == EXIT_CANNOT_START
        finally:
            self.pulse.still_s = 0.0
            for task in (exited, stalled, failed):
                task.cancel()
            await asyncio.gather(exited, stalled, failed, return_exceptions=True)

    async def _note_exit(self, code: int) -> None:
        if code > 0:  # it had time to say why
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._link.wait_failed(), LAST_WORDS_S)
        stopped = self._stopping.is_set() and code == 0
        self._link.fail("the server was stopped" if stopped else f"the engine process {describe_exit(code)}")
        if code < 0:
            await self._log_stacks()

    def _why_stalled(self) -> str:
        if self.pulse.is_stalled:
            return f"the engine stood still for {self.pulse.stall_timeout_s:g} s (--stall-timeout-s)"
        return f"the engine was not ready after {self._options.engine_start_timeout_s:g} s (--engine-start-timeout-s)"

    async def _log_stacks(self) -> None:
        if stacks := await self.engine.stacks():
            log.error("where the engine was", extra={"stacks": stacks})

    async def _bury(self, exited: "asyncio.Task[int]") -> None:
        """An engine that has failed ends by itself, or is ended. Raises TimeoutError if the system does not let go."""
        if self.pulse.is_stalled:
            self.engine.kill()
        await asyncio.wait({exited}, timeout=KILL_AFTER_S)
        if not exited.done():
            self.engine.kill()
            await asyncio.wait_for(asyncio.shield(exited), KILL_AFTER_S)

    async def _watch_start_and_pulse(self) -> None:
        """Returns when the engine took too long to start, or stands still."""
        if (ready := await self._wait_ready()) is None:
            return
        self._was_ready = self._stood = True
        log.info(f"the engine is ready: {ready.model_name} ({ready.dtype} on {ready.device})")
        await self.pulse.wait_stalled()
        if not self.pulse.is_stalled:
            await self._link.wait_failed()

    async def _wait_ready(self) -> EngineReady | None:
        """Say that we wait, now and then; None if it took too long."""
        limit_s = self._options.engine_start_timeout_s
        waiting = asyncio.create_task(self._link.wait_ready())
        waited_s, pause_s = 0.0, PROGRESS_AFTER_S
        try:
            while waited_s < limit_s:
                done, _ = await asyncio.wait({waiting}, timeout=min(pause_s, limit_s - waited_s))
                if done:
                    return waiting.result()
                waited_s += pause_s
                pause_s = PROGRESS_EVERY_S
                log.info(f"the engine is starting, {waited_s:.0f} s so far")
        except NotReady:
            await self._link.wait_failed()
        finally:
            waiting.cancel()
        return None

"""Whether the engine moves: how long the server has seen no progress of it, by the engine's own answers.

An idle engine that answers moves. One that has work moves when steps settle. The step loop itself answers, so that
whatever holds it up shows here, be it a device that hangs or a stopped process (H54).
"""

import asyncio
import contextlib

from sessile.contract.messages import GetStats, Stats
from sessile.errors import NotReady
from sessile.server.link import EngineLink

TICK_S = 0.25
ASK_EVERY_S = 1.0
TICK_S_MAX = 2 * TICK_S
"""What a tick counts as at most: if this process was stopped, or the machine slept, the engine is not to blame."""


class Pulse:
    """Asks for figures once a second. Its only writer is the event loop."""

    def __init__(self, link: EngineLink, stall_timeout_s: float) -> None:
        self.still_s = 0.0
        """How long nothing has moved though something should."""
        self.stall_timeout_s = stall_timeout_s
        self._link = link
        self._settled_steps = -1
        self._moves = True
        """What the last answer showed."""

    @property
    def is_stalled(self) -> bool:
        """Whether nothing has moved for so long that the engine is given up."""
        return self.still_s >= self.stall_timeout_s

    def note(self, stats: Stats) -> None:
        """The engine has answered."""
        has_work = stats.requests_running or stats.requests_waiting or stats.requests_draining
        self._moves = not has_work or stats.settled_steps_total != self._settled_steps
        if self._moves:
            self.still_s = 0.0
        self._settled_steps = stats.settled_steps_total

    async def wait_stalled(self) -> None:
        """Watch one engine, from its first message on, until it has stood still for too long, or is gone."""
        self.still_s, self._settled_steps, self._moves = 0.0, -1, True
        loop = asyncio.get_running_loop()
        answer: asyncio.Task[Stats] | None = None
        try:
            asked_s = loop.time() - ASK_EVERY_S
            while not self.is_stalled:
                if answer is None and loop.time() - asked_s >= ASK_EVERY_S:
                    answer, asked_s = loop.create_task(self._link.ask(GetStats)), loop.time()
                ticked_s = loop.time()
                await (asyncio.wait({answer}, timeout=TICK_S) if answer else asyncio.sleep(TICK_S))
                if answer is not None or not self._moves:
                    self.still_s += min(loop.time() - ticked_s, TICK_S_MAX)
                if answer is not None and answer.done():
                    self.note(answer.result())
                    answer = None
        except NotReady:
            return  # whoever watches its process knows more
        finally:
            if answer is not None:
                answer.cancel()
                with contextlib.suppress(asyncio.CancelledError, NotReady):
                    await answer

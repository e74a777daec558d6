"""An engine process with a scripted machine and device: `python -m tests.unit.engine_child ADDRESS MODE`.

MODE: "idle" has nothing to do, "busy" has steps for ever, "fails" has a device that breaks at the first step, "hangs"
one that never ends it, "refuses" cannot start, "starves" cannot now, "mute" has nothing to do and a log that fails.
"""

import logging
import signal
import sys
import time

from sessile.contract.messages import EngineReady
from sessile.contract.plan import StepPlan
from sessile.engine.clock import Clock
from sessile.engine.process import Server, run_engine
from sessile.errors import MachineLacks, StartupError
from tests.unit.scripted_engine import ManualClock, ScriptedDevice, ScriptedMachine, ScriptedTicket

READY = EngineReady(
    model_name="scripted",
    model_path="scripted",
    architecture="none",
    dtype="none",
    device="none",
    vocab_size=2,
    context_tokens=2,
    page_size=1,
    pages_total=3,
    rows_max=1,
    chunk_tokens=1,
    kv_bytes=0,
    weight_bytes=0,
    start_s=0.0,
)


class BreakingDevice(ScriptedDevice):
    def launch(self, plan: StepPlan) -> ScriptedTicket:
        raise MemoryError("out of memory\nand more lines")


class SlowDevice(ScriptedDevice):
    def launch(self, plan: StepPlan) -> ScriptedTicket:
        time.sleep(0.001)
        self.log.clear()
        return super().launch(plan)


class HangingDevice(ScriptedDevice):
    def launch(self, plan: StepPlan) -> ScriptedTicket:
        return self.ticket_that_never_comes()

    def ticket_that_never_comes(self) -> ScriptedTicket:
        while True:
            time.sleep(0.01)


class FailingHandler(logging.Handler):
    def flush(self) -> None:
        raise OSError(22, "Invalid argument")


class ScriptedEngine:
    """What `run_engine` needs of an engine."""

    def __init__(self, mode: str) -> None:
        steps = {"busy": 10**9, "fails": 1, "hangs": 1}.get(mode, 0)
        kind = {"fails": BreakingDevice, "hangs": HangingDevice}.get(mode, SlowDevice)
        self.machine = ScriptedMachine([], steps_left=steps)
        self.device = kind([], ManualClock())
        self.ready = READY

    def close(self) -> None:
        self.device.close()

    def loop(self, *ends: object, just_in_time: bool) -> object:
        from sessile.engine.loop import EngineLoop

        inbox, outbox, clock, collector = ends
        return EngineLoop(self.machine, self.device, inbox, outbox, clock, collector=collector)  # type: ignore[arg-type]


def main(address: str, mode: str) -> int:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if mode == "mute":
        logging.getLogger().addHandler(FailingHandler())
    server = Server()
    server.watch()

    def open_engine(clock: Clock) -> ScriptedEngine:
        if mode == "refuses":
            raise StartupError("no model at nowhere")
        if mode == "starves":
            raise MachineLacks("too little memory")
        return ScriptedEngine(mode)

    return run_engine(address, open_engine, server)  # type: ignore[arg-type]


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

"""The engine as a process, as `sessile.server.run.serve` starts it: a fake; in mode "toy" the core on a toy device.

In modes "fails" and "refuses" it is a true one that cannot start: now, or at all.
"""

import json
import os
import signal
import sys
import threading
import time

from sessile.engine.build import Engine
from sessile.engine.clock import Clock
from sessile.engine.process import run_engine, stacks_on_request
from sessile.errors import MachineLacks, StartupError
from tests.http.fake_engine import FakeEngine
from tests.http.toy_engine import ToyEngine


def main(address: str) -> int:
    """Its mode comes as JSON on standard input, whose end ends it."""
    mode = json.loads(sys.stdin.readline())["mode"]
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if mode in ("fails", "refuses"):
        return run_engine(address, cannot_open_now if mode == "fails" else cannot_open)
    with stacks_on_request(address):
        return run(address, mode)


def cannot_open_now(clock: Clock) -> Engine:
    raise MachineLacks("no page fits into the memory: lower --kv-memory")


def cannot_open(clock: Clock) -> Engine:
    raise StartupError("--quantize fp8 works on a GPU only; use --quantize int8.")


def run(address: str, mode: str) -> int:
    if mode == "silent":
        time.sleep(60)
    if mode == "toy":
        threading.Thread(target=exit_with_stdin, daemon=True).start()
        ToyEngine(address, vocab_size=128, drafts_max=7, rows_max=16, audit_level=1, pages=2000).run()
        return 0
    engine = FakeEngine(address)
    engine.script = [ord("x")] * 400
    engine.token_interval_s = 0.01  # slow enough for a test to act while 300 tokens come
    engine.start()
    threading.Thread(target=exit_with_stdin, daemon=True).start()
    engine.join()
    return 0


def exit_with_stdin() -> None:
    while os.read(0, 4096):
        pass
    os._exit(3)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1].removeprefix("--address=")))

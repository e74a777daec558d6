"""The engine as a child process: started with its configuration on standard input, watched until it ends."""

import asyncio
import contextlib
import itertools
import signal
import subprocess
import threading
from collections.abc import Sequence

from sessile.contract.watching import STACKS_SIGNAL, TELL_EVENTS, stacks_file

KILL_AFTER_S = 5.0
STACKS_WAIT_S, STACKS_WAIT_S_MAX = 1.0, 5.0
"""How long an engine that stands still has to write down where, and its last events; longer if it has not begun to."""
STACKS_LOOK_S = 0.1
STACKS_CHARS_MAX = 64_000


class Launcher:
    """Starts engines, one after the other, each with a link of its own below a private folder."""

    def __init__(self, argv: Sequence[str], config: str, folder: str) -> None:
        self._argv = argv
        self._config = config
        self._folder = folder
        self._numbers = itertools.count(1)
        self._newest: EngineProcess | None = None

    def launch(self) -> "EngineProcess":
        """Start an engine that will connect to its `address`."""
        self._newest = EngineProcess(self._argv, self._config, f"ipc://{self._folder}/engine-{next(self._numbers)}")
        return self._newest

    def stop(self) -> None:
        """Make sure that the newest one is gone; another is only started where those before it are."""
        if self._newest is not None:
            self._newest.stop()


class EngineProcess:
    """Owns one child. Its standard input stays open as long as we live: its end tells the child that we are gone."""

    def __init__(self, argv: Sequence[str], config: str, address: str) -> None:
        """config: one line of JSON, the first thing the child reads. address: goes to it as `--address=ipc://…`."""
        assert "\n" not in config, "the configuration must be one line"
        self.address = address
        self._process = subprocess.Popen([*argv, f"--address={address}"], stdin=subprocess.PIPE)
        assert self._process.stdin is not None
        self._stdin = self._process.stdin
        with contextlib.suppress(BrokenPipeError):  # it has died already: `exit` says how
            self._stdin.write(config.encode() + b"\n")
            self._stdin.flush()

    @property
    def pid(self) -> int:
        """Process id of the child."""
        return self._process.pid

    async def exit(self) -> int:
        """Wait for the child's end; its return code, negative for a signal."""
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[int] = loop.create_future()

        def tell(code: int) -> None:
            if not ended.done():
                ended.set_result(code)

        def watch() -> None:
            code = self._process.wait()
            if not loop.is_closed():
                loop.call_soon_threadsafe(tell, code)

        # A daemon, unlike the threads of asyncio.to_thread: it must not keep us from exiting.
        threading.Thread(target=watch, name="engine-watch", daemon=True).start()
        return await ended

    async def stacks(self) -> str:
        """Where each thread of it is now, in Python's words, or was when it crashed; empty if nobody can say.

        It is also asked to log its last events. A process that was stopped goes on for this: whoever asks is about to
        end it.
        """
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGCONT)
            self._process.send_signal(STACKS_SIGNAL)
            with contextlib.suppress(OSError):  # a pipe that nobody empties is full at some time
                self._stdin.write(TELL_EVENTS)
                self._stdin.flush()
            await asyncio.sleep(STACKS_WAIT_S)
            for _ in range(int((STACKS_WAIT_S_MAX - STACKS_WAIT_S) / STACKS_LOOK_S)):
                if self._written_stacks() or self._process.poll() is not None:
                    break
                await asyncio.sleep(STACKS_LOOK_S)
        return self._written_stacks()

    def _written_stacks(self) -> str:
        with contextlib.suppress(FileNotFoundError):  # it was not far enough to make it
            return stacks_file(self.address).read_text("utf-8", "replace")[-STACKS_CHARS_MAX:]
        return ""

    def kill(self) -> None:
        """End the child at once, whatever it does."""
        self._process.kill()

    def terminate(self) -> None:
        """Ask the child to end."""
        self._process.terminate()

    def stop(self) -> None:
        """Make sure that the child is gone: end of input first, then by force."""
        if self._process.poll() is None:
            self._process.terminate()
        with contextlib.suppress(BrokenPipeError):  # what was still buffered has no reader any more
            self._stdin.close()
        try:
            self._process.wait(KILL_AFTER_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def describe_exit(code: int) -> str:
    """How a process ended, for people."""
    if code < 0:
        return f"was killed by signal {-code} ({signal.Signals(-code).name})"
    return f"exited with status {code}"

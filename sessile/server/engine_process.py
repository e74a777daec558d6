"""The engine as a child process: started with its configuration on standard input, watched until it ends."""

import asyncio
import contextlib
import signal
import subprocess
import threading
from collections.abc import Sequence

KILL_AFTER_S = 5.0


class EngineProcess:
    """Owns one child. Its standard input stays open as long as we live: its end tells the child that we are gone."""

    def __init__(self, argv: Sequence[str], config: str) -> None:
        """config: one line of JSON, the first thing the child reads."""
        assert "\n" not in config, "the configuration must be one line"
        self._process = subprocess.Popen(argv, stdin=subprocess.PIPE)
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

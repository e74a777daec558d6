"""The engine's own process: from the first connection to the exit status."""

import contextlib
import faulthandler
import gc
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator

import zmq

from sessile.contract.messages import EngineFailed
from sessile.contract.watching import EXIT_CANNOT_START, STACKS_SIGNAL, stacks_file
from sessile.engine.build import Engine
from sessile.engine.clock import Clock, MonotonicClock
from sessile.engine.garbage import IdleCollector
from sessile.engine.inbox import SocketInbox
from sessile.engine.loop import EngineLoop
from sessile.engine.outbox import SocketOutbox
from sessile.errors import MachineLacks, StartupError

LINGER_MS = 3_000
"""How long a last message may take to leave before the process exits."""
SIGTERM_DRAIN_S = 30.0

EXIT_FAILED = 1
EXIT_ORPHANED = 3

log = logging.getLogger("sessile.engine")


class Server:
    """The server at the other end of standard input: its lines ask for the last events, its end ends this process.

    A daemon thread reads the file descriptor itself: one that waits inside sys.stdin would hold its lock when the
    interpreter exits.
    """

    def __init__(self) -> None:
        self.tell_events: Callable[[], None] | None = None
        """Logs the last events; None as long as there are none."""

    def watch(self) -> None:
        """From now on, answer its lines, and exit as soon as it is gone."""
        threading.Thread(target=self._read, name="server-watch", daemon=True).start()

    def _read(self) -> None:
        try:
            while os.read(sys.stdin.fileno(), 4096):
                if self.tell_events is not None:
                    self.tell_events()
            log.error("the server is gone; so is this engine")
            for handler in logging.getLogger().handlers:
                handler.flush()
        except Exception:
            traceback.print_exc()  # by the log it could fail again
        finally:
            # Whatever happens to the log: nobody else would end an engine without a server.
            os._exit(EXIT_ORPHANED)


def run_engine(address: str, open_engine: Callable[[Clock], Engine], server: Server | None = None) -> int:
    """Connect to the server at address (ipc://…), open the engine, drive it until it is told to stop.

    Returns the exit status. Whatever fails is told to the server first, as EngineFailed; StartupErrors in their own
    words, everything else with a traceback in the log. server: learns how to ask for the last events.
    """
    with stacks_on_request(address):
        return _run_engine(address, open_engine, server or Server())


@contextlib.contextmanager
def stacks_on_request(address: str) -> Iterator[None]:
    """Write the stacks of all threads to the file that the server looks into, when it asks and when we crash."""
    with stacks_file(address).open("w") as file:
        faulthandler.enable(file)
        faulthandler.register(STACKS_SIGNAL, file)
        try:
            yield
        finally:
            faulthandler.unregister(STACKS_SIGNAL)
            faulthandler.disable()


def _run_engine(address: str, open_engine: Callable[[Clock], Engine], server: Server) -> int:
    clock = MonotonicClock()
    context = zmq.Context(io_threads=1)
    socket = context.socket(zmq.PAIR)
    socket.set(zmq.RCVHWM, 0)  # What may wait is bounded by the server; a blocked one could not send a cancel.
    socket.connect(address)
    outbox = SocketOutbox(socket)
    try:
        engine = open_engine(clock)
        server.tell_events = lambda: log.error("the last events", extra={"events": engine.machine.event_lines()})
        gc.freeze()  # What start-up made stays. Looking at it all once more would keep the first request waiting.
        drive(engine, SocketInbox(socket), outbox, clock)
    except StartupError as error:
        outbox.send(EngineFailed(str(error)))
        return EXIT_FAILED if isinstance(error, MachineLacks) else EXIT_CANNOT_START
    except Exception as error:
        log.exception("the engine failed")
        outbox.send(EngineFailed(f"the engine failed: {type(error).__name__}: {first_line(error)}"))
        return EXIT_FAILED
    finally:
        socket.close(linger=LINGER_MS)
        context.term()
    return 0


def drive(engine: Engine, inbox: SocketInbox, outbox: SocketOutbox, clock: Clock) -> None:
    """Say that the engine is ready, run its loop to its end, with SIGTERM as a drain, then close the device."""
    collector = IdleCollector()
    loop = engine.loop(inbox, outbox, clock, collector, just_in_time=True)
    drain_on_sigterm(loop)
    outbox.send(engine.ready)  # Not before a signal would be a drain.
    collector.take_over()
    try:
        loop.run()
    except Exception:
        log.error("the last events before the failure", extra={"events": engine.machine.event_lines()})
        raise
    finally:
        collector.release()
        engine.close()


def drain_on_sigterm(loop: EngineLoop) -> None:
    """SIGTERM ends the loop as a shutdown message does."""
    signal.signal(signal.SIGTERM, lambda number, frame: loop.begin_shutdown(SIGTERM_DRAIN_S))


def first_line(error: BaseException) -> str:
    """The first line of an error's message: a reason for a client, not a report."""
    lines = str(error).splitlines()
    return lines[0] if lines else "no message"

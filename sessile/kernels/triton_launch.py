"""How kernels are launched, so that a server's first start compiles many of them side by side."""

import contextlib
import gc
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextvars import ContextVar
from functools import partial
from typing import Any, NoReturn

import torch
import triton

log = logging.getLogger("sessile.kernels")

_COMPILERS_MAX = 16
_NUMBER_BYTES = 2
_JOBS_MAX = (1 << 16) // _NUMBER_BYTES
"""As many numbers as a pipe holds."""
_asked: ContextVar[list[Any] | None] = ContextVar("asked", default=None)


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Run a kernel on a grid; within `compiled_together` only have it compiled."""
    asked = _asked.get()
    if asked is None:
        kernel[grid](*arguments, **options)
    else:
        asked.append(kernel.warmup(*arguments, grid=grid, **options))


@contextlib.contextmanager
def compiled_together(processes: int) -> "Iterator[ForkedCalls]":
    """Within it, what `launch` is asked for is only noted; at its end all is compiled by several processes and loaded.

    What was noted before `ForkedCalls.begin` is compiled while more is asked for. The caller has no other thread at
    work that forked processes would have to wait for.
    """
    asked: list[Any] = []
    calls = ForkedCalls(min(processes, _COMPILERS_MAX), also=_build_launcher)
    token = _asked.set(asked)
    try:
        with triton.AsyncCompileMode(calls):
            try:
                yield calls
            finally:
                calls.finish()  # Whatever happens: Triton waits for every result that it was promised.
    finally:
        _asked.reset(token)
    # Whoever first asks a kernel for its `run` loads it, and some releases of Triton build its launcher then, with a C
    # compiler, unless they find it in their cache. The interpreter has nothing to load.
    kernels = {id(kernel): kernel for kernel in asked if kernel is not None}
    with ThreadPoolExecutor(min(processes, _COMPILERS_MAX), initializer=_use_device_of_caller()) as pool:
        list(pool.map(_load, kernels.values()))


class ForkedCalls(Executor):
    """Calls that are made by forked processes, for what they leave in files, and then once more here.

    So compiling does not wait in line for Python's lock, and what was compiled is found in Triton's cache. A call that
    fails there fails here too, and is told by its future. Owns the processes from `begin` to `finish`.
    """

    def __init__(self, processes: int, also: Callable[[Any], object] = lambda result: None) -> None:
        """also: what the processes, and they alone, do with the result of each call."""
        self._processes = processes
        self._also = also
        self._jobs: list[tuple[Callable[[], Any], Future[Any]]] = []
        self._begun = 0
        self._children: list[int] = []

    def submit(self, function: Callable[..., Any], /, *arguments: Any, **options: Any) -> "Future[Any]":
        """Note a call; its result is there after `finish`."""
        future: Future[Any] = Future()
        self._jobs.append((partial(function, *arguments, **options), future))
        return future

    def begin(self) -> None:
        """Start processes that make the calls noted since the last time. Does not wait for them."""
        jobs = [self._there(job) for job, _ in self._jobs[self._begun :]]
        self._begun = len(self._jobs)
        self._children += start_children(jobs, self._processes)

    def _there(self, job: Callable[[], Any]) -> Callable[[], object]:
        return lambda: self._also(job())

    def finish(self) -> None:
        """Wait until all calls are made there, then make them here."""
        self.begin()
        try:
            while self._children:
                os.waitpid(self._children.pop(), 0)
        finally:
            for job, future in self._jobs:
                try:
                    future.set_result(job())
                except BaseException as error:
                    future.set_exception(error)


def start_children(jobs: Sequence[Callable[[], Any]], processes: int) -> list[int]:
    """Fork processes that make each call once, and return their numbers; the caller waits for them.

    They are forked although there is a CUDA context, which they do not touch: they call, collect no garbage, and end
    without clearing up.
    """
    assert len(jobs) <= _JOBS_MAX, f"{len(jobs)} jobs, and room for {_JOBS_MAX} in a pipe"
    # All numbers are in the pipe before anybody reads: each read takes one, and the end of the pipe is the end.
    reading, writing = os.pipe()
    os.write(writing, b"".join([index.to_bytes(_NUMBER_BYTES) for index in range(len(jobs))]))
    os.close(writing)
    parent, children = os.getpid(), []
    try:
        for _ in range(min(processes, len(jobs))):
            with warnings.catch_warnings():
                # Python warns of locks that other threads hold; PyTorch's and CUDA's are none that compiling takes.
                warnings.simplefilter("ignore", DeprecationWarning)
                child = os.fork()
            if not child:
                _run_and_exit(jobs, reading, parent)
            children.append(child)
    except OSError as error:
        log.warning("compiling with %d processes: no more can be started (%s)", len(children), error)
    finally:
        os.close(reading)
    return children


def _run_and_exit(jobs: Sequence[Callable[[], Any]], reading: int, parent: int) -> NoReturn:
    """What a forked process does: take numbers as long as there are any, and somebody who waits."""
    gc.disable()
    try:
        while os.getppid() == parent and (number := os.read(reading, _NUMBER_BYTES)):
            with contextlib.suppress(Exception):  # The parent makes the same call, and raises what it raises.
                jobs[int.from_bytes(number)]()
    finally:
        os._exit(0)


def _build_launcher(kernel: Any) -> None:
    """Leave what launches a compiled kernel in Triton's cache too, where a release of Triton keeps it there."""
    triton.runtime.driver.active.launcher_cls(kernel.src, kernel.metadata)


def _load(kernel: Any) -> None:
    compiled = kernel.result() if hasattr(kernel, "result") else kernel  # what is being compiled is a future
    _ = compiled.run


def _use_device_of_caller() -> Any:
    """What a thread does first, so that it loads kernels to the GPU that this thread uses."""
    if not torch.cuda.is_available():
        return lambda: None
    device = torch.cuda.current_device()
    return lambda: torch.cuda.set_device(device)

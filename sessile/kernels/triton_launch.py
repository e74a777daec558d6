"""How kernels are launched, so that a server's first start compiles many of them side by side."""

import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from typing import Any

import torch
import triton

_COMPILERS_MAX = 16
_asked: ContextVar[list[Any] | None] = ContextVar("asked", default=None)


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Run a kernel on a grid; within `compiled_together` only have it compiled."""
    asked = _asked.get()
    if asked is None:
        kernel[grid](*arguments, **options)
    else:
        asked.append(kernel.warmup(*arguments, grid=grid, **options))


@contextlib.contextmanager
def compiled_together(threads: int) -> Iterator[None]:
    """Within it, what `launch` is asked for is compiled by several threads and not run; at its end all is there."""
    asked: list[Any] = []
    with ThreadPoolExecutor(min(threads, _COMPILERS_MAX), initializer=_use_device_of_caller()) as pool:
        token = _asked.set(asked)
        try:
            with triton.AsyncCompileMode(pool):
                yield
        finally:
            _asked.reset(token)
        # Whoever first asks a kernel for its `run` loads it, and some releases of Triton build its launcher then, with
        # a C compiler. The interpreter has nothing to load.
        kernels = {id(kernel): kernel for kernel in asked if kernel is not None}
        list(pool.map(_load, kernels.values()))


def _load(kernel: Any) -> None:
    compiled = kernel.result() if hasattr(kernel, "result") else kernel  # what is being compiled is a future
    _ = compiled.run


def _use_device_of_caller() -> Any:
    """What a thread does first, so that it loads kernels to the GPU that this thread uses."""
    if not torch.cuda.is_available():
        return lambda: None
    device = torch.cuda.current_device()
    return lambda: torch.cuda.set_device(device)

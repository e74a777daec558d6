"""How kernels are launched, so that a server's first start compiles many of them side by side."""

import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from typing import Any

import triton

_COMPILERS_MAX = 16
_only_compiles: ContextVar[bool] = ContextVar("only_compiles", default=False)


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Run a kernel on a grid; within `compiled_together` only have it compiled."""
    if _only_compiles.get():
        kernel.warmup(*arguments, grid=grid, **options)
    else:
        kernel[grid](*arguments, **options)


@contextlib.contextmanager
def compiled_together(threads: int) -> Iterator[None]:
    """Within it, what `launch` is asked for is compiled by several threads and not run; at its end all is there."""
    with ThreadPoolExecutor(min(threads, _COMPILERS_MAX)) as pool, triton.AsyncCompileMode(pool):
        token = _only_compiles.set(True)
        try:
            yield
        finally:
            _only_compiles.reset(token)

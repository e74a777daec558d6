"""How the hot paths of drafting are compiled: numba, cached beside the source, without the interpreter lock.

Not those of sessile/kernels: these run on threads of Python's own, and a process that only builds a corpus needs no
torch. numba's cache notices a change of the file a function is in, not of the files it calls into; so what Python
calls is in one file with everything it compiles.
"""

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic


def entry(function: Callable[..., Any]) -> Any:
    """A function that Python calls; other threads run meanwhile."""
    return njit(cache=True, nogil=True, error_model="numpy")(function)


def piece(function: Callable[..., Any]) -> Any:
    """A function for compiled code to call, not for Python: without wrappers it compiles in half the time."""
    return njit(error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True)(function)


@intrinsic
def pointer(typing_context, address):  # type: ignore[no-untyped-def]
    """An int64 address as a pointer, for `numba.carray`."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.inttoptr(arguments[0], ir.IntType(8).as_pointer())

    return types.voidptr(types.int64), generate


@intrinsic
def int32_at(typing_context, address):  # type: ignore[no-untyped-def]
    """The int32 at an int64 address."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        word = ir.IntType(32)
        return builder.load(builder.inttoptr(arguments[0], word.as_pointer()), align=4)

    return types.int32(types.int64), generate

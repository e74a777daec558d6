"""Kernels compiled by numba that run on torch's own OpenMP threads.

A second pool of threads (numba's `parallel=True` brings one) would fight with torch's: the threads of either spin for
a while after their work, on the cores that the other one needs. So a kernel here is a C function of one pointer, run
by `GOMP_parallel` of the very library that torch is linked to, and splits the work by its thread number.
"""

import ctypes
from collections.abc import Callable
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import llvmlite.binding
import numpy as np
import torch
from llvmlite import ir
from numba import cfunc, types
from numba.extending import intrinsic

FAST = {"reassoc", "contract", "arcp", "nsz"}
"""Sums may be reordered, which is what lets a dot product use vectors; NaN and infinity keep their meaning."""


@cache
def _openmp() -> Any:
    """The OpenMP runtime of torch, its symbols made known to compiled code. Raises OSError or AttributeError."""
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    for name in ("omp_get_thread_num", "omp_get_num_threads", "GOMP_barrier"):
        llvmlite.binding.add_symbol(name, ctypes.cast(getattr(library, name), ctypes.c_void_p).value)
    run = library.GOMP_parallel
    run.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    run.restype = None
    return run


def check_openmp() -> None:
    """Raise OSError or AttributeError if torch's OpenMP runtime cannot be used; then no kernel here can."""
    _openmp()


thread_number = types.ExternalFunction("omp_get_thread_num", types.int32())
thread_count = types.ExternalFunction("omp_get_num_threads", types.int32())
barrier = types.ExternalFunction("GOMP_barrier", types.void())


@intrinsic
def pointer(typing_context, address):  # type: ignore[no-untyped-def]
    """An int64 address as a pointer, for `numba.carray`."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.inttoptr(arguments[0], ir.IntType(8).as_pointer())

    return types.voidptr(types.int64), generate


@intrinsic
def float_from_bits(typing_context, bits):  # type: ignore[no-untyped-def]
    """The float32 with these 32 bits."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.int32), generate


@intrinsic
def widen(typing_context, element):  # type: ignore[no-untyped-def]
    """A stored element as float32: float32 itself, an int8 as a number, or the bits of a bfloat16 in a uint16."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        if element == types.uint16:
            word = ir.IntType(32)
            return builder.bitcast(builder.shl(builder.zext(arguments[0], word), ir.Constant(word, 16)), ir.FloatType())
        return context.cast(builder, arguments[0], element, types.float32)

    return types.float32(element), generate


class ParallelKernel:
    """A function of one void pointer, compiled at the first call and run by all of torch's threads at once.

    The pointer is to int64 arguments: addresses and counts, which the caller checks and keeps alive. Not for use
    from inside itself.
    """

    def __init__(self, body: Callable[[Any], None]) -> None:
        self._body = body
        self.__doc__ = body.__doc__

    @cached_property
    def _address(self) -> int:
        _openmp()
        return int(cfunc(types.void(types.voidptr), nopython=True, cache=True, fastmath=FAST)(self._body).address)

    def __call__(self, *arguments: int) -> None:
        packed = np.array(arguments, np.int64)
        _openmp()(self._address, packed.ctypes.data, torch.get_num_threads(), 0)


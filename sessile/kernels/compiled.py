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
from numba import cfunc, njit, types
from numba.extending import intrinsic

FAST = {"reassoc", "contract", "arcp", "nsz"}
"""Sums may be reordered, which is what lets a dot product use vectors; NaN and infinity keep their meaning."""


def piece(function: Callable[..., Any]) -> Any:
    """A function for other compiled code to call, not for Python: without wrappers it compiles in half the time.

    Division by zero is not checked for; nothing here divides by what may be zero.
    """
    return njit(fastmath=FAST, error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True)(function)


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
def bits_from_float(typing_context, value):  # type: ignore[no-untyped-def]
    """The 32 bits of a float32."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.int32(types.float32), generate


@intrinsic
def widen(typing_context, element):  # type: ignore[no-untyped-def]
    """A stored element as float32: float32 itself, an int8 as a number, or the bits of a bfloat16 in a uint16."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        if element == types.uint16:
            word = ir.IntType(32)
            return builder.bitcast(builder.shl(builder.zext(arguments[0], word), ir.Constant(word, 16)), ir.FloatType())
        return context.cast(builder, arguments[0], element, types.float32)

    return types.float32(element), generate


@intrinsic
def unpack_nibbles(typing_context, source, target, scale, minimum):  # type: ignore[no-untyped-def]
    """Read 16 bytes at an address and write 32 float32 at another: low nibbles, then high, each × scale + minimum.

    Spelled out in vectors because the compiler does not find them: it cannot know that the two do not overlap.
    """

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        source, target, scale, minimum = arguments
        lanes = 16
        floats = ir.VectorType(ir.FloatType(), lanes)
        packed_type = ir.VectorType(ir.IntType(8), lanes)

        def splat(value):  # type: ignore[no-untyped-def]
            vector = builder.insert_element(ir.Constant(floats, ir.Undefined), value, ir.Constant(ir.IntType(32), 0))
            zeros = ir.Constant(ir.VectorType(ir.IntType(32), lanes), [0] * lanes)
            return builder.shuffle_vector(vector, ir.Constant(floats, ir.Undefined), zeros)

        packed = builder.load(builder.inttoptr(source, packed_type.as_pointer()), align=1)
        low = builder.and_(packed, ir.Constant(packed_type, [15] * lanes))
        high = builder.lshr(packed, ir.Constant(packed_type, [4] * lanes))
        for half, quarters in enumerate((low, high)):
            numbers = builder.uitofp(builder.zext(quarters, ir.VectorType(ir.IntType(32), lanes)), floats)
            weights = builder.fadd(builder.fmul(numbers, splat(scale)), splat(minimum))
            address = builder.add(target, ir.Constant(ir.IntType(64), 64 * half))
            builder.store(weights, builder.inttoptr(address, floats.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.none(types.int64, types.int64, types.float32, types.float32), generate


@intrinsic
def two_to_the(typing_context, whole):  # type: ignore[no-untyped-def]
    """2 ** whole for a float32 that holds a whole number from -126 to 127."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        word = ir.IntType(32)
        exponent = builder.add(builder.fptosi(arguments[0], word), ir.Constant(word, 127))
        return builder.bitcast(builder.shl(exponent, ir.Constant(word, 23)), ir.FloatType())

    return types.float32(types.float32), generate


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

    def prepare(self) -> None:
        """Compile, or load from the cache of an earlier run, if that has not happened yet."""
        assert self._address

    def __call__(self, *arguments: int) -> None:
        packed = np.array(arguments, np.int64)
        _openmp()(self._address, packed.ctypes.data, torch.get_num_threads(), 0)


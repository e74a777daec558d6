"""Drawing a token from a whole vocabulary on the CPU, compiled: one pass, and noise that is never stored.

The twin is `sampling.free_draw`: the largest of log-probability + Gumbel noise is the smallest of exponential noise ÷
probability, which saves a logarithm a token.
"""

import numpy as np
import torch
from llvmlite import ir
from numba import carray, types
from numba.extending import intrinsic
from torch import Tensor

from sessile.kernels.attention_cpu import exponential
from sessile.kernels.compiled import (
    ParallelKernel,
    piece,
    pointer,
    thread_count,
    thread_number,
)
from sessile.kernels.linear_cpu import share_of

TILE_TOKENS = 256
_LARGEST_BELOW_ONE = np.float32(1.0 - 2.0**-24)


@intrinsic
def _hashed(typing_context, token, low, high):  # type: ignore[no-untyped-def]
    """The 32-bit hash of a token id under a key of two halves, as float32: `sampling.gumbel_noise` says which.

    Spelled out in 32 bits: numba's own operators would widen to 64 and halve the vectors.
    """

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        word = ir.IntType(32)
        token, low, high = (builder.trunc(argument, word) for argument in arguments)

        def mixed(x):  # type: ignore[no-untyped-def]
            for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
                x = builder.xor(x, builder.lshr(x, ir.Constant(word, shift)))
                x = builder.mul(x, ir.Constant(word, factor))
            return builder.xor(x, builder.lshr(x, ir.Constant(word, 16)))

        return builder.uitofp(mixed(builder.add(mixed(builder.xor(token, low)), high)), ir.FloatType())

    return types.float32(types.int64, types.int64, types.int64), generate


@intrinsic
def _exponent(typing_context, x):  # type: ignore[no-untyped-def]
    """The exponent of a positive float32, so that x = mantissa × 2 ** exponent with 1 ≤ mantissa < 2."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        word = ir.IntType(32)
        bits = builder.bitcast(arguments[0], word)
        return builder.sitofp(
            builder.sub(builder.lshr(bits, ir.Constant(word, 23)), ir.Constant(word, 127)), ir.FloatType()
        )

    return types.float32(types.float32), generate


@intrinsic
def _mantissa(typing_context, x):  # type: ignore[no-untyped-def]
    """The mantissa of a positive float32, 1 ≤ mantissa < 2."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        word = ir.IntType(32)
        bits = builder.and_(builder.bitcast(arguments[0], word), ir.Constant(word, 0x7FFFFF))
        return builder.bitcast(builder.or_(bits, ir.Constant(word, 0x3F800000)), ir.FloatType())

    return types.float32(types.float32), generate


@piece
def _logarithm(x):  # type: ignore[no-untyped-def]
    """log(x) for 0 < x ≤ 1, to a few units in the last place (Cephes), written out so that loops of it vectorise."""
    exponent, y = _exponent(x), _mantissa(x)
    is_large = y > np.float32(1.41421356)
    y = (y * np.float32(0.5) if is_large else y) - np.float32(1.0)
    exponent += np.float32(1.0) if is_large else np.float32(0.0)
    p = np.float32(7.0376836292e-2)
    p = p * y - np.float32(1.1514610310e-1)
    p = p * y + np.float32(1.1676998740e-1)
    p = p * y - np.float32(1.2420140846e-1)
    p = p * y + np.float32(1.4249322787e-1)
    p = p * y - np.float32(1.6668057665e-1)
    p = p * y + np.float32(2.0000714765e-1)
    p = p * y - np.float32(2.4999993993e-1)
    p = p * y + np.float32(3.3333331174e-1)
    square = y * y
    low = p * y * square + exponent * np.float32(-2.12194440e-4) - np.float32(0.5) * square
    return y + low + exponent * np.float32(0.693359375)


@piece
def _exponential_noise(token, low, high):  # type: ignore[no-untyped-def]
    """-log(1 - uniform), exact for the small ones, which decide."""
    uniform = (_hashed(token, low, high) + np.float32(0.5)) * np.float32(2.0**-32)
    uniform = min(uniform, _LARGEST_BELOW_ONE)
    rest = np.float32(1.0) - uniform
    # Kahan: the error of `rest` cancels in the quotient. Where nothing is left of `uniform` the product is 0, and the
    # logarithm is `uniform` itself; it is never less. No branches, so that loops of it vectorise.
    lost = max(np.float32(1.0) - rest, np.float32(1e-30))
    return max(-_logarithm(rest) * (uniform / lost), uniform)


@piece
def _race(logits, low, high, first, last):  # type: ignore[no-untyped-def]
    """The winner among tokens first … last - 1 and its time; times scale with exp(largest logit of the share)."""
    top = logits[first]
    for token in range(first, last):
        top = max(top, logits[token])
    times = np.empty(TILE_TOKENS, np.float32)
    best, winner = np.float32(np.inf), first
    for start in range(first, last, TILE_TOKENS):
        count = min(TILE_TOKENS, last - start)
        for i in range(count):
            times[i] = _exponential_noise(start + i, low, high) / exponential(logits[start + i] - top)
        for i in range(count):
            if times[i] < best:
                best, winner = times[i], start + i
    return winner


@ParallelKernel
def _draw(arguments):  # type: ignore[no-untyped-def]
    """Every thread finds the winner of its share of the vocabulary, for every row."""
    a = carray(arguments, (6,), np.int64)
    rows, vocab = a[0], a[1]
    logits = carray(pointer(a[2]), (rows, vocab), np.float32)
    lows = carray(pointer(a[3]), (rows,), np.int64)
    highs = carray(pointer(a[4]), (rows,), np.int64)
    winners = carray(pointer(a[5]), (thread_count(), rows), np.int64)
    first, last = share_of(vocab)
    thread = thread_number()
    for row in range(rows):
        winners[thread, row] = _race(logits[row], lows[row], highs[row], first, last)


def prepare() -> None:
    """Compile what `finalists` needs."""
    _draw.prepare()


def finalists(logits: Tensor, lows: Tensor, highs: Tensor) -> Tensor:
    """Of each row float32[vocab], the winners of its parts: int64[parts, m], one of which is the token drawn.

    lows, highs int64[m]: the halves of the row's noise key.
    """
    rows, vocab = logits.shape
    threads = torch.get_num_threads()
    assert logits.dtype == torch.float32 and logits.is_contiguous() and vocab >= threads
    for key in (lows, highs):
        assert key.dtype == torch.int64 and key.is_contiguous() and key.shape == (rows,)
    winners = torch.zeros(threads, rows, dtype=torch.int64)
    _draw(rows, vocab, logits.data_ptr(), lows.data_ptr(), highs.data_ptr(), winners.data_ptr())
    return winners

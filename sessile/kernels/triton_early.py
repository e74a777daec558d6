"""Kernels that begin while the one before them ends, so that a chain of short ones is not mostly beginnings.

A kernel of a decoding step tells the next one when it may begin, and waits itself until the one before is over before
it touches anything that was computed (programmatic dependent launch, CUDA C++ programming guide). Weights were not
computed: what reads them asks for them first. Nobody may leave without having waited, or the kernel after the next
would begin to read too early.
"""

import functools
from enum import IntEnum

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

EARLY_TOKENS = 64
"""Steps with more tokens have kernels so long that beginning early gains nothing, and takes the place of others."""
LINE_BYTES: tl.constexpr = tl.constexpr(128)
"""What the second cache reads at a time."""


class Next(IntEnum):
    """When the next kernel of a step may begin."""

    AFTER = 0
    """When this one is over: how launches are ordered by default."""
    LATE = 1
    """When this one has read what it reads, so that the next one takes no place from programs that still read."""
    AT_ONCE = 2
    """When this one begins: with one token, programs are small enough to lie side by side."""


@functools.cache
def is_hopper_or_later() -> bool:
    """Whether the GPU has what came with Hopper: launches that begin early, and 227 KiB of shared memory."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= 9


def next_begins(x: Tensor, tokens: int) -> Next:
    """When the next kernel may begin behind one of a step of so many tokens, by measurement on an H100."""
    if tokens > EARLY_TOKENS or not x.is_cuda or not is_hopper_or_later():
        return Next.AFTER
    return Next.AT_ONCE if tokens == 1 else Next.LATE


def launch_options(following: Next) -> dict[str, bool]:
    """What a launch of such a kernel takes besides; the interpreter knows none of it."""
    return {"launch_pdl": True} if following else {}


@triton.jit
def wait_for_inputs(NEXT: tl.constexpr):  # type: ignore[no-untyped-def]
    """Wait until what the kernels before have written can be read."""
    if NEXT == 2:
        gdc_launch_dependents()
    if NEXT > 0:
        gdc_wait()


@triton.jit
def have_read(NEXT: tl.constexpr):  # type: ignore[no-untyped-def]
    """This program has read all that it reads."""
    if NEXT == 1:
        gdc_launch_dependents()


@triton.jit
def ask_for(weight, row, first, outs, ins, LINES: tl.constexpr):  # type: ignore[no-untyped-def]
    """Have the first lines of some rows of a weight [outs, ins], from input `first` on, brought to the second cache.

    Waits for nothing. What would lie behind the weight's end is asked for in its last row or column instead.
    """
    line = tl.arange(0, LINES) * (LINE_BYTES * 8 // weight.dtype.element_ty.primitive_bitwidth)
    places = weight + tl.minimum(row, outs - 1)[:, None].to(tl.int64) * ins + tl.minimum(first + line, ins - 1)[None, :]
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [places.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1
    )

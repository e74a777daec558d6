"""Plans fetched from the host's memory and results left there by the GPU itself, so that no copy has to be queued.

Host and device both see pinned memory, at the same address. Kernels that read and write it can be part of a graph,
where a copy can't: its memory is another one at each step. Which one it is, the device counts along.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from sessile.kernels.triton_launch import launch
from sessile.units import ceil_div

SLOTS = 4
"""So many steps may be on their way at once."""
PROGRAMS = 8
"""Each fetches its share of a plan."""
_BLOCK = 1024
_SLOTS, _PROGRAMS = tl.constexpr(SLOTS), tl.constexpr(PROGRAMS)


@dataclass(frozen=True)
class Mailbox:
    """Room for the plans and results of a few steps, used in turn.

    plans int32[SLOTS, p], lengths int32[SLOTS], results int32[SLOTS, r]: pinned memory of the host; the host writes
    plans and their lengths, the device results. turns int32[PROGRAMS] on the device: the slot whose plan each program
    fetches next.
    """

    plans: Tensor
    lengths: Tensor
    results: Tensor
    turns: Tensor

    @classmethod
    def empty(cls, plan_words: int, result_words: int, device: torch.device) -> "Mailbox":
        """One in which slot 0 is the next. Without a GPU, of plain memory."""
        on_gpu = device.type == "cuda"
        plans, lengths, results = (
            torch.zeros(shape, dtype=torch.int32, pin_memory=on_gpu)
            for shape in ((SLOTS, plan_words), (SLOTS,), (SLOTS, result_words))
        )
        return cls(plans, lengths, results, torch.zeros(PROGRAMS, dtype=torch.int32, device=device))


def fetch_plan(mailbox: Mailbox, target: Tensor) -> None:
    """Copy the next slot's plan to the start of target int32[p]; what follows it there is undefined."""
    words = target.numel()
    launch(_fetch_plan, (PROGRAMS,), mailbox.plans, mailbox.lengths, mailbox.turns, target, words, BLOCK=_BLOCK)


def leave_results(mailbox: Mailbox, source: Tensor, words: int) -> None:
    """Copy the first words of source int32[r] to the slot whose plan was fetched last."""
    grid = (ceil_div(words, _BLOCK),)
    launch(_leave_results, grid, source, mailbox.results, mailbox.turns, words, source.numel(), BLOCK=_BLOCK)


@triton.jit(do_not_specialize=["words_max"])
def _fetch_plan(plans, lengths, turns, target, words_max, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """The first block of each program is copied whatever the length: to ask first would cost a second round trip."""
    program = tl.program_id(0)
    turn = tl.load(turns + program)
    plan = plans + turn.to(tl.int64) * words_max
    length = tl.load(lengths + turn)
    first = program * BLOCK + tl.arange(0, BLOCK)
    tl.store(target + first, tl.load(plan + first, mask=first < words_max), mask=first < words_max)
    for begin in range((program + _PROGRAMS) * BLOCK, length, _PROGRAMS * BLOCK):
        word = begin + tl.arange(0, BLOCK)
        tl.store(target + word, tl.load(plan + word, mask=word < length), mask=word < length)
    tl.store(turns + program, (turn + 1) % _SLOTS)


@triton.jit(do_not_specialize=["words"])
def _leave_results(source, results, turns, words, words_max, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    slot = (tl.load(turns) + _SLOTS - 1) % _SLOTS
    word = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    given = tl.load(source + word, mask=word < words)
    tl.store(results + slot.to(tl.int64) * words_max + word, given, mask=word < words)

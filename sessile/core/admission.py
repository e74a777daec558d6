"""How much of the pool the future will need: an estimate, not the bound.

By the bound, 256 requests that leave max_tokens unset would run three at a time. So a request is expected to end as
those did that ended before it: outputs are remembered as shares of what they were allowed, apart for small and large
allowances, since who sets a tight limit tends to use it. Each running request is expected to end like one of those
that got further than it has, another one for each, so that together they end as outputs do: a few much later than the
others. A set of rows fits if the peak of what they will hold together stays within the pool (Gong et al.,
"Past-Future Scheduler", 2025). Preemption is the safety net: each one widens a margin. Integers only, so that replays
agree.
"""

from bisect import bisect_right
from collections import deque

import numpy as np
import numpy.typing as npt

Tokens = npt.NDArray[np.int64]

_UNIT = 1024
"""Shares, margins and fates are in 1/1024."""
_WINDOW = 64
"""Ended requests that are remembered for each size of allowance."""
_TYPICAL_TOKENS = 128
"""Mean output that is expected before anything has ended."""
_EXPONENTIAL = (33, 101, 174, 253, 338, 431, 534, 648, 776, 922, 1093, 1299, 1556, 1901, 2424, 3549)
"""Sixteen outputs of exponentially distributed length, their mean being 1024: the memory to begin with."""
_GOLDEN = 633
"""1024 × 0.618: consecutive arrivals have fates that spread evenly."""
_MARGIN_JUMP = 24
_MARGIN_DECAY_STEPS = 8


class Forecast:
    """What requests used of their allowances, by its size, and the margin on top of what follows from that."""

    def __init__(self, output_cap_tokens: int) -> None:
        self._cap_tokens = output_cap_tokens
        self._shares = [_prior(size) for size in range(output_cap_tokens.bit_length() + 1)]
        self._sorted: dict[int, list[int]] = {}
        """By size, in ascending order: only what was asked for since it last changed, since few steps ask."""
        self._margin = 0
        self._quiet_steps = 0

    def finished(self, output_tokens: int, allowed_tokens: int) -> None:
        """Learn from a request that ended by itself."""
        allowed = max(1, min(allowed_tokens, self._cap_tokens))
        size = allowed.bit_length()
        self._shares[size].append(min(_UNIT, -(-output_tokens * _UNIT // allowed)))
        self._sorted.pop(size, None)

    def preempted(self) -> None:
        """The estimate was too low: widen the margin."""
        self._margin = min(_UNIT, self._margin + _MARGIN_JUMP)
        self._quiet_steps = 0

    def stepped(self) -> None:
        """A step went by without a preemption: narrow the margin slowly."""
        self._quiet_steps += 1
        if self._quiet_steps >= _MARGIN_DECAY_STEPS:
            self._quiet_steps = 0
            self._margin = max(0, self._margin - 1)

    def remaining_of(self, output: int, allowed: int, arrival: int) -> int:
        """Expected further output of a request, from 1 to what it is still allowed.

        output: tokens so far; allowed: the most that they may become; arrival: what tells requests apart.
        """
        capped = max(1, min(allowed, self._cap_tokens))
        used = output * _UNIT // capped
        shares = self._ascending(capped.bit_length())
        first = bisect_right(shares, used)
        further = len(shares) - first
        # Of those that got further, the one that is as far up as the request's fate says; if nobody did, as much again
        # as the longest.
        end = shares[first + further * (arrival * _GOLDEN % _UNIT) // _UNIT] if further else used + shares[-1]
        expected = (end - used) * capped // _UNIT
        return max(1, min(expected + expected * self._margin // _UNIT, allowed - output))

    def remaining_tokens(self, output: Tokens, allowed: Tokens, arrivals: Tokens) -> Tokens:
        """The same for many requests."""
        capped = np.maximum(1, np.minimum(allowed, self._cap_tokens))
        used = output * _UNIT // capped
        fates = arrivals * _GOLDEN % _UNIT
        sizes = np.frexp(capped)[1]
        ends = np.zeros(len(output), np.int64)
        for size in np.flatnonzero(np.bincount(sizes)).tolist():
            mine = np.flatnonzero(sizes == size)
            shares = np.array(self._ascending(size), np.int64)
            first = np.searchsorted(shares, used[mine], "right")
            further = len(shares) - first
            chosen = np.minimum(first + further * fates[mine] // _UNIT, len(shares) - 1)
            ends[mine] = np.where(further > 0, shares[chosen], used[mine] + shares[-1])
        expected = (ends - used) * capped // _UNIT
        expected += expected * self._margin // _UNIT
        return np.asarray(np.maximum(1, np.minimum(expected, allowed - output)), np.int64)

    def _ascending(self, size: int) -> list[int]:
        shares = self._sorted.get(size)
        if shares is None:
            shares = self._sorted[size] = sorted(self._shares[size])
        return shares


def _prior(size: int) -> "deque[int]":
    """The memory to begin with, for allowances of so many bits: all of a small one, of a large one a typical output."""
    allowed = max(1, 3 << size >> 2)  # the middle of [2^(size - 1), 2^size)
    shares = (min(_UNIT, -(-tokens * _TYPICAL_TOKENS // allowed)) for tokens in _EXPONENTIAL)
    return deque(shares, maxlen=_WINDOW)


def peak_pages(held: npt.NDArray[np.int64], growth: npt.NDArray[np.int64], capacity: int) -> int:
    """The most pages that rows will hold together, if each holds `held` now, grows by `growth` and then leaves.

    All rows grow at one pace, so those with the least growth leave first. Once the plain sum fits the capacity, it is
    returned as an upper bound without looking for the peak.
    """
    if len(held) == 0:
        return 0
    total = int(held.sum() + growth.sum())
    if total <= capacity:
        return total
    order = np.argsort(-growth, kind="stable")
    together = np.arange(1, len(held) + 1)
    return int((np.cumsum(held[order]) + growth[order] * together).max())

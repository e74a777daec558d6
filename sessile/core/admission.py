"""How much of the pool the future will need: an estimate, not the bound.

By the bound, 256 requests that leave max_tokens unset would run three at a time. So the remaining output of a request
is taken as min(remaining, cap) × a ratio learned from requests that finished (integers only, so that replays agree),
and a set of rows fits if the peak of what they will hold together stays within the pool. Preemption is the safety net,
and each one makes the estimate more careful. The peak is LightLLM's (Gong et al., "Past-Future Scheduler", 2025).
"""

import numpy as np
import numpy.typing as npt

_UNIT = 1024
"""Ratios are in 1/1024."""
_START_RATIO = 512
_LEARN_SHIFT = 5
_MARGIN_JUMP = 128
_MARGIN_DECAY_STEPS = 16


class Forecast:
    """The learned share of its allowance that a request really uses, and the margin on top of it."""

    def __init__(self, output_cap_tokens: int) -> None:
        self._cap_tokens = output_cap_tokens
        self._learned = _START_RATIO * _UNIT
        self._margin = _UNIT // 8
        self._quiet_steps = 0

    @property
    def ratio(self) -> int:
        """Expected share of the remaining allowance, in 1/1024, from 1 to 1024."""
        return max(1, min(_UNIT, self._learned // _UNIT + self._margin))

    def finished(self, output_tokens: int, allowed_tokens: int) -> None:
        """Learn from a request that ended by itself."""
        allowed = max(1, min(allowed_tokens, self._cap_tokens))
        share = min(_UNIT, output_tokens * _UNIT // allowed) * _UNIT
        self._learned += (share - self._learned) >> _LEARN_SHIFT

    def preempted(self) -> None:
        """The estimate was too low: widen the margin."""
        self._margin = min(_UNIT, self._margin + _MARGIN_JUMP)
        self._quiet_steps = 0

    def stepped(self) -> None:
        """A step went by without a preemption: narrow the margin slowly."""
        self._quiet_steps += 1
        if self._quiet_steps >= _MARGIN_DECAY_STEPS:
            self._quiet_steps = 0
            self._margin = max(_UNIT // 32, self._margin - 1)

    def remaining_of(self, allowed: int) -> int:
        """The same for one request."""
        return max(1, min(allowed, self._cap_tokens) * self.ratio // _UNIT)

    def remaining_tokens(self, allowed: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Expected further output for each remaining allowance, at least 1."""
        expected = np.minimum(allowed, self._cap_tokens) * self.ratio // _UNIT
        return np.asarray(np.maximum(1, expected), np.int64)


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

"""The interval of a median of ratios that were taken in pairs."""

from collections.abc import Sequence

import numpy as np

RESAMPLES = 10_000
TAILS = (2.5, 97.5)
"""Percentiles: the ends of an interval of 95 %."""


def median_interval(ratios: Sequence[float]) -> tuple[float, float]:
    """Of the median, 95 %: that of RESAMPLES draws with replacement, always the same draws."""
    dice = np.random.default_rng(0)
    draws = dice.choice(np.array(ratios), (RESAMPLES, len(ratios)))
    low, high = np.percentile(np.median(draws, axis=1), TAILS)
    return float(low), float(high)


def shown(ratios: Sequence[float]) -> str:
    """Their median and its interval."""
    low, high = median_interval(ratios)
    return f"{np.median(ratios):.3f} [{low:.3f}–{high:.3f}]"

"""The pieces of weighing drafts, each for itself: the engine has them compiled into one function."""

import numpy as np
from numba import njit

from sessile.draft import weighing
from sessile.draft.pace import Acceptance, LateScale, StepTimes


@njit
def _step_ns(tokens, at, times):
    return weighing.step_ns(tokens, at, times)


@njit
def _plain_step_ns(tokens, plain_at, plain_times, at, times):
    return weighing.plain_step_ns(tokens, plain_at, plain_times, at, times)


@njit
def _path_chances(learned, match, drafts, chances):
    weighing.path_chances(learned, match, drafts, chances, 0)


@njit
def _worthwhile(chances, room, lines, tokens, late_ns, begins, at, times, plain_ns, limits):
    weighing.worthwhile(chances, room, lines, tokens, late_ns, begins, at, times, plain_ns, limits)


def step_ns(times: StepTimes, tokens: int) -> float:
    """Of a step that verifies."""
    return _step_ns(tokens, *times.curve)


def plain_ns(times: StepTimes, tokens: int) -> float:
    """Of a step without drafts."""
    return _plain_step_ns(tokens, *times.plain_curve, *times.curve)


def chances_of(line: Acceptance, match: int, drafts: int = 4) -> list[float]:
    """That the first 1, 2 … drafts are all accepted."""
    chances = np.full(drafts, -1.0)
    _path_chances(line.address, match, drafts, chances)
    return chances.tolist()


def worthwhile(chances: np.ndarray, lines: int, tokens: int, late: LateScale, *, begins: bool = False) -> np.ndarray:
    """How many drafts of each line are worth it. chances float64[n, d]."""
    limits = np.full(len(chances), -1, np.int32)
    facts = late.ns(lines), begins, *late.times.curve, plain_ns(late.times, tokens)
    _worthwhile(np.ravel(chances), chances.shape[1], lines, tokens, *facts, limits)
    return limits


def learned_by(lines: list[Acceptance]) -> np.ndarray:
    """What compiled code is told of them."""
    return np.array([line.address for line in lines], np.int64)

"""A slow, obviously right drafter's twin: lists and dictionaries, against which the compiled code is compared."""

import numpy as np
import numpy.typing as npt

from sessile.draft.suffixes import DEPTH_TOKENS, SEPARATOR

Ints = npt.NDArray[np.int32]


def context_of(flat: Ints, position: int) -> list[int]:
    """What stands before a position, nearest token first, down to the separator or the depth that counts."""
    context: list[int] = []
    while flat[position - 1 - len(context)] != SEPARATOR and len(context) < DEPTH_TOKENS:
        context.append(int(flat[position - 1 - len(context)]))
    return context


def positions_of(flat: Ints) -> list[int]:
    """Every position that has a token before it in its document."""
    return [p for p in range(1, len(flat)) if flat[p] != SEPARATOR and flat[p - 1] != SEPARATOR]


def sorted_positions(flat: Ints) -> list[int]:
    """The positions as an index has them."""
    return sorted(positions_of(flat), key=lambda p: (context_of(flat, p), p))

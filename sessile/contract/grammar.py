"""What the core asks of grammars: which tokens may follow, so that an output is what its request said it must be.

The core and every implementation (sessile/grammar, the simulator's toy) know each other only through this file. A line
is told nothing but settled output tokens of its turn, so nothing in it is ever undone: rejected drafts were never told,
and a preempted request keeps its line (H76).
"""

from collections.abc import Sequence
from typing import Protocol

from sessile.contract.messages import Grammar
from sessile.contract.plan import Ints
from sessile.units import TokenId


class GrammarLine(Protocol):
    """The output of one request as its grammar sees it. Owned by the request, from submission to its end."""

    @property
    def tokens(self) -> int:
        """How many output tokens it was told."""
        ...

    @property
    def failure(self) -> str:
        """Why the grammar cannot be followed any further, for the user; empty while it can."""
        ...

    def extend(self, tokens: Sequence[int]) -> None:
        """Settled output tokens, in order."""
        ...


class Grammars(Protocol):
    """Grammars that are ready for use. Called by the core on its own thread; nothing here may take long."""

    def start(self, grammar: Grammar) -> GrammarLine:
        """The line of a request whose output is empty. Raises UserError, if there is no such grammar."""
        ...

    def masks(
        self, lines: Sequence[GrammarLine], drafts: Sequence[Sequence[TokenId]]
    ) -> tuple[Sequence[int], Ints]:
        """(how many of each line's drafts its grammar allows, masks int32[places, ceil(vocabulary / 32)]).

        Every line is up to date and has not failed; it is as it was afterwards. A line with d allowed drafts has d + 1
        places, line by line: the tokens that may follow what was told, then what may follow each draft. Bits as in
        StepPlan.mask_words; at least one of a place is set. End-of-sequence tokens are allowed exactly where the
        grammar may end. A line that fails here says so from now on, and its masks mean nothing.
        """
        ...

"""Toy grammars: which tokens may come next is a hash of the rule and of all that was said.

A rule ends an output where the hash says that it may, at the latest when it has its longest length, and may be one that
cannot be followed beyond a certain length. Its source is three numbers: "seed longest strays_at".
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from sessile.contract.grammar import GrammarLine
from sessile.contract.messages import Grammar
from sessile.contract.plan import Ints
from sessile.sim import hashing
from sessile.sim.world import EOS
from sessile.units import TokenId, ceil_div

KIND = "toy"
NEVER = 1 << 30
_SAID, _ENDS = 0x8CB92BA72F3D8DD7, 0xC2B2AE3D27D4EB4F


@dataclass(frozen=True, slots=True)
class Place:
    """Where an output stands in its rule: all that matters of what was said before."""

    digest: int
    length: int
    longest: int
    strays_at: int

    def after(self, token: int) -> "Place":
        """One token further."""
        return Place(hashing.mix(self.digest + (token + 1) * _SAID), self.length + 1, self.longest, self.strays_at)

    @property
    def is_astray(self) -> bool:
        """Whether the rule cannot be followed any further."""
        return self.length >= self.strays_at


def beginning_of(grammar: Grammar) -> Place:
    """Before the first token."""
    seed, longest, strays_at = map(int, grammar.source.split())
    return Place(hashing.mix(seed), 0, longest, strays_at)


@lru_cache(4096)
def forbidden_at(place: Place, vocab_size: int) -> frozenset[int]:
    """The tokens that may not come next; never all of them."""
    if place.length >= place.longest:
        return frozenset(range(vocab_size)) - {EOS}
    may_end = place.length > 0 and not hashing.mix(place.digest ^ _ENDS) % 4
    always = EOS + 1 + place.digest % (vocab_size - EOS - 1)
    banned = {token for token in range(vocab_size) if not hashing.mix(place.digest ^ (token + 1)) % 3} - {always, EOS}
    return frozenset(banned if may_end else banned | {EOS})


class ToyLine:
    """A GrammarLine."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.failure = ""

    @property
    def tokens(self) -> int:
        """How many it was told."""
        return self.place.length

    def extend(self, tokens: Sequence[int]) -> None:
        """Settled tokens: every one of them must have been allowed, which the books of the clients know."""
        for token in tokens:
            self.place = self.place.after(token)


class ToyGrammars:
    """Grammars whose every rule is known at once."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size

    def start(self, grammar: Grammar) -> GrammarLine:
        """The line of a rule."""
        return ToyLine(beginning_of(grammar))

    def masks(
        self, lines: Sequence[GrammarLine], drafts: Sequence[Sequence[TokenId]]
    ) -> tuple[Sequence[int], Ints]:
        """See Grammars. A line that goes astray here has masks that allow everything."""
        counts, places = [], []
        for line, proposed in zip(lines, drafts, strict=True):
            assert isinstance(line, ToyLine) and not line.failure, "a line that has failed was asked for masks"
            if line.place.is_astray:
                line.failure = "the rule goes no further"
            own = [line.place]
            for draft in proposed:
                following = own[-1].after(draft)
                if line.failure or following.is_astray or draft in forbidden_at(own[-1], self._vocab_size):
                    break
                own.append(following)
                if draft == EOS:
                    break
            counts.append(len(own) - 1)
            places += own
        return counts, np.stack([self._words(place) for place in places])

    def _words(self, place: Place) -> Ints:
        allowed = np.ones(32 * ceil_div(self._vocab_size, 32), np.bool_)
        if not place.is_astray:
            allowed[list(forbidden_at(place, self._vocab_size))] = False
        return np.packbits(allowed, bitorder="little").view(np.int32)

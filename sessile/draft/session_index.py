"""The index of a text that grows and is cut at its end: a sequence of tokens, or the newest part of a history.

Each place is linked to the next older place behind the same GRAM_TOKENS tokens. Appending links, cutting unlinks in
reverse, both at a cost of the tokens in question; a text that was cut is exactly as if the rest had never been there.
12 bytes a token that there is room for.
"""

import numpy as np
import numpy.typing as npt

from sessile.draft.lookup import (
    CHAINED,
    HEAD_BITS,
    HEADS_AT,
    KIND,
    PART_FIELDS,
    PLACES,
    PLACES_AT,
    TOKENS,
    TOKENS_AT,
    link_places,
    unlink_places,
)
from sessile.errors import InvariantError

Ints = npt.NDArray[np.int32]

CAPACITY_MIN = 256
_NO_ARRAYS: Ints = np.empty((3, 0), np.int32)


class SessionIndex:
    """Implements the contract's SequenceIndex. Not for several threads at once, but for reading between two changes.

    part: what compiled code sees of it; the same array for the index's whole life, its content changes.
    """

    def __init__(self) -> None:
        self.part = np.zeros(PART_FIELDS, np.int64)
        self.part[KIND] = CHAINED
        self._arrays = _NO_ARRAYS
        self._text: Ints
        self._older: Ints
        self._heads: Ints
        self._text, self._older, self._heads = _NO_ARRAYS
        self._bits = 0
        self.address = int(self.part.ctypes.data)
        """Of `part`; asking numpy for it takes a microsecond."""

    @property
    def tokens(self) -> int:
        """How many tokens it holds."""
        return int(self.part.item(TOKENS))

    @property
    def text(self) -> Ints:
        """Those tokens, to be read before the next change."""
        return self._text[: self.tokens]

    @property
    def resident_bytes(self) -> int:
        """What its arrays take."""
        return self._arrays.nbytes

    def extend(self, tokens: bytes) -> None:
        """Settled tokens at the end: int32 little-endian."""
        self.append(np.frombuffer(tokens, "<i4"))

    def append(self, tokens: Ints) -> None:
        """Tokens at the end; a SEPARATOR among them is never matched or crossed."""
        self.provide_for(len(tokens))
        first, last = self.tokens, self.tokens + len(tokens)
        self._text[first:last] = tokens
        link_places(self._text, self._older, self._heads, self._bits, first, last)
        self.part[TOKENS] = last

    def provide_for(self, tokens: int) -> None:
        """Make room for so many more."""
        if self.tokens + tokens > len(self._text):
            self._reserve(self.tokens + tokens)

    def truncate(self, tokens: int) -> None:
        """Forget all but the first `tokens`, 0 ≤ tokens ≤ self.tokens."""
        if not 0 <= tokens <= self.tokens:
            raise InvariantError(f"an index of {self.tokens} tokens cannot be cut to {tokens}")
        unlink_places(self._text, self._older, self._heads, self._bits, tokens, self.tokens)
        self.part[TOKENS] = tokens

    def fork(self, tokens: int) -> "SessionIndex":
        """An index of the first `tokens`, independent of this one from here on: a copy, the rest of it cut."""
        if not 0 <= tokens <= self.tokens:
            raise InvariantError(f"an index of {self.tokens} tokens has no first {tokens}")
        twin = SessionIndex()
        if 2 * tokens <= self.tokens:
            twin.append(self._text[:tokens])
            return twin
        twin._take_arrays(self._arrays.copy(), self._bits)
        twin.part[TOKENS] = self.tokens
        twin.truncate(tokens)
        return twin

    def _reserve(self, tokens: int) -> None:
        """Arrays for at least so many tokens, at least twice as many as there were; all is linked anew."""
        bits = max(tokens, 2 * len(self._text), CAPACITY_MIN) - 1
        bits = bits.bit_length()
        known = self.text
        self._take_arrays(np.zeros((3, 1 << bits), np.int32), bits)
        if len(known):
            self._text[: len(known)] = known
            link_places(self._text, self._older, self._heads, bits, 0, len(known))

    def _take_arrays(self, arrays: Ints, bits: int) -> None:
        """Text, chains and heads int32[3, 2 ** bits] from now on."""
        self._arrays, self._bits = arrays, bits
        self._text, self._older, self._heads = arrays
        part, places = self.part, 1 << bits
        part[TOKENS_AT] = address = int(arrays.ctypes.data)
        part[PLACES_AT] = address + arrays.itemsize * places
        part[HEADS_AT] = address + 2 * arrays.itemsize * places
        part[PLACES], part[HEAD_BITS] = places, bits

"""Tokens to text as they come: never half a character, never text that may turn out to be a stop string."""

import codecs
from collections.abc import Iterable, Sequence

from sessile.text.vocabulary import Vocabulary


class TextStream:
    """The text of one output, piece by piece; the pieces joined are the text of all its tokens.

    Cost per token does not depend on what came before. stops: UTF-8 stop strings, matched by the core on the same
    bytes; here, text that may be the start of one is held back until the next tokens decide.
    """

    def __init__(
        self, vocabulary: Vocabulary, *, skip_special_tokens: bool = True, stops: Sequence[bytes] = ()
    ) -> None:
        self._vocabulary = vocabulary
        self._skip_special_tokens = skip_special_tokens
        self._tails = [_StopTail(stop) for stop in stops if stop]
        self._half = b""
        """The beginning of a character."""
        self._held = b""
        self._released_bytes = 0

    def push(self, tokens: Iterable[int]) -> str:
        """Take tokens that are not the last; return the text that is now certain."""
        if not self._tails:
            fresh = self._vocabulary.join(tokens, skip_special_tokens=self._skip_special_tokens)
            self._released_bytes += len(fresh)
            return self._decoded(fresh)
        self._take(tokens)
        held_bytes = max((tail.matched for tail in self._tails), default=0)
        return self._release(len(self._held) - held_bytes)

    def finish(self, tokens: Iterable[int] = (), *, kept_bytes: int = -1) -> str:
        """Take the last tokens; return the rest of the text, half a character at its end as U+FFFD.

        kept_bytes: where a stop string begins (`Done.kept_bytes`), in bytes of the whole output; -1 keeps all. The
        tokens that complete a stop must come here, not to `push`, which might let go of what follows the stop.
        """
        self._take(tokens)
        kept = len(self._held) if kept_bytes < 0 else kept_bytes - self._released_bytes
        assert 0 <= kept <= len(self._held), f"a stop at byte {kept_bytes} lies outside the text that was held back"
        return self._release(kept) + self._decoded(b"", final=True)

    def _take(self, tokens: Iterable[int]) -> None:
        fresh = self._vocabulary.join(tokens, skip_special_tokens=self._skip_special_tokens)
        self._held += fresh
        for tail in self._tails:
            tail.advance(fresh)

    def _release(self, count: int) -> str:
        certain, self._held = self._held[:count], self._held[count:]
        self._released_bytes += count
        return self._decoded(certain)

    def _decoded(self, certain: bytes, *, final: bool = False) -> str:
        text, decoded_bytes = codecs.utf_8_decode(self._half + certain, "replace", final)
        self._half = (self._half + certain)[decoded_bytes:]
        return text


class _StopTail:
    """How much of a stop string the text so far ends with, short of all of it (Knuth–Morris–Pratt)."""

    def __init__(self, stop: bytes) -> None:
        self.matched = 0
        self._stop = stop
        self._borders = [0] * len(stop)  # at i: longest proper prefix of stop that also ends stop[: i + 1]
        border = 0
        for index in range(1, len(stop)):
            while border and stop[index] != stop[border]:
                border = self._borders[border - 1]
            border += stop[index] == stop[border]
            self._borders[index] = border

    def advance(self, text: bytes) -> None:
        stop, borders, matched = self._stop, self._borders, self.matched
        for byte in text:
            while matched and byte != stop[matched]:
                matched = borders[matched - 1]
            matched += byte == stop[matched]
            if matched == len(stop):  # a match that ended nothing (min_new_tokens): look for the next
                matched = borders[matched - 1]
        self.matched = matched

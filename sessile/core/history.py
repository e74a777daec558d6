"""The committed tokens of a session: append-only, in chunks, shared by forks.

Tokens are the truth; KV is a cache of them. What was appended is never changed, so a turn that is aborted cannot
leave a trace here (H28): it holds its own delta and appends it only when it commits.
"""

import numpy as np
import numpy.typing as npt

Tokens = npt.NDArray[np.int32]

_CHUNK_TOKENS = 4096


class History:
    """An append-only line of tokens. `fork` shares all full chunks and copies less than one."""

    __slots__ = ("_chunks", "_length")

    def __init__(self) -> None:
        self._chunks: list[Tokens] = []
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def append(self, tokens: Tokens) -> None:
        """Commit int32[n] tokens at the end. Costs O(n), whatever the length."""
        done = 0
        while done < len(tokens):
            used = self._length % _CHUNK_TOKENS
            if used == 0:
                self._chunks.append(np.empty(_CHUNK_TOKENS, np.int32))
            count = min(_CHUNK_TOKENS - used, len(tokens) - done)
            self._chunks[-1][used : used + count] = tokens[done : done + count]
            self._length += count
            done += count

    def slice(self, start: int, stop: int) -> Tokens:
        """int32[stop - start], a copy or read-only view of tokens [start, stop), 0 ≤ start ≤ stop ≤ len."""
        assert 0 <= start <= stop <= self._length, f"slice [{start}, {stop}) of a history of {self._length} tokens"
        if start == stop:
            return np.empty(0, np.int32)
        first, last = start // _CHUNK_TOKENS, (stop - 1) // _CHUNK_TOKENS
        base = first * _CHUNK_TOKENS
        if first == last:
            view = self._chunks[first][start - base : stop - base]
            view.flags.writeable = False
            return view
        return np.concatenate(self._chunks[first : last + 1])[start - base : stop - base]

    def fork(self, length: int) -> "History":
        """A history of the first `length` tokens, independent of this one from here on."""
        assert 0 <= length <= self._length
        child = History()
        full = length // _CHUNK_TOKENS
        child._chunks = self._chunks[:full]
        child._length = full * _CHUNK_TOKENS
        child.append(self.slice(child._length, length))
        return child


NO_HISTORY = History()
"""The empty history of plain requests; never appended to."""

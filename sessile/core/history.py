"""The committed tokens of a session: append-only, in chunks, shared by forks.

Tokens are the truth; KV is a cache of them. What was appended is never changed, so a turn that is aborted cannot
leave a trace here (H28): it holds its own delta and appends it only when it commits.

Runs of tokens are `Packed` throughout the core: int32 little-endian bytes, as they cross the link. They are immutable,
compare and hash at the speed of memory, and a slice costs a tenth of what a small numpy array does.
"""

from collections.abc import Sequence

from sessile.units import ceil_div

Packed = bytes
"""Tokens as int32 little-endian bytes; four bytes a token."""

TOKEN_BYTES = 4
_CHUNK_BYTES = 4096 * TOKEN_BYTES


class History:
    """An append-only line of tokens. `fork` shares all full chunks and copies less than one."""

    __slots__ = ("_chunks", "_length")

    def __init__(self) -> None:
        self._chunks: list[bytearray] = []
        self._length = 0

    def __len__(self) -> int:
        return self._length

    @property
    def chunks(self) -> Sequence[bytearray]:
        """The pieces, to be read only; all but the last are full and may be shared with forks."""
        return self._chunks

    def append(self, tokens: Packed) -> None:
        """Commit tokens at the end. Costs what is appended, whatever the length."""
        done = 0
        while done < len(tokens):
            if not self._chunks or len(self._chunks[-1]) == _CHUNK_BYTES:
                self._chunks.append(bytearray())
            last = self._chunks[-1]
            part = tokens[done : done + _CHUNK_BYTES - len(last)]
            last.extend(part)
            done += len(part)
        self._length += len(tokens) // TOKEN_BYTES

    def slice(self, start: int, stop: int) -> Packed:
        """Tokens [start, stop), 0 ≤ start ≤ stop ≤ len."""
        assert 0 <= start <= stop <= self._length, f"slice [{start}, {stop}) of a history of {self._length} tokens"
        start_byte, stop_byte = start * TOKEN_BYTES, stop * TOKEN_BYTES
        first, last = start_byte // _CHUNK_BYTES, ceil_div(stop_byte, _CHUNK_BYTES)
        base = first * _CHUNK_BYTES
        if last - first == 1:
            return bytes(self._chunks[first][start_byte - base : stop_byte - base])
        return b"".join(self._chunks[first:last])[start_byte - base : stop_byte - base]

    def fork(self, length: int) -> "History":
        """A history of the first `length` tokens, independent of this one from here on."""
        assert 0 <= length <= self._length
        child = History()
        full = length * TOKEN_BYTES // _CHUNK_BYTES
        child._chunks = self._chunks[:full]
        child._length = full * _CHUNK_BYTES // TOKEN_BYTES
        child.append(self.slice(child._length, length))
        return child


NO_HISTORY = History()
"""The empty history of plain requests; never appended to."""

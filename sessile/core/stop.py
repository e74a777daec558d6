"""Stop strings, decided on bytes in the core, so that a turn ends where the client saw it end (H58).

The automaton is Aho and Corasick's ("Efficient string matching", 1975) over bytes. It is built once a request from
its stop strings; a `StopMatcher` is fed the bytes of each committed output token and never un-fed: drafts that were
rejected are not committed, and a preempted request keeps its matcher, because what was emitted is a fact.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

_ROOT = 0


@dataclass(frozen=True, slots=True)
class StopFound:
    """A stop string that the output contains: the text before it has `kept_bytes` bytes."""

    stop: bytes
    kept_bytes: int


class StopMatcher:
    """Finds the first stop string to be completed in a stream of bytes; of several that end together, the longest."""

    __slots__ = ("_fail", "_found", "_next", "_state", "bytes_seen")

    def __init__(self, stops: Sequence[bytes]) -> None:
        assert stops and all(stops), "a matcher needs at least one stop string, none of them empty"
        self._next: list[dict[int, int]] = [{}]
        self._fail: list[int] = [_ROOT]
        self._found: list[bytes] = [b""]
        self._state = _ROOT
        self.bytes_seen = 0
        for stop in stops:
            self._insert(stop)
        self._link()

    def feed(self, text: bytes) -> StopFound | None:
        """Advance over the bytes of one token; on a match, say which and where, and stop there."""
        for byte in text:
            self.bytes_seen += 1
            state = self._state
            while state != _ROOT and byte not in self._next[state]:
                state = self._fail[state]
            self._state = state = self._next[state].get(byte, _ROOT)
            found = self._found[state]
            if found:
                return StopFound(found, self.bytes_seen - len(found))
        return None

    def skip(self, text: bytes) -> None:
        """Count the bytes of a token that may not end the output, nor be part of what does."""
        self.bytes_seen += len(text)

    def _insert(self, stop: bytes) -> None:
        state = _ROOT
        for byte in stop:
            following = self._next[state].get(byte)
            if following is None:
                following = len(self._next)
                self._next.append({})
                self._fail.append(_ROOT)
                self._found.append(b"")
                self._next[state][byte] = following
            state = following
        self._found[state] = stop

    def _link(self) -> None:
        queue = deque(self._next[_ROOT].values())
        while queue:
            state = queue.popleft()
            for byte, following in self._next[state].items():
                fallback = self._fail[state]
                while fallback != _ROOT and byte not in self._next[fallback]:
                    fallback = self._fail[fallback]
                self._fail[following] = self._next[fallback].get(byte, _ROOT)
                # A state's own string is longer than any that its fallback completes.
                self._found[following] = self._found[following] or self._found[self._fail[following]]
                queue.append(following)

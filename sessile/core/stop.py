"""Stop strings and patterns, decided on bytes in the core, so that a turn ends where the client saw it end (H58).

The automaton is Aho and Corasick's ("Efficient string matching", 1975) over bytes. It is built once a request from
its stop strings; a `StopMatcher` is fed the bytes of each committed output token and never un-fed: drafts that were
rejected are not committed, and a preempted request keeps its matcher, because what was emitted is a fact. Patterns
come as automata (contract/patterns.py), and are matched on the same bytes.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from sessile.contract.patterns import StopPattern

_ROOT = 0
_STEPS_KEPT_MAX = 4096
"""Steps of a pattern's automaton that a request remembers."""


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


class PatternMatcher:
    """Finds the first end of a match of any of several patterns in a stream of bytes, in time linear in the stream.

    The state of each is the set of its positions that the bytes so far may have led to. Steps between states are
    remembered; how many is bounded, and what is forgotten is computed again.
    """

    __slots__ = ("_patterns",)

    def __init__(self, patterns: Sequence[StopPattern]) -> None:
        assert patterns, "a matcher needs at least one pattern"
        self._patterns = [_PatternState(pattern) for pattern in patterns]

    def feed(self, text: bytes) -> bytes | None:
        """Advance over the bytes of one token; the pattern that matched, or None. Of several, the first one given."""
        found = [state.source for state in self._patterns if state.feed(text)]
        return found[0].encode() if found else None


class _PatternState:
    """One pattern's automaton, and where it is."""

    __slots__ = ("_active", "_byte_sets", "_first", "_follow", "_last", "_masks", "_steps", "source")

    def __init__(self, pattern: StopPattern) -> None:
        self.source = pattern.source
        self._byte_sets = pattern.byte_sets
        self._follow = [int.from_bytes(each, "little") for each in pattern.follow]
        self._first = int.from_bytes(pattern.first, "little")
        self._last = int.from_bytes(pattern.last, "little")
        self._active = 0
        self._masks: dict[int, int] = {}
        """Byte → the positions that take it, of bytes that have come."""
        self._steps: dict[int, int] = {}

    def feed(self, text: bytes) -> bool:
        """Advance over some bytes; whether a match ends in them."""
        for byte in text:
            key = self._active << 8 | byte
            following = self._steps.get(key)
            if following is None:
                if len(self._steps) >= _STEPS_KEPT_MAX:
                    self._steps.clear()
                following = self._steps[key] = self._step(byte)
            self._active = following
            if following & self._last:
                return True
        return False

    def _step(self, byte: int) -> int:
        reached, active = self._first, self._active
        while active:
            lowest = active & -active
            reached |= self._follow[lowest.bit_length() - 1]
            active ^= lowest
        mask = self._masks.get(byte)
        if mask is None:
            mask = self._masks[byte] = self._positions_of(byte)
        return reached & mask

    def _positions_of(self, byte: int) -> int:
        index, bit = byte >> 3, 1 << (byte & 7)
        positions = 0
        for place in range(len(self._follow)):
            if self._byte_sets[32 * place + index] & bit:
                positions |= 1 << place
        return positions

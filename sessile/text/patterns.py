"""Regular expressions that end an output, to automata: a subset that is matched in linear time whatever it is.

Literals, `.`, classes, `\\d \\w \\s` (ASCII) and their complements, groups, `|`, `* + ? {m,n}`. What would need to look
back or ahead, and anchors, are refused: there is no end of a text that still grows. Glushkov, "The abstract theory of
automata" (1961): a position for each literal, so an automaton is as large as the pattern with its counts written out.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

from sessile.contract.patterns import StopPattern
from sessile.errors import InvalidRequest

PATTERN_CHARS_MAX = 512
POSITIONS_MAX = 256
"""Of one automaton: what a step costs at most for each byte of output."""
DEPTH_MAX = 24
COUNT_MAX = POSITIONS_MAX

_HEXADECIMAL = frozenset("0123456789abcdefABCDEF")
_ASCII = (1 << 128) - 1
_NEWLINE = 1 << 10


def _bytes_between(low: int, high: int) -> int:
    return (1 << (high + 1)) - (1 << low)


_DIGITS = _bytes_between(48, 57)
_WORDS = _DIGITS | _bytes_between(65, 90) | _bytes_between(97, 122) | 1 << 95
_SPACES = _bytes_between(9, 13) | 1 << 32
_CLASSES = {"d": _DIGITS, "w": _WORDS, "s": _SPACES}
_SIGNS: dict[str, tuple[int, int | None]] = {"*": (0, None), "+": (1, None), "?": (0, 1)}
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "f": "\f", "v": "\v", "0": "\0"}


@dataclass(frozen=True, slots=True)
class _Set:
    """One byte of a set."""

    bytes: int


@dataclass(frozen=True, slots=True)
class _Sequence:
    """One after the other."""

    parts: "tuple[_Node, ...]"


@dataclass(frozen=True, slots=True)
class _Choice:
    """One of several."""

    options: "tuple[_Node, ...]"


@dataclass(frozen=True, slots=True)
class _Repeat:
    """From low to high times, high ≥ 1; None: without end."""

    body: "_Node"
    low: int
    high: int | None


_Node = _Set | _Sequence | _Choice | _Repeat

_CONTINUED = _Set(_bytes_between(0x80, 0xBF))
_BEYOND_ASCII = (
    _Sequence((_Set(_bytes_between(0xC2, 0xDF)), _CONTINUED)),
    _Sequence((_Set(_bytes_between(0xE0, 0xEF)), _CONTINUED, _CONTINUED)),
    _Sequence((_Set(_bytes_between(0xF0, 0xF4)), _CONTINUED, _CONTINUED, _CONTINUED)),
)
"""Characters of two, three and four bytes."""


def compile_pattern(source: str, *, param: str) -> StopPattern:
    """The automaton of a pattern. Raises InvalidRequest saying what is wrong, and where, under the name `param`."""
    if len(source) > PATTERN_CHARS_MAX:
        raise InvalidRequest(f"{param}: at most {PATTERN_CHARS_MAX} characters", param=param)
    try:
        source.encode()
        tree = _Parser(source).parse()
        automaton = _Automaton()
        part = automaton.add(tree)
        if part.is_nullable:
            raise _PatternFault(0, "it matches the empty text, so it would end every output at once")
    except UnicodeEncodeError:
        raise InvalidRequest(f"{param}: not valid Unicode", param=param) from None
    except _PatternFault as fault:
        raise InvalidRequest(f"{param}: at character {fault.place}: {fault.message}", param=param) from None
    width = (len(automaton.sets) + 7) // 8
    return StopPattern(
        source=source,
        byte_sets=b"".join([each.to_bytes(32, "little") for each in automaton.sets]),
        follow=tuple([each.to_bytes(width, "little") for each in automaton.follow]),
        first=part.first.to_bytes(width, "little"),
        last=part.last.to_bytes(width, "little"),
    )


class _PatternFault(Exception):
    """What is wrong with a pattern, and at which of its characters."""

    def __init__(self, place: int, message: str) -> None:
        super().__init__(message)
        self.place = place
        self.message = message


class _Parser:
    """Recursive descent over one pattern."""

    def __init__(self, source: str) -> None:
        self._source = source
        self._at = 0
        self._depth = 0

    def parse(self) -> _Node:
        """The whole pattern as a tree."""
        tree = self._choice()
        if self._at < len(self._source):
            raise self._fault("there is no group that this closes")
        return tree

    def _fault(self, message: str, place: int | None = None) -> _PatternFault:
        return _PatternFault(self._at if place is None else place, message)

    def _peek(self) -> str:
        return self._source[self._at : self._at + 1]

    def _take(self) -> str:
        character = self._peek()
        if not character:
            raise self._fault("the pattern ends too early")
        self._at += 1
        return character

    def _choice(self) -> _Node:
        options = [self._sequence()]
        while self._peek() == "|":
            self._at += 1
            options.append(self._sequence())
        return options[0] if len(options) == 1 else _Choice(tuple(options))

    def _sequence(self) -> _Node:
        parts: list[_Node] = []
        while self._peek() not in ("", "|", ")"):
            parts.append(self._repeated(self._atom()))
        if not parts:
            raise self._fault("something must stand here: no part may be empty")
        return parts[0] if len(parts) == 1 else _Sequence(tuple(parts))

    def _repeated(self, body: _Node) -> _Node:
        place, sign = self._at, self._peek()
        if not sign or sign not in "*+?{":
            return body
        self._at += 1
        low, high = self._counts(place) if sign == "{" else _SIGNS[sign]
        if self._peek() == "?":  # as few as possible: the first end of a match is what counts anyway
            self._at += 1
        return _Repeat(body, low, high)

    def _counts(self, place: int) -> tuple[int, int | None]:
        end = self._source.find("}", self._at)
        low, comma, high = self._source[self._at : end].partition(",")
        named = [each for each in (low, high) if each]
        if end < 0 or not named or not all(each.isascii() and each.isdigit() and len(each) < 5 for each in named):
            raise self._fault("a count is {m}, {m,}, {,n} or {m,n}; write \\{ for the character", place)
        self._at = end + 1
        least = int(low or 0)
        most = int(high) if high else None if comma else least
        if most == 0 or max(least, most or 0) > COUNT_MAX or (most is not None and most < least):
            raise self._fault(f"a count is from 1 to {COUNT_MAX}, the smaller first", place)
        return least, most

    def _atom(self) -> _Node:
        place, character = self._at, self._take()
        if character == "(":
            return self._group(place)
        if character == "[":
            return self._class(place)
        if character == ".":
            return _Choice((_Set(_ASCII & ~_NEWLINE), *_BEYOND_ASCII))
        if character == "\\":
            return self._escape(place)
        if character in "^$":
            raise self._fault("anchors are not supported: the text still grows", place)
        if character in "*+?{":
            raise self._fault("there is nothing to repeat", place)
        return _literal(character)

    def _group(self, place: int) -> _Node:
        if self._peek() == "?":
            if self._source[self._at : self._at + 2] != "?:":
                raise self._fault("of groups that begin with ?, only (?: is supported", place)
            self._at += 2
        self._depth += 1
        if self._depth > DEPTH_MAX:
            raise self._fault(f"groups may be nested {DEPTH_MAX} deep", place)
        body = self._choice()
        self._depth -= 1
        if self._peek() != ")":
            raise self._fault("this group is not closed", place)
        self._at += 1
        return body

    def _escape(self, place: int) -> _Node:
        character = self._take()
        if character.lower() in _CLASSES:
            found = _CLASSES[character.lower()]
            return _Set(found) if character.islower() else _Choice((_Set(_ASCII & ~found), *_BEYOND_ASCII))
        return _literal(self._escaped(character, place))

    def _escaped(self, character: str, place: int) -> str:
        """The character that an escape stands for."""
        if character in _ESCAPES:
            return _ESCAPES[character]
        if character in "xu":
            count = 2 if character == "x" else 4
            digits = self._source[self._at : self._at + count]
            self._at += len(digits)
            code = int(digits, 16) if len(digits) == count and set(digits) <= _HEXADECIMAL else 0xD800
            if not 0xD800 <= code < 0xE000:
                return chr(code)
            raise self._fault("this is no character's number", place)
        if character.isascii() and character.isalnum():
            raise self._fault(f"\\{character} is not supported", place)
        return character

    def _class(self, place: int) -> _Node:
        negated = self._peek() == "^"
        self._at += negated
        found, beyond = 0, []
        is_first = True
        while self._peek() != "]" or is_first:
            is_first = False
            low = self._member()
            if isinstance(low, int):
                found |= low
                continue
            high = low
            if self._peek() == "-" and self._source[self._at + 1 : self._at + 2] not in ("]", ""):
                self._at += 1
                upper = self._member()
                if not isinstance(upper, str) or upper < low:
                    raise self._fault("a range is of two characters, the lesser first", place)
                high = upper
            if high > "\x7f" and (negated or low != high):
                raise self._fault("beyond ASCII, a class may hold single characters only, and not be negated", place)
            if low > "\x7f":
                beyond.append(_literal(low))
            else:
                found |= _bytes_between(ord(low), ord(high))
        self._at += 1
        if negated:
            return _Choice((_Set(_ASCII & ~found), *_BEYOND_ASCII))
        options: list[_Node] = [_Set(found)] if found else []
        return _Choice((*options, *beyond))

    def _member(self) -> str | int:
        """A character of a class, or the set of an escape like \\d."""
        place, character = self._at, self._take()
        if character != "\\":
            return character
        escaped = self._take()
        return _CLASSES[escaped] if escaped in _CLASSES else self._escaped(escaped, place)


def _literal(character: str) -> _Node:
    sets = tuple([_Set(1 << byte) for byte in character.encode()])
    return sets[0] if len(sets) == 1 else _Sequence(sets)


@dataclass(frozen=True, slots=True)
class _Part:
    """What a part of a tree can begin and end with, as sets of positions, and whether it can be empty."""

    is_nullable: bool
    first: int
    last: int


_EMPTY = _Part(True, 0, 0)


@dataclass(slots=True)
class _Automaton:
    """Positions as they are added: the bytes that each takes, and which may follow it."""

    sets: list[int] = field(default_factory=list)
    follow: list[int] = field(default_factory=list)

    def add(self, node: _Node) -> _Part:
        """Add the positions of a tree. Raises _PatternFault beyond the bound."""
        match node:
            case _Set():
                if len(self.sets) >= POSITIONS_MAX:
                    raise _PatternFault(0, f"it is too large: written out, over {POSITIONS_MAX} bytes and classes")
                self.sets.append(node.bytes)
                self.follow.append(0)
                place = 1 << len(self.sets) - 1
                return _Part(False, place, place)
            case _Sequence():
                part = _EMPTY
                for each in node.parts:
                    part = self._join(part, self.add(each))
                return part
            case _Choice():
                parts = [self.add(each) for each in node.options]
                part = parts[0]
                for other in parts[1:]:
                    is_nullable = part.is_nullable or other.is_nullable
                    part = _Part(is_nullable, part.first | other.first, part.last | other.last)
                return part
            case _Repeat():
                return self._repeat(node)

    def _repeat(self, node: _Repeat) -> _Part:
        part = _EMPTY
        copies = node.high if node.high is not None else max(node.low, 1)
        for copy in range(copies):
            body = self.add(node.body)
            if node.high is None and copy == copies - 1:
                self._link(body.last, body.first)
            if copy >= node.low:
                body = _Part(True, body.first, body.last)
            part = self._join(part, body)
        return part

    def _join(self, before: _Part, behind: _Part) -> _Part:
        self._link(before.last, behind.first)
        return _Part(
            before.is_nullable and behind.is_nullable,
            before.first | (behind.first if before.is_nullable else 0),
            behind.last | (before.last if behind.is_nullable else 0),
        )

    def _link(self, sources: int, targets: int) -> None:
        for place in _places(sources):
            self.follow[place] |= targets


def _places(positions: int) -> Iterator[int]:
    while positions:
        lowest = positions & -positions
        yield lowest.bit_length() - 1
        positions ^= lowest

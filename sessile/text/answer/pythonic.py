"""Calls written as a list of Python calls, `[f(a=1), g(b="x")]`, which is the whole answer. Parsed, never evaluated."""

import ast
import json
import re
import warnings
from collections.abc import Container, Iterable
from enum import Enum, auto
from typing import Any

from sessile.text.answer.events import CallArguments, CallBegan, CallEnded, CallFailed, Content, Event
from sessile.text.answer.json_pieces import NAME_CHARS_MAX
from sessile.text.answer.marked import UNFINISHED, forbidden
from sessile.text.answer.markers import SPACE, space_at_front

DEPTH_MAX = 64
_NAME = re.compile(r"[^\W\d][\w.-]*")
_PLAIN_RUN = re.compile(r"[^\"'()\[\]{}]+")
_STRING_RUNS = {quote: re.compile(rf"[^{quote}\\\n]+") for quote in "\"'"}
_JSON_WORDS = {"true": True, "false": False, "null": None}
"""What models that have seen more JSON than Python write for True, False and None."""


class _NoLiteral(ValueError):
    """An argument that is no plain value."""


class _Place(Enum):
    START = auto()
    FIRST = auto()
    """Behind the bracket, before the name of the first call: not until it is that of a tool is this a call."""
    NEXT = auto()
    """Behind a comma."""
    CALL = auto()
    BETWEEN = auto()
    """Behind a call: a comma or the end of the list."""
    AFTER = auto()
    TEXT = auto()


class PythonicCalls:
    """Reads one answer. Text passes as content; white space that touches the list is dropped.

    A call's name is told when its parenthesis opens, its arguments, as JSON, when it closes.
    """

    def __init__(self, tool_names: Iterable[str], allowed: Container[str] | None = None) -> None:
        """allowed: the names that alone may be called; a list is text from the first other one on. None: any."""
        self._tool_names = frozenset(tool_names)
        self._allowed = allowed
        self._place = _Place.START
        self._held = ""
        self._raw = ""
        self._scan = _Parentheses()
        self._begun = 0
        self._is_announced = False
        self._is_known = False
        self._events: list[Event] = []

    def push(self, text: str) -> list[Event]:
        """Take text that is not the last; what is certain now."""
        self._held += text
        steps = {
            _Place.START: self._at_start,
            _Place.FIRST: self._before_name,
            _Place.NEXT: self._before_name,
            _Place.CALL: self._in_call,
            _Place.BETWEEN: self._between,
            _Place.AFTER: self._behind_list,
            _Place.TEXT: self._in_text,
        }
        while self._held and steps[self._place]():
            pass
        return self._take_events()

    def finish(self) -> list[Event]:
        """The output has ended: what was held."""
        if self._place in (_Place.START, _Place.TEXT):
            self._events.append(Content(self._held))
        elif self._place is not _Place.AFTER:
            self._take_raw(len(self._held))
            self._fail(UNFINISHED)
        self._held = ""
        return self._take_events()

    def _at_start(self) -> bool:
        """Each of these goes one step on; False if that takes more text."""
        space = space_at_front(self._held)
        if space == len(self._held):
            return False
        if self._held[space] == "[":
            self._take_raw(space + 1)
            self._place = _Place.FIRST
        else:
            self._place = _Place.TEXT
        return True

    def _before_name(self) -> bool:
        lead = space_at_front(self._held)
        if lead == len(self._held):
            return False
        name = _NAME.match(self._held, lead)
        end = name.end() if name else lead
        if end == len(self._held) and end - lead <= NAME_CHARS_MAX:
            return False
        if name and self._held.startswith("(", end) and (self._place is _Place.NEXT or name[0] in self._tool_names):
            self._take_raw(end + 1)
            self._is_known = True
            if self._allowed is not None and name[0] not in self._allowed:
                self._fail(forbidden(name[0]))
                return True
            self._scan, self._is_announced = _Parentheses(), True
            self._events.append(CallBegan(self._begun, name[0]))
            self._begun += 1
            self._place = _Place.CALL
        else:
            self._take_raw(lead)
            self._fail("no call follows in its list")
        return True

    def _in_call(self) -> bool:
        end = self._scan.read(self._held)
        self._take_raw(end)
        if self._scan.is_too_deep:
            self._fail(f"it is nested more than {DEPTH_MAX} deep")
        elif self._scan.is_done:
            try:
                arguments = json_arguments(self._scan.source)
            except _NoLiteral as error:
                self._fail(str(error))
                return True
            self._events += [CallArguments(self._begun - 1, arguments), CallEnded(self._begun - 1)]
            self._is_announced, self._place = False, _Place.BETWEEN
            self._raw = ""
        return bool(self._held) and end > 0

    def _between(self) -> bool:
        lead = space_at_front(self._held)
        if lead == len(self._held):
            return False
        character = self._held[lead]
        if character in ",]":
            self._take_raw(lead + 1)
            self._place = _Place.NEXT if character == "," else _Place.AFTER
        else:
            self._fail("its list does not go on")
        return True

    def _behind_list(self) -> bool:
        self._held = self._held.lstrip(SPACE)
        self._place = _Place.TEXT if self._held else _Place.AFTER
        return True

    def _in_text(self) -> bool:
        self._events.append(Content(self._held))
        self._held = ""
        return False

    def _take_raw(self, count: int) -> None:
        self._raw += self._held[:count]
        self._held = self._held[count:]

    def _fail(self, reason: str) -> None:
        """What was read is text. Without a tool's name behind the bracket it never was a call."""
        raw, self._raw = self._raw, ""
        index = self._begun - 1 if self._is_announced else None
        self._events.append(CallFailed(index, raw, reason) if self._is_known else Content(raw))
        self._place, self._is_announced = _Place.TEXT, False

    def _take_events(self) -> list[Event]:
        events, self._events = self._events, []
        return events


class _Parentheses:
    """Finds the parenthesis that closes a call. source: what stands before it.

    Line breaks within plain strings, which models write and Python forbids, become escapes.
    """

    def __init__(self) -> None:
        self.source = ""
        self.is_done = False
        self.is_too_deep = False
        self._depth = 1
        self._quote = ""

    def read(self, text: str) -> int:
        """Read on; how far it came, what remains is undecided."""
        at = 0
        while at < len(text) and not (self.is_done or self.is_too_deep):
            after = self._in_string(text, at) if self._quote else self._outside(text, at)
            if after == at:
                break
            at = after
        return at

    def _outside(self, text: str, at: int) -> int:
        if run := _PLAIN_RUN.match(text, at):
            self.source += run[0]
            return run.end()
        character = text[at]
        if character in "\"'":
            quotes = text[at : at + 3]
            if len(quotes) < 3 and quotes == character * len(quotes):
                return at  # it may be one of three
            self._quote = quotes if quotes == character * 3 else character
            self.source += self._quote
            return at + len(self._quote)
        self._depth += 1 if character in "([{" else -1
        self.is_done, self.is_too_deep = self._depth == 0, self._depth > DEPTH_MAX
        self.source += "" if self.is_done else character
        return at + 1

    def _in_string(self, text: str, at: int) -> int:
        quote = self._quote
        if run := _STRING_RUNS[quote[0]].match(text, at):
            self.source += run[0]
            return run.end()
        if text[at] == "\\":
            if at + 1 == len(text):
                return at
            self.source += text[at : at + 2]
            return at + 2
        if text[at] == "\n":
            self.source += "\\n" if len(quote) == 1 else "\n"
            return at + 1
        if text.startswith(quote, at):
            self.source += quote
            self._quote = ""
            return at + len(quote)
        if quote.startswith(text[at:]):
            return at  # one or two of three
        self.source += text[at]
        return at + 1


def json_arguments(source: str) -> str:
    """The JSON object of arguments as they stand between a call's parentheses. Raises _NoLiteral, saying why not."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes that Python does not know
            call = ast.parse(f"f({source}\n)", mode="eval").body
        if not isinstance(call, ast.Call):  # a comment has hidden a parenthesis from us
            raise _NoLiteral("its arguments are no plain Python")
        if call.args:
            raise _NoLiteral("its arguments have no names")
        arguments: dict[str, Any] = {}
        for keyword in call.keywords:
            if keyword.arg is None:
                raise _NoLiteral("its arguments are not spelled out")
            if keyword.arg in arguments:
                raise _NoLiteral("one of its arguments is there twice")
            arguments[keyword.arg] = _plain(keyword.value)
        written = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
        written.encode()
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        if isinstance(error, _NoLiteral):
            raise
        raise _NoLiteral("its arguments are no plain Python") from error
    return written


def _plain(node: ast.expr) -> Any:
    """The value of a literal."""
    match node:
        case ast.Constant(value) if value is None or isinstance(value, str | bool | int | float):
            return value
        case ast.Name(name) if name in _JSON_WORDS:
            return _JSON_WORDS[name]
        case ast.List(elements) | ast.Tuple(elements):
            return [_plain(element) for element in elements]
        case ast.Dict(keys, values):
            names = [None if key is None else _plain(key) for key in keys]
            if not all(isinstance(name, str) for name in names):
                raise _NoLiteral("one of its arguments has keys that are no strings")
            return dict(zip(names, map(_plain, values), strict=True))
        case ast.UnaryOp(ast.USub(), ast.Constant(value)) if type(value) in (int, float):
            return -value  # type: ignore[operator]
    raise _NoLiteral(f"one of its arguments is no plain value but {type(node).__name__}")

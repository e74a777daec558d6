"""Calls written as JSON objects: between markers (Hermes, Qwen), behind one, or bare at the start (Llama 3)."""

import re
from collections.abc import Container, Iterable
from dataclasses import dataclass
from enum import Enum, auto

from sessile.text.answer.events import CallArguments, CallBegan, CallEnded, CallFailed, Content, Event
from sessile.text.answer.json_pieces import CallObject, NotJson
from sessile.text.answer.markers import SPACE, begun_marker, first_marker, space_at_front

_LIST_LEAD = re.compile(r"[ \t\r\n]*\[?[ \t\r\n]*")
_SEPARATOR = re.compile(r"[ \t\r\n]*[;,]?[ \t\r\n]*")

UNFINISHED = "the output ends within it"


def forbidden(name: str) -> str:
    """Why a call of what may not be called has failed."""
    return f"{name!r} is not among the tools that tool_choice allows"


@dataclass(frozen=True, slots=True)
class Markers:
    """What a family writes around its calls.

    close: "" if nothing ends a call but its last brace. may_be_bare: an object at the start of the answer is a call as
    well, if its name is that of a tool.
    """

    open: str
    close: str = ""
    may_be_bare: bool = False


HERMES = Markers("<tool_call>", "</tool_call>")
LLAMA3 = Markers("<|python_tag|>", may_be_bare=True)


class _Place(Enum):
    START = auto()
    """Nothing but white space so far, where a call may be bare."""
    TEXT = auto()
    OPEN = auto()
    """Behind a marker, before the object."""
    CALL = auto()
    BETWEEN = auto()
    """Behind a call: another may follow."""


class MarkedCalls:
    """Reads one answer. Text passes as content; white space that touches a call is dropped.

    A call is told as it is written: its name first, then its arguments as they come. One that is not allowed is read to
    its end, so that nothing in its arguments is taken for another, and then told as one that failed.
    """

    def __init__(self, markers: Markers, tool_names: Iterable[str], allowed: Container[str] | None = None) -> None:
        """allowed: the names that alone may be called; None: any."""
        self._markers = markers
        self._tool_names = frozenset(tool_names)
        self._allowed = allowed
        self._place = _Place.START if markers.may_be_bare else _Place.TEXT
        self._held = ""
        self._raw = ""
        """The call that is being read, as it was written."""
        self._call: CallObject | None = None
        self._is_marked = False
        self._is_announced = False
        self._is_unclosed = False
        self._is_listed = False
        self._begun = 0
        self._events: list[Event] = []

    def push(self, text: str) -> list[Event]:
        """Take text that is not the last; what is certain now."""
        self._held += text
        steps = {
            _Place.START: self._at_start,
            _Place.TEXT: self._in_text,
            _Place.OPEN: self._behind_marker,
            _Place.CALL: self._in_call,
            _Place.BETWEEN: self._between,
        }
        while self._held and steps[self._place]():
            pass
        return self._take_events()

    def finish(self) -> list[Event]:
        """The output has ended: what was held."""
        held, self._held = self._held, ""
        if self._place is _Place.CALL and self._call and self._call.lacks_only_its_end and self._is_announced:
            self._end_call()
        elif self._place is _Place.OPEN or self._place is _Place.CALL:
            self._raw += held
            self._fail(UNFINISHED)
        elif self._place is _Place.BETWEEN:
            held = held.lstrip(SPACE)
            if not (self._is_unclosed and self._markers.close.startswith(held)):
                self._events.append(Content(held))
        else:
            self._events.append(Content(held))
        return self._take_events()

    def _at_start(self) -> bool:
        """Each of these goes one step on; False if that takes more text."""
        space = space_at_front(self._held)
        if space == len(self._held):
            return False
        if self._held[space] == "{":
            self._open_call(space)
        else:
            self._place = _Place.TEXT
        return True

    def _in_text(self) -> bool:
        at, marker = first_marker(self._held, self._wanted())
        if marker:
            self._events.append(Content(self._held[:at].rstrip(SPACE)))
            self._held = self._held[at:]
            self._meet(marker)
            return True
        certain = len(self._held) - begun_marker(self._held, self._wanted())
        said = len(self._held[:certain].rstrip(SPACE))
        self._events.append(Content(self._held[:said]))
        self._held = self._held[said:]
        return False

    def _behind_marker(self) -> bool:
        lead = _LIST_LEAD.match(self._held)
        count = lead.end() if lead else 0
        if count == len(self._held):
            return False
        self._is_listed = "[" in self._held[:count]
        if self._held[count] == "{":
            self._open_call(count)
        else:
            self._take_raw(count)
            self._fail("no JSON object follows its marker")
        return True

    def _in_call(self) -> bool:
        call = self._call
        assert call is not None
        try:
            end = call.read(self._held, 0)
        except NotJson as error:
            self._tell(call)
            self._take_raw(error.at)
            close = self._markers.close
            if close and call.lacks_only_its_end and close.startswith(self._held[: len(close)]):
                return self._end_without_brace()
            self._fail(error.reason)
            return True
        self._take_raw(end)
        if not self._tell(call):
            self._fail(f"{call.name!r} is no tool of this request")
            return True
        if call.is_done:
            self._end_call()
        return call.is_done

    def _end_without_brace(self) -> bool:
        """The marker that closes follows where a brace should, which models forget: the call is none the worse."""
        is_whole = self._held.startswith(self._markers.close)
        if is_whole:
            self._end_call()
        return is_whole

    def _end_call(self) -> None:
        assert self._call is not None and self._call.name is not None
        if not self._may_call(self._call.name):
            self._fail(forbidden(self._call.name))
            return
        self._events.append(CallEnded(self._begun - 1))
        self._raw, self._call, self._is_announced = "", None, False
        self._is_unclosed = self._is_marked and bool(self._markers.close)
        self._place = _Place.BETWEEN

    def _between(self) -> bool:
        self._held = self._held.lstrip(SPACE)
        wanted = self._wanted()
        for marker in wanted:
            if self._held.startswith(marker):
                self._meet(marker)
                return True
        if any(marker.startswith(self._held) for marker in wanted):
            return False
        if self._is_listed and self._held[0] == "]":
            self._held, self._is_listed = self._held[1:], False
            return True
        separator = _SEPARATOR.match(self._held)
        count = separator.end() if separator else 0
        if count == len(self._held):
            return False
        if self._held[count] == "{" and (self._markers.may_be_bare or self._is_unclosed):
            self._open_call(count)
        else:
            self._place = _Place.TEXT
        return True

    def _wanted(self) -> tuple[str, ...]:
        """The markers that mean something here: one that closes, only behind a call that is not closed."""
        markers = self._markers
        return (markers.open, markers.close) if self._is_unclosed else (markers.open,)

    def _meet(self, marker: str) -> None:
        """The text goes on with a marker."""
        if marker == self._markers.open:
            self._is_unclosed, self._is_marked = False, True
            self._take_raw(len(marker))
            self._place = _Place.OPEN
        else:
            self._held = self._held[len(marker) :]
            self._is_unclosed = self._is_listed = False
            self._place = _Place.BETWEEN

    def _open_call(self, lead: int) -> None:
        """An object begins so many characters further on."""
        self._take_raw(lead)
        self._call, self._is_announced = CallObject(only_known=not self._is_marked), False
        self._place = _Place.CALL

    def _take_raw(self, count: int) -> None:
        self._raw += self._held[:count]
        self._held = self._held[count:]

    def _tell(self, call: CallObject) -> bool:
        """Announce what is new of a call; False if it is none after all, for its name is that of no tool."""
        if call.name is None:
            return True
        if not self._is_marked and call.name not in self._tool_names:
            return False
        if not call.has_arguments or not self._may_call(call.name):
            return True
        if not self._is_announced:
            self._is_announced = True
            self._events.append(CallBegan(self._begun, call.name))
            self._begun += 1
        self._events.append(CallArguments(self._begun - 1, call.ready))
        call.ready = ""
        return True

    def _may_call(self, name: str) -> bool:
        return self._allowed is None or name in self._allowed

    def _fail(self, reason: str) -> None:
        """What was read of a call is text. One that had neither a marker nor the name of a tool never was a call."""
        raw, self._raw, call, self._call = self._raw, "", self._call, None
        is_call = self._is_marked or (call is not None and call.name in self._tool_names)
        index = self._begun - 1 if call is not None and self._is_announced else None
        self._events.append(CallFailed(index, raw, reason) if is_call else Content(raw))
        self._place, self._is_marked, self._is_announced, self._is_listed = _Place.TEXT, False, False, False

    def _take_events(self) -> list[Event]:
        events, self._events = self._events, []
        return events

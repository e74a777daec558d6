"""The parts of an answer as they are read, and what they add up to.

However the text is cut into pieces, the events add up to the same answer. A stream may have announced a call before it
turns out to be none: `CallFailed` takes it back, and a client that reads the whole answer never sees it.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Reasoning:
    """More of what the model said to itself."""

    text: str


@dataclass(frozen=True, slots=True)
class Content:
    """More of what it says to the user."""

    text: str


@dataclass(frozen=True, slots=True)
class CallBegan:
    """A call of a tool; its arguments follow. index: counts the calls that began, from 0."""

    index: int
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """More of a call's arguments. What came so far is always the beginning of a JSON object."""

    index: int
    text: str


@dataclass(frozen=True, slots=True)
class CallEnded:
    """The call is complete: its arguments are a JSON object."""

    index: int


@dataclass(frozen=True, slots=True)
class CallFailed:
    """What looked like a call is none. text: all of it as the model wrote it, which is content now.

    index: of the call that had begun and is void; None if none had.
    """

    index: int | None
    text: str
    reason: str


Event = Reasoning | Content | CallBegan | CallArguments | CallEnded | CallFailed


@dataclass(slots=True)
class ToolCall:
    """A complete call. index: of its beginning. arguments: a JSON object as text, as the model wrote it."""

    index: int
    name: str
    arguments: str = ""


@dataclass(slots=True)
class Answer:
    """A whole answer. failures: what looked like calls and was none; their text is in the content."""

    reasoning: str = ""
    content: str = ""
    calls: list[ToolCall] = field(default_factory=list)
    failures: list[CallFailed] = field(default_factory=list)
    _open: ToolCall | None = None

    def add(self, event: Event) -> None:
        """Take the next event."""
        match event:
            case Reasoning(text):
                self.reasoning += text
            case Content(text):
                self.content += text
            case CallBegan(index, name):
                self._open = ToolCall(index, name)
            case CallArguments(_, text):
                assert self._open is not None, "arguments of a call that has not begun"
                self._open.arguments += text
            case CallEnded():
                assert self._open is not None, "the end of a call that has not begun"
                self.calls.append(self._open)
                self._open = None
            case CallFailed(_, text, _):
                self._open = None
                self.content += text
                self.failures.append(event)


def merged(events: Iterable[Event]) -> list[Event]:
    """The events with neighbours of one kind joined, and none without text."""
    joined: list[Event] = []
    for event in events:
        if isinstance(event, Reasoning | Content | CallArguments) and not event.text:
            continue
        last = joined[-1] if joined else None
        if isinstance(last, Reasoning) and isinstance(event, Reasoning):
            joined[-1] = Reasoning(last.text + event.text)
        elif isinstance(last, Content) and isinstance(event, Content):
            joined[-1] = Content(last.text + event.text)
        elif isinstance(last, CallArguments) and isinstance(event, CallArguments) and last.index == event.index:
            joined[-1] = CallArguments(last.index, last.text + event.text)
        else:
            joined.append(event)
    return joined

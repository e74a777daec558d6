"""One answer as it comes: reasoning, then content and calls."""

from typing import Protocol

from sessile.text.answer.events import CallEnded, Content, Event, Reasoning, merged
from sessile.text.answer.reasoning import ReasoningSplit


class CallReader(Protocol):
    """Reads calls out of the text of an answer (marked.py, pythonic.py)."""

    def push(self, text: str) -> list[Event]:
        """Take text that is not the last; what is certain now."""
        ...

    def finish(self) -> list[Event]:
        """The output has ended: what was held."""
        ...


class AnswerReader:
    """Turns the text of one output into events; their fold does not depend on how the text was cut (events.py)."""

    def __init__(
        self,
        *,
        reasoning: ReasoningSplit | None = None,
        calls: CallReader | None = None,
        is_parallel: bool = True,
        streams_reasoning: bool = True,
    ) -> None:
        """None: there is none to be read. is_parallel: False leaves out whatever calls follow the first.

        streams_reasoning: False tells it in one piece, when it is over.
        """
        self._reasoning = reasoning
        self._calls = calls
        self._is_parallel = is_parallel
        self._streams_reasoning = streams_reasoning
        self._kept_reasoning = ""
        self._has_call = False

    @property
    def knows_reasoning(self) -> bool:
        """Whether reasoning would be told apart if there were any."""
        return self._reasoning is not None

    @property
    def reasoning_bytes(self) -> int:
        """How much of the output, as UTF-8, is reasoning, its markers included."""
        return self._reasoning.reasoning_bytes if self._reasoning else 0

    def push(self, text: str) -> list[Event]:
        """Take text that is not the last; what is certain now."""
        if self._reasoning is None and self._calls is None:
            return [Content(text)] if text else []  # as below, where nothing is to be read out of it
        return self._told(merged(self._read(text)))

    def finish(self, text: str = "") -> list[Event]:
        """Take the last text; all that was held."""
        events = self._read(text)
        if self._reasoning:
            fresh, rest = self._reasoning.finish()
            events += fresh + self._read_answer(rest)
        if self._calls:
            events += self._calls.finish()
        told = self._told(merged(events))
        return merged([*told, *self._take_kept()])

    def _read(self, text: str) -> list[Event]:
        events, rest = self._reasoning.push(text) if self._reasoning else ([], text)
        return events + self._read_answer(rest)

    def _read_answer(self, text: str) -> list[Event]:
        return self._calls.push(text) if self._calls else [Content(text)]

    def _told(self, events: list[Event]) -> list[Event]:
        """The events that the request wants to be told now."""
        told: list[Event] = []
        for event in events:
            if isinstance(event, Reasoning) and not self._streams_reasoning:
                self._kept_reasoning += event.text
                continue
            if self._has_call and not self._is_parallel and not isinstance(event, Content | Reasoning):
                continue
            self._has_call = self._has_call or isinstance(event, CallEnded)
            told += [*self._take_kept(), event]
        return told

    def _take_kept(self) -> list[Event]:
        kept, self._kept_reasoning = self._kept_reasoning, ""
        return [Reasoning(kept)] if kept else []

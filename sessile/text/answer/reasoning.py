"""`<think>…</think>`: what a model says to itself before it answers, told from the answer as it comes."""

from enum import Enum, auto

from sessile.text.answer.events import Content, Event, Reasoning
from sessile.text.answer.markers import SPACE, begun_marker, space_at_front

OPEN, CLOSE = "<think>", "</think>"


class _Phase(Enum):
    START = auto()
    """White space, or part of the marker that opens: what it begins is not known."""
    LEAD = auto()
    """White space behind that marker."""
    REASONING = auto()
    GAP = auto()
    """White space behind the marker that closes."""
    ANSWER = auto()


class ReasoningSplit:
    """Splits one output. Reasoning stands at its beginning or nowhere; a marker further on is just text.

    White space that touches a marker goes with it. An output without markers passes unchanged.
    """

    def __init__(self, *, is_open: bool, is_apart: bool = True) -> None:
        """is_open: the prompt has opened the reasoning. is_apart: False leaves it in the content as it was written."""
        self.reasoning_bytes = 0
        """How much of the output, as UTF-8, is reasoning, its markers included."""
        self._is_open = is_open
        self._is_apart = is_apart
        self._phase = _Phase.START
        self._held = ""
        self._shown = ""

    def push(self, text: str) -> tuple[list[Event], str]:
        """Take text; the events of reasoning that are certain now, and the text of the answer behind it."""
        self._held += text
        if self._phase is _Phase.START:
            self._start()
        if self._phase is _Phase.LEAD:
            self._skip(space_at_front(self._held))
            self._phase = _Phase.REASONING if self._held else _Phase.LEAD
        if self._phase is _Phase.REASONING:
            self._reason()
        if self._phase is _Phase.GAP:
            self._skip(space_at_front(self._held), is_reasoning=False)
            self._phase = _Phase.ANSWER if self._held else _Phase.GAP
        return self._events(), self._take_answer() if self._phase is _Phase.ANSWER else ""

    def finish(self) -> tuple[list[Event], str]:
        """The output has ended: what was held, as reasoning or as text of the answer."""
        if self._phase is _Phase.REASONING or (self._phase is _Phase.START and self._is_open):
            self._show(len(self._held))
        return self._events(), self._take_answer()

    def _start(self) -> None:
        space = space_at_front(self._held)
        begun = self._held[space : space + len(OPEN)]
        if begun == OPEN:
            self._skip(space + len(OPEN))
            self._phase = _Phase.LEAD
        elif not OPEN.startswith(begun):
            self._phase = _Phase.LEAD if self._is_open else _Phase.ANSWER

    def _reason(self) -> None:
        at = self._held.find(CLOSE)
        if at >= 0:
            said = len(self._held[:at].rstrip(SPACE))
            self._show(said)
            self._skip(at - said + len(CLOSE))
            self._phase = _Phase.GAP
        else:
            certain = len(self._held) - begun_marker(self._held, (CLOSE,))
            self._show(len(self._held[:certain].rstrip(SPACE)))

    def _skip(self, count: int, *, is_reasoning: bool = True) -> None:
        skipped, self._held = self._held[:count], self._held[count:]
        self.reasoning_bytes += len(skipped.encode()) if is_reasoning else 0
        if not self._is_apart:
            self._shown += skipped

    def _show(self, count: int) -> None:
        said, self._held = self._held[:count], self._held[count:]
        self.reasoning_bytes += len(said.encode())
        self._shown += said

    def _events(self) -> list[Event]:
        shown, self._shown = self._shown, ""
        if not shown:
            return []
        return [Reasoning(shown) if self._is_apart else Content(shown)]

    def _take_answer(self) -> str:
        rest, self._held = self._held, ""
        return rest

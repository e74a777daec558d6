"""Reading whole answers, for the tests of what reads them."""

from collections.abc import Iterable
from typing import Any

from sessile.text.answer.events import Answer, Event
from sessile.text.answer.formats import AnswerFormat

TOOLS = ("f", "g")
HERMES, LLAMA3, PYTHONIC = (AnswerFormat(name, "none") for name in ("hermes", "llama3", "pythonic"))
THINKING = AnswerFormat("hermes", "think")


def events_of(form: AnswerFormat, pieces: Iterable[str], *, prompt: str = "", **wishes: Any) -> list[Event]:
    """What a reader tells of an answer that comes in these pieces."""
    reader = form.reader(prompt, **{"tool_names": TOOLS, **wishes})
    events = [event for piece in pieces for event in reader.push(piece)]
    return events + reader.finish()


def added_up(events: Iterable[Event]) -> Answer:
    answer = Answer()
    for event in events:
        answer.add(event)
    return answer


def read(form: AnswerFormat, text: str, **wishes: Any) -> Answer:
    """An answer that comes in one piece."""
    return added_up(events_of(form, [text], **wishes))


def calls(answer: Answer) -> list[tuple[str, str]]:
    return [(call.name, call.arguments) for call in answer.calls]

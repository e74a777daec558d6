"""Seams: whether a chat template only ever writes behind what it has written, and what it writes behind an answer.

KV of a conversation can be gone on from if the prompt for more messages begins with the prompt for fewer. Most
templates are like that. One that rewrites earlier turns, say by leaving their reasoning out, is found out here, once.
"""

from collections.abc import Callable, Sequence

from sessile.errors import InvalidRequest
from sessile.text.template import Message

Render = Callable[[Sequence[Message], bool], str]
"""The prompt for messages; the second argument: whether the beginning of an answer is added."""

_SYSTEM = Message(role="system", content="Be kind.")
_HELLO = Message(role="user", content="Hello.")
_OPENINGS = (
    [_HELLO],
    [_SYSTEM, _HELLO],
    [_HELLO, Message(role="assistant", content="Good day."), _HELLO],
)
_ANSWERS = ("Yes.", "Two words")


def closing_of(render: Render) -> str | None:
    """What the template writes behind an answer, before anything else; None if it rewrites what came before.

    A template that refuses a system message is judged without one.
    """
    closings: set[str | None] = set()
    for opening in _OPENINGS:
        try:
            closings.update(_closing_behind(render, opening, answer) for answer in _ANSWERS)
        except InvalidRequest:
            if opening[0] is not _SYSTEM:
                return None
    return closings.pop() if len(closings) == 1 else None


def _closing_behind(render: Render, opening: list[Message], answer: str) -> str | None:
    said = [*opening, Message(role="assistant", content=answer)]
    asked, closed = render(opening, True), render(said, False)
    if not closed.startswith(asked + answer) or not render([*said, _HELLO], True).startswith(closed):
        return None
    return closed[len(asked) + len(answer) :]

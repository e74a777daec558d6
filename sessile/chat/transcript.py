"""What was said in a conversation, and which tokens of it the server still lacks."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from sessile.completion import Completion
from sessile.errors import InvalidRequest, StartupError
from sessile.text.template import Message
from sessile.text.tokenizer import Tokenizer

_PLACEHOLDER = "\ue000answer\ue000"
"""Stands for an answer where only what the template writes after it matters; private use, so nobody types it."""

TITLE_CHARS = 40
"""Of each question in a title."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer as the client saw it; times in seconds since the question was sent."""

    completion: Completion
    first_token_s: float
    total_s: float

    @property
    def summary(self) -> str:
        """The turn in one line."""
        said = self.completion
        line = f"{said.prompt_tokens - said.cached_tokens} new tokens · {said.cached_tokens} reused"
        if said.tokens:
            line += f" · first token after {self.first_token_s * 1e3:.0f} ms"
        if len(said.tokens) > 1:
            speed = (len(said.tokens) - 1) / max(self.total_s - self.first_token_s, 1e-9)
            line += f" · {len(said.tokens)} tokens at {speed:.1f} tokens/s"
        return line


class Transcript:
    """What was said so far, and which tokens of it the server still lacks.

    Raises StartupError if the model's chat template cannot be continued turn by turn. A model without a template gets
    the lines as they are.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._messages: tuple[Message, ...] = ()
        self._unsent: tuple[int, ...] = ()
        self._end_marker = ""
        if tokenizer.template is not None:
            probe = [Message(role="user", content="a"), Message(role="assistant", content=_PLACEHOLDER)]
            try:
                continued = tokenizer.render_chat([*probe, Message(role="user", content="b")])
            except InvalidRequest as error:
                raise StartupError(f"cannot chat with this model: {error.message}. Use /generate.") from error
            if _PLACEHOLDER not in continued:
                raise StartupError("cannot chat with this model: its template drops earlier answers. Use /generate.")

    @property
    def title(self) -> str:
        """The first question and the last one, on one line; or nothing."""
        questions = [" ".join(self._messages[at]["content"].split())[:TITLE_CHARS] for at in (0, -2) if self._messages]
        return " … ".join(questions if len(self._messages) > 2 else questions[:1])

    def copy(self) -> Self:
        """The same up to now; what is said to one from now on is not said to the other."""
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__)
        return twin

    def question(self, text: str) -> list[int]:
        """The tokens to send for the user's next message; nothing is kept of it until `answered`."""
        if self._tokenizer.template is None:
            return [*self._unsent, *self._tokenizer.encode(text, add_special_tokens=not self._messages)]
        user = Message(role="user", content=text)
        if not self._messages:
            return self._tokenizer.encode_chat([user])
        placeholder = Message(role="assistant", content=_PLACEHOLDER)
        prompt = self._tokenizer.render_chat([*self._messages[:-1], placeholder, user])
        fresh = prompt.rpartition(_PLACEHOLDER)[2].removeprefix(self._end_marker)
        return [*self._unsent, *self._tokenizer.encode(fresh, add_special_tokens=False)]

    def answered(self, text: str, sent: Sequence[int], said: Completion) -> None:
        """Keep a turn: the user's message, the tokens sent for it, and the answer.

        An interrupted turn was rolled back on the server, so its tokens are sent again with the next question.
        """
        turn = Message(role="user", content=text), Message(role="assistant", content=said.text)
        self._messages += turn
        self._unsent = (*sent, *said.tokens) if said.finish_reason == "abort" else ()
        ended_by = said.matched if isinstance(said.matched, int) else None
        self._end_marker = self._tokenizer.decode([ended_by], skip_special_tokens=False) if ended_by is not None else ""

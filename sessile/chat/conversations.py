"""The conversations of one chat: each a session on the server and its transcript, with forks and steps back."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from sessile.chat.transcript import Answer, Transcript
from sessile.client.sync_client import Client, ClientSession
from sessile.completion import SamplingParams, SessionState
from sessile.errors import InvalidRequest, NotFound, NotReady
from sessile.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Place:
    """A point in a conversation to come back to: what was said, and how much of it the server had."""

    transcript: Transcript
    server_tokens: int


class Conversation:
    """One session and its transcript. Owns the session until `close`. Raises UserError for what the server refuses."""

    def __init__(self, session: ClientSession, transcript: Transcript, places: tuple[Place, ...] = ()) -> None:
        self._session = session
        self._transcript = transcript
        self._places = places
        self._server_tokens = places[-1].server_tokens if places else 0

    @property
    def exchanges(self) -> int:
        """Questions that were answered, interrupted answers included."""
        return len(self._places)

    @property
    def title(self) -> str:
        """Its first question and its last one; or nothing."""
        return self._transcript.title

    def ask(self, text: str, sampling: SamplingParams, show: Callable[[str], None]) -> Answer:
        """Send what is new and generate; `show` gets the text as it comes. Refused, it leaves no trace."""
        tokens = self._transcript.question(text)
        started_s = time.perf_counter()
        first_token_s = 0.0
        completion = None
        for piece in self._session.stream(tokens, sampling):
            if piece.tokens and not first_token_s:
                first_token_s = time.perf_counter() - started_s
            show(piece.text)
            completion = piece.completion
        assert completion is not None, "the last piece has the whole"
        self._places += (Place(self._transcript.copy(), self._server_tokens),)
        self._transcript.answered(text, tokens, completion)
        if completion.finish_reason != "abort":
            self._server_tokens = completion.prompt_tokens + len(completion.tokens)
        return Answer(completion, first_token_s, time.perf_counter() - started_s)

    def interrupt(self) -> None:
        """End the answer that comes, from a signal handler; what was said of it stays in the transcript."""
        self._session.interrupt()

    def rewind(self, exchanges: int) -> None:
        """Forget the last so many questions and their answers. Raises InvalidRequest if there are not so many."""
        if not 1 <= exchanges <= len(self._places):
            raise InvalidRequest(f"there is nothing to forget: {len(self._places)} questions were answered so far")
        place = self._places[-exchanges]
        if place.server_tokens != self._server_tokens:
            self._session.rewind(to_tokens=place.server_tokens)
        self._places = self._places[:-exchanges]
        self._transcript, self._server_tokens = place.transcript, place.server_tokens

    def fork(self) -> "Conversation":
        """Another one that begins like this one; both go their own ways."""
        twin = Conversation(self._session.fork(), self._transcript.copy(), self._places)
        twin._server_tokens = self._server_tokens
        return twin

    def state(self) -> SessionState:
        """What the server says of the session."""
        return self._session.state()

    def close(self) -> None:
        """Close the session."""
        self._session.close()


class Conversations:
    """All conversations of a chat; one of them is current. A context manager that closes them all on leaving."""

    def __init__(self, client: Client, tokenizer: Tokenizer) -> None:
        """Raises StartupError if the model cannot chat; nothing is opened yet."""
        self._client = client
        self._tokenizer = tokenizer
        self._fresh = Transcript(tokenizer)
        self._all: list[Conversation] = []
        self._current = 0

    @property
    def current(self) -> Conversation:
        """The one that is talked to."""
        return self._all[self._current]

    def listed(self) -> list[tuple[int, bool, Conversation]]:
        """Each with its number, from 1, and whether it is current."""
        return [(index + 1, index == self._current, each) for index, each in enumerate(self._all)]

    def begin(self) -> None:
        """Begin another and make it current."""
        self._add(Conversation(self._client.session(), self._fresh.copy()))

    def fork(self) -> None:
        """Fork the current one and make the fork current."""
        self._add(self.current.fork())

    def choose(self, number: int) -> None:
        """Make another one current. Raises InvalidRequest if there is none of this number."""
        if not 1 <= number <= len(self._all):
            raise InvalidRequest(f"there is no conversation {number}; /sessions lists them")
        self._current = number - 1

    def _add(self, conversation: Conversation) -> None:
        self._all.append(conversation)
        self._current = len(self._all) - 1

    def __enter__(self) -> "Conversations":
        self.begin()
        return self

    def __exit__(self, *exception: object) -> None:
        for conversation in self._all:
            try:
                conversation.close()
            except (NotReady, NotFound):  # a server that is gone has closed them in its way
                return

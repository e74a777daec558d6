"""`LLM`: a model in the process that calls it, for scripts, notebooks and tests.

with LLM(model="default") as llm:
    print(llm.generate("The capital of France is", max_new_tokens=8, temperature=0).text)
    with llm.session() as session:
        session.generate("Once upon a time", max_new_tokens=32)
        print(session.generate(" Then", max_new_tokens=32).cached_tokens)
"""

import contextlib
import queue
import secrets
import weakref
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Self, Unpack, cast, overload

from sessile.completion import Completion, GenerateFields, Message, Piece, Prompt, SamplingParams, SessionState
from sessile.errors import LimitReached, UserError
from sessile.offline.driver import Arrival
from sessile.offline.opening import open_driver, sections_of
from sessile.offline.operations import Operations
from sessile.offline.request import Request, chat_tokens, is_one_prompt, merged
from sessile.text.load import load_tokenizer

ROWS_AHEAD = 4
"""How many requests of a list are submitted for each row, so that none is ever free; the rest waits here."""


class LLM:
    """A model and its engine. Owns the device until `close`, which leaving it as a context manager does.

    Usable from several threads; their requests share steps. The engine runs in a thread of its own, so that Ctrl-C in a
    call ends that call's requests, rolls turns back, and leaves everything else as it is.
    """

    def __init__(self, model: str = "default", **settings: Any) -> None:
        """Load a model: "default", a hub folder, or a GGUF file. Raises StartupError for what cannot be served.

        settings: those of `sessile serve` for model, device, scheduler and engine by name (docs/SWITCHES.md), for
        example page_size=1, dtype="float32", context_tokens=4096, speculate="on".
        """
        sections = sections_of({"model": model, **settings})
        self.tokenizer = load_tokenizer(model)
        self._driver = open_driver(sections, self.tokenizer)
        self._close_once = weakref.finalize(self, self._driver.close)

    @overload
    def generate(  # type: ignore[overload-overlap]  # a string is a sequence of strings, too
        self, prompt: Prompt, sampling_params: SamplingParams | None = None, **fields: Unpack[GenerateFields]
    ) -> Completion: ...

    @overload
    def generate(
        self, prompt: Sequence[Prompt], sampling_params: SamplingParams | None = None, **fields: Unpack[GenerateFields]
    ) -> list[Completion]: ...

    def generate(
        self,
        prompt: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | None = None,
        **fields: Unpack[GenerateFields],
    ) -> Completion | list[Completion]:
        """Complete a prompt, given as text or token ids; or a list of prompts, in batches as the engine sees fit.

        Sampling parameters by keyword, or as one SamplingParams; a keyword wins. Results are in the order of the
        prompts. Raises UserError for the first prompt that is refused, after the others have ended.
        """
        keywords = merged(sampling_params, fields)
        if is_one_prompt(prompt):
            return self._complete([self._request(prompt, keywords)])[0]
        prompts = cast("Sequence[Prompt]", prompt)
        return self._complete([self._request(each, keywords) for each in prompts])

    @overload
    def chat(
        self, messages: Sequence[Message], sampling_params: SamplingParams | None = None,
        **fields: Unpack[GenerateFields],
    ) -> Completion: ...  # fmt: skip

    @overload
    def chat(
        self, messages: Sequence[Sequence[Message]], sampling_params: SamplingParams | None = None,
        **fields: Unpack[GenerateFields],
    ) -> list[Completion]: ...  # fmt: skip

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | None = None,
        **fields: Unpack[GenerateFields],
    ) -> Completion | list[Completion]:
        """The assistant's next message, by the model's chat template; or those of a list of chats.

        messages: [{"role": "user", "content": "…"}]. Else as `generate`.
        """
        keywords = merged(sampling_params, fields)
        if not messages or isinstance(messages[0], Mapping):
            prompt = chat_tokens(self.tokenizer, messages)  # type: ignore[arg-type]
            return self._complete([self._request(prompt, keywords)])[0]
        prompts = [chat_tokens(self.tokenizer, each) for each in messages]  # type: ignore[arg-type]
        return self._complete([self._request(prompt, keywords) for prompt in prompts])

    def stream(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None, **fields: Unpack[GenerateFields]
    ) -> Iterator[Piece]:
        """Complete a prompt piece by piece. Closing the generator ends the request. Raises UserError if refused."""
        return self._pieces(self._request(prompt, merged(sampling_params, fields)))

    def session(
        self,
        session_id: str | None = None,
        *,
        idle_timeout_s: float | None = None,
        reserve_tokens: int = 0,
        max_tokens: int | None = None,
    ) -> "Session":
        """Open a session: each `generate` on it continues its history. Raises UserError if it is refused.

        idle_timeout_s: it closes by itself when unused for so long. reserve_tokens: KV for so many tokens is kept for
        it, used or not. max_tokens: cap of its history.
        """
        operations = Operations(self._driver, session_id or secrets.token_hex(16))
        operations.open(idle_timeout_s, reserve_tokens, max_tokens).result()
        return Session(self, operations)

    def close(self) -> None:
        """End what runs and give the device back; sessions are gone. May be called again."""
        self._close_once()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _request(self, prompt: Prompt, fields: GenerateFields, session: str | None = None) -> Request:
        return Request(self.tokenizer, self._driver.ready.vocab_size, prompt, fields, session)

    def _pieces(self, request: Request) -> Iterator[Piece]:
        arrivals: queue.SimpleQueue[Arrival] = queue.SimpleQueue()
        key = self._driver.submit(request.submit, arrivals.put)
        try:
            while True:
                piece = request.add(arrivals.get())
                yield piece
                if piece.completion:
                    return
        finally:
            self._driver.cancel(key)

    def _complete(self, requests: list[Request]) -> list[Completion]:
        """Run requests side by side, as many as the queue takes."""
        waiting = deque(enumerate(requests))
        running: dict[int, int] = {}
        ends: dict[int, Completion | UserError] = {}
        arrivals: queue.SimpleQueue[tuple[int, Arrival]] = queue.SimpleQueue()
        room = self._driver.ready.rows_max * ROWS_AHEAD

        def tell(index: int, arrival: Arrival) -> None:
            arrivals.put((index, arrival))

        try:
            while waiting or running:
                while waiting and len(running) < room:
                    index, request = waiting.popleft()
                    running[index] = self._driver.submit(request.submit, partial(tell, index))
                index, arrival = arrivals.get()
                try:
                    completion = requests[index].add(arrival).completion
                except LimitReached as error:
                    del running[index]
                    if running:  # as many as there are now, then; it comes first when one of them ends
                        room = len(running)
                        waiting.appendleft((index, requests[index]))
                    else:
                        ends[index] = error
                except UserError as error:
                    del running[index]
                    ends[index] = error
                else:
                    if completion:
                        del running[index]
                        ends[index] = completion
        finally:
            for key in running.values():
                self._driver.cancel(key)
        return completions_of([ends[index] for index in range(len(requests))])


def completions_of(ends: list[Completion | UserError]) -> list[Completion]:
    """The completions, if all are. Raises the first that is an error."""
    completions = []
    for end in ends:
        if isinstance(end, UserError):
            raise end
        completions.append(end)
    return completions


class Session:
    """A session of an LLM: a history of tokens whose KV stays in place. As a context manager it is closed on leaving.

    A turn is a transaction: one that is refused, interrupted or left leaves the history as it was.
    """

    def __init__(self, llm: LLM, operations: Operations) -> None:
        self.id = operations.session
        self._llm = llm
        self._operations = operations

    def generate(
        self, prompt: Prompt = (), sampling_params: SamplingParams | None = None, **fields: Unpack[GenerateFields]
    ) -> Completion:
        """Run the next turn: append the prompt to the history and complete it. Raises UserError if it is refused.

        Without a prompt the history is completed as it is.
        """
        return self._llm._complete([self._request(prompt, merged(sampling_params, fields))])[0]

    def stream(
        self, prompt: Prompt = (), sampling_params: SamplingParams | None = None, **fields: Unpack[GenerateFields]
    ) -> Iterator[Piece]:
        """The next turn piece by piece. Closing the generator ends the turn and rolls it back."""
        return self._llm._pieces(self._request(prompt, merged(sampling_params, fields)))

    def append(self, prompt: Prompt) -> int:
        """Compute a prompt now and generate later; the length of the history. Raises UserError if it is refused."""
        self.generate(prompt, max_new_tokens=0)
        return self.state().tokens

    def fork(
        self, *, at_tokens: int | None = None, at_turn: int | None = None, session_id: str | None = None
    ) -> "Session":
        """A new session that begins like this one, up to its end unless told where, and shares its KV.

        Raises SessionBusy while a turn runs, InvalidRequest for a place beyond the history.
        """
        child = Operations(self._operations.driver, session_id or secrets.token_hex(16))
        self._operations.fork(child.session, at_tokens, at_turn).result()
        return Session(self._llm, child)

    def rewind(self, *, to_tokens: int | None = None, to_turn: int | None = None) -> int:
        """Forget what came after a place; the length of the history. Raises as `fork` does."""
        state: SessionState = self._operations.rewind(to_tokens, to_turn).result()
        return state.tokens

    def tokens(self) -> list[int]:
        """The history: inputs and outputs of all finished turns."""
        tokens: list[int] = self._operations.tokens().result()
        return tokens

    def state(self) -> SessionState:
        """The session at this moment. Raises NotFound if it is closed."""
        state: SessionState = self._operations.state().result()
        return state

    def close(self) -> None:
        """Close the session; its history and KV are gone. May be called again."""
        with contextlib.suppress(UserError):
            self._operations.close().result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _request(self, prompt: Prompt, fields: GenerateFields) -> Request:
        return self._llm._request(prompt, fields, self.id)

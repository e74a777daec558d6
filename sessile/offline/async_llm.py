"""`AsyncLLM`: the same engine for asyncio, many requests at a time.

async with AsyncLLM(model="default") as llm:
    async for piece in llm.generate("Once upon a time", max_new_tokens=32):
        print(piece.text, end="")

The engine's loop runs in a thread of this process and hands what has come to the event loop. The alternative, the two
processes of a server, would buy a scheduler that does not wait for the interpreter lock while the event loop is busy,
at the price of a second process to watch over. Who has that much traffic should run a server, and `AsyncClient`.
"""

import asyncio
import contextlib
import secrets
from collections.abc import AsyncGenerator, Sequence
from typing import Any, Self, Unpack

from sessile.completion import GenerateFields, Generation, Message, Piece, Prompt, SamplingParams, SessionState
from sessile.errors import NotReady, UserError
from sessile.offline.driver import Arrival, Driver
from sessile.offline.opening import open_driver, sections_of
from sessile.offline.operations import Operations
from sessile.offline.request import Request, chat_tokens, merged
from sessile.text.load import load_tokenizer
from sessile.text.tokenizer import Tokenizer

THREAD_CHARS = 32_768
"""Longer prompts are tokenised beside the event loop."""


class AsyncLLM:
    """A model and its engine, used from one event loop. `start` and `close` it, or use it as a context manager.

    `generate` gives a Generation: await it for the whole, iterate over it for pieces. Leaving one early, by `aclose` or
    because its task is cancelled, ends the request and rolls a session's turn back.
    """

    def __init__(self, model: str = "default", **settings: Any) -> None:
        """As for LLM; nothing is loaded before `start`. Raises StartupError for an unknown or wrong setting."""
        self._model = model
        self._sections = sections_of({"model": model, **settings})
        self._driver: Driver | None = None
        self._tokenizer: Tokenizer | None = None

    async def start(self) -> None:
        """Load the model, beside the event loop. Raises StartupError if it cannot be served."""
        assert self._driver is None, "an AsyncLLM is started once"
        self._tokenizer = await asyncio.to_thread(load_tokenizer, self._model)
        self._driver = await asyncio.to_thread(open_driver, self._sections, self._tokenizer)

    async def close(self) -> None:
        """End what runs, as aborts, and give the device back; sessions are gone. May be called again."""
        if self._driver:
            await asyncio.to_thread(self._driver.close)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer. Raises NotReady before `start`."""
        if self._tokenizer is None:
            raise NotReady("the engine is not started: use `async with AsyncLLM(…)`, or await its start()")
        return self._tokenizer

    def generate(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None, **fields: Unpack[GenerateFields]
    ) -> Generation:
        """Complete a prompt, given as text or token ids. Raises UserError, when used, if it is refused."""
        return Generation(self._pieces(prompt, merged(sampling_params, fields)))

    def chat(
        self,
        messages: Sequence[Message],
        sampling_params: SamplingParams | None = None,
        **fields: Unpack[GenerateFields],
    ) -> Generation:
        """The assistant's next message, by the model's chat template."""
        return Generation(self._pieces(chat_tokens(self.tokenizer, messages), merged(sampling_params, fields)))

    async def session(
        self,
        session_id: str | None = None,
        *,
        idle_timeout_s: float | None = None,
        reserve_tokens: int = 0,
        max_tokens: int | None = None,
    ) -> "AsyncSession":
        """Open a session; the fields are those of LLM.session."""
        operations = Operations(self._running(), session_id or secrets.token_hex(16))
        await asyncio.wrap_future(operations.open(idle_timeout_s, reserve_tokens, max_tokens))
        return AsyncSession(self, operations)

    def _running(self) -> Driver:
        if self._driver is None:
            raise NotReady("the engine is not started: use `async with AsyncLLM(…)`, or await its start()")
        return self._driver

    async def _pieces(
        self, prompt: Prompt, fields: GenerateFields, session: str | None = None
    ) -> AsyncGenerator[Piece, None]:
        driver, tokenizer = self._running(), self.tokenizer
        if isinstance(prompt, str) and len(prompt) > THREAD_CHARS:
            prompt = await asyncio.to_thread(tokenizer.encode, prompt)
        request = Request(tokenizer, driver.ready.vocab_size, prompt, fields, session)
        loop = asyncio.get_running_loop()
        arrivals: asyncio.Queue[Arrival] = asyncio.Queue()

        def receive(arrival: Arrival) -> None:
            with contextlib.suppress(RuntimeError):  # the event loop is closed, and nobody is left to read
                loop.call_soon_threadsafe(arrivals.put_nowait, arrival)

        key = driver.submit(request.submit, receive)
        try:
            while True:
                piece = request.add(await arrivals.get())
                yield piece
                if piece.completion:
                    return
        finally:
            driver.cancel(key)


class AsyncSession:
    """A session of an AsyncLLM, as `Session` is one of an LLM. As a context manager it is closed on leaving."""

    def __init__(self, llm: AsyncLLM, operations: Operations) -> None:
        self.id = operations.session
        self._llm = llm
        self._operations = operations

    def generate(
        self, prompt: Prompt = (), sampling_params: SamplingParams | None = None, **fields: Unpack[GenerateFields]
    ) -> Generation:
        """Run the next turn: append the prompt to the history and complete it."""
        return Generation(self._llm._pieces(prompt, merged(sampling_params, fields), self.id))

    async def append(self, prompt: Prompt) -> int:
        """Compute a prompt now and generate later; the length of the history."""
        await self.generate(prompt, max_new_tokens=0)
        return (await self.state()).tokens

    async def fork(
        self, *, at_tokens: int | None = None, at_turn: int | None = None, session_id: str | None = None
    ) -> "AsyncSession":
        """A new session that begins like this one, up to its end unless told where, and shares its KV."""
        child = Operations(self._operations.driver, session_id or secrets.token_hex(16))
        await asyncio.wrap_future(self._operations.fork(child.session, at_tokens, at_turn))
        return AsyncSession(self._llm, child)

    async def rewind(self, *, to_tokens: int | None = None, to_turn: int | None = None) -> int:
        """Forget what came after a place; the length of the history."""
        return (await asyncio.wrap_future(self._operations.rewind(to_tokens, to_turn))).tokens

    async def tokens(self) -> list[int]:
        """The history: inputs and outputs of all finished turns."""
        return await asyncio.wrap_future(self._operations.tokens())

    async def state(self) -> SessionState:
        """The session at this moment. Raises NotFound if it is closed."""
        return await asyncio.wrap_future(self._operations.state())

    async def close(self) -> None:
        """Close the session; its history and KV are gone. May be called again."""
        with contextlib.suppress(UserError):
            await asyncio.wrap_future(self._operations.close())

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()

"""The engine without HTTP: in the process that calls it, for notebooks, scripts and tests.

with LLM(model="default") as llm:
    print(llm.generate("The capital of France is", max_new_tokens=8, temperature=0).text)
    with llm.session() as session:
        session.generate("Once upon a time", max_new_tokens=32)
        print(session.generate(" Then", max_new_tokens=32).cached_tokens)
"""

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from types import TracebackType
from typing import Any, Self, TypedDict, Unpack

from sessile.contract.messages import (
    Batch,
    CloseSession,
    Done,
    Grammar,
    OpenSession,
    Outcome,
    Reply,
    Sampling,
    SessionTokens,
    Submit,
    pack_tokens,
    unpack_tokens,
)
from sessile.core.limits import SchedulerOptions, TenantPolicy
from sessile.device.config import DeviceOptions
from sessile.engine.build import Device, DeviceRequest, Engine, open_engine
from sessile.engine.clock import Clock, MonotonicClock
from sessile.engine.config import EngineOptions
from sessile.engine.drafting import MakeDrafter, lookup_drafter
from sessile.engine.inbox import LocalInbox
from sessile.engine.outbox import LocalOutbox
from sessile.errors import StartupError, UserError
from sessile.model.config import ModelOptions
from sessile.options import check_options
from sessile.text.load import load_tokenizer
from sessile.text.tokenizer import Tokenizer

SECTIONS = (ModelOptions, DeviceOptions, SchedulerOptions, EngineOptions)


class SamplingFields(TypedDict, total=False):
    """How to sample, as keywords of `generate`; see contract.messages.Sampling. stop: strings.

    grammar: what the output must be.
    """

    seed: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    frequency_penalty: float
    presence_penalty: float
    logit_bias: tuple[tuple[int, float], ...]
    max_new_tokens: int | None
    min_new_tokens: int
    stop: str | Sequence[str]
    stop_token_ids: tuple[int, ...]
    ignore_eos: bool
    skip_special_tokens: bool
    grammar: Grammar


@dataclass(frozen=True)
class Completion:
    """What a request produced. text ends before a stop string that ended it; tokens has its tokens as well.

    finish_reason: "stop", "length" or "abort". matched: the stop string or token id. prompt_tokens counts the whole
    context, a session's history included; cached_tokens, how many of these were not computed again.
    """

    text: str
    tokens: list[int]
    finish_reason: str
    matched: int | str | None
    prompt_tokens: int
    cached_tokens: int


class LLM:
    """A model and its engine. Owns the device until `close`. One thread only."""

    def __init__(self, model: str = "default", **settings: Any) -> None:
        """Load a model. settings: those of `sessile serve` by name, for example page_size=1, dtype="float32".

        Raises StartupError for an unknown or wrong setting, or a model that cannot be served.
        """
        options = sections_of({"model": model, **settings})
        clock = MonotonicClock()
        self.tokenizer = load_tokenizer(model)
        self._engine = open_configured_engine(*options, clock=clock, tokenizer=self.tokenizer)
        self._inbox = LocalInbox()
        self._outbox = LocalOutbox()
        self._loop = self._engine.loop(self._inbox, self._outbox, clock)
        self._numbers = itertools.count(1)

    def generate(self, prompt: str | Sequence[int], **sampling: Unpack[SamplingFields]) -> Completion:
        """Complete one prompt, given as text or token ids. Raises UserError if it is refused."""
        return self.generate_many([prompt], **sampling)[0]

    def generate_many(
        self, prompts: Iterable[str | Sequence[int]], **sampling: Unpack[SamplingFields]
    ) -> list[Completion]:
        """Complete prompts side by side, in batches as the engine sees fit; results in the order of the prompts.

        Raises UserError for the first that is refused, after the others have ended.
        """
        return self._complete([(prompt, None) for prompt in prompts], sampling)

    def session(self, session_id: str | None = None, *, idle_timeout_s: float | None = None) -> "Session":
        """Open a streaming session: each `generate` on it continues its history. Raises UserError if it is refused."""
        number = next(self._numbers)
        session = Session(self, session_id or f"session-{number}")
        self._ask(OpenSession(op=number, session=session.id, idle_timeout_s=idle_timeout_s))
        return session

    def close(self) -> None:
        """Give the device back. Sessions are gone."""
        self._engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _complete(
        self, prompts: list[tuple[str | Sequence[int], str | None]], keywords: SamplingFields
    ) -> list[Completion]:
        """Submit prompts, each perhaps as the next turn of a session, and turn the loop until all have ended."""
        sampling = sampling_of(keywords)
        pending: dict[int, list[int]] = {}
        ends: dict[int, Done] = {}
        for prompt, session_id in prompts:
            ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
            key = next(self._numbers)
            pending[key] = []
            self._inbox.put(
                Submit(
                    key=key,
                    tokens=pack_tokens(ids),
                    sampling=sampling,
                    session=session_id,
                    grammar=keywords.get("grammar"),
                )
            )
        while len(ends) < len(pending):
            for batch in self._turn():
                collect_deltas(batch, pending)
                ends |= {done.key: done for done in batch.done if done.key in pending}
        for done in ends.values():
            raise_refusal(done)
        return [self._completion(tokens, ends[key], sampling) for key, tokens in pending.items()]

    def _completion(self, tokens: list[int], done: Done, sampling: Sampling) -> Completion:
        stream = self.tokenizer.stream(skip_special_tokens=sampling.skip_special_tokens, stops=sampling.stop)
        return Completion(
            text=stream.finish(tokens, kept_bytes=done.kept_bytes),
            tokens=tokens,
            finish_reason=done.reason,
            matched=done.matched.decode() if isinstance(done.matched, bytes) else done.matched,
            prompt_tokens=done.prompt_tokens,
            cached_tokens=done.cached_tokens,
        )

    def _ask(self, message: OpenSession | CloseSession | SessionTokens) -> Any:
        """Send an operation and return its reply's value. Raises the UserError that it carries."""
        self._inbox.put(message)
        while True:
            for batch in self._turn():
                for reply in batch.replies:
                    if reply.op == message.op:
                        return value_of(reply)

    def _turn(self) -> list[Batch]:
        self._loop.turn()
        return self._outbox.take()


class Session:
    """A streaming session of an LLM. As a context manager it is closed on leaving."""

    def __init__(self, llm: LLM, session_id: str) -> None:
        self.id = session_id
        self._llm = llm

    def generate(self, prompt: str | Sequence[int], **sampling: Unpack[SamplingFields]) -> Completion:
        """Run the next turn: append the prompt to the history and complete it. Raises UserError if it is refused."""
        return self._llm._complete([(prompt, self.id)], sampling)[0]

    def tokens(self) -> list[int]:
        """The committed history: inputs and outputs of all finished turns."""
        outcome = self._llm._ask(SessionTokens(next(self._llm._numbers), self.id))
        assert isinstance(outcome, Outcome)
        packed = outcome.values["tokens"]
        assert isinstance(packed, bytes)
        return [int(token) for token in unpack_tokens(packed)]

    def close(self) -> None:
        """Close the session; its history and KV are gone. Raises NotFound if it is closed already."""
        self._llm._ask(CloseSession(next(self._llm._numbers), self.id))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_configured_engine(
    model: ModelOptions,
    device: DeviceOptions,
    scheduler: SchedulerOptions,
    engine: EngineOptions,
    *,
    clock: Clock,
    tokenizer: Tokenizer | None = None,
    report: Callable[[str], None] = lambda line: None,
    tenants: tuple[TenantPolicy, ...] = (),
    make_drafter: MakeDrafter = lookup_drafter,
) -> Engine:
    """Join a model's tokenizer (loaded here unless given), its device and the scheduler to an engine.

    report: is given a line for each part of a long start. tenants: those with limits of their own. make_drafter: as in
    `open_engine`. Raises StartupError.
    """
    # Here, because importing torch takes longer than finding out that there is no such model.
    tokenizer = tokenizer or load_tokenizer(model.model)
    report("importing torch")
    from sessile.device.factory import chosen_kind, open_device

    def open_for(request: DeviceRequest) -> Device:
        return open_device(
            model,
            device,
            page_size=request.page_size,
            context_tokens=request.context_tokens,
            rows_max=request.rows_max,
            drafts_max=request.drafts_max,
            progress=lambda stage, share: report(f"{stage}, {share:.0%}"),
        )

    on_cpu = chosen_kind(device) == "cpu"
    return open_engine(
        scheduler, engine, open_for, tokenizer.facts, on_cpu=on_cpu, clock=clock, tenants=tenants,
        make_drafter=make_drafter, tokenize=partial(tokenizer.encode, add_special_tokens=False),
    )  # fmt: skip


def sections_of(
    settings: dict[str, Any],
) -> tuple[ModelOptions, DeviceOptions, SchedulerOptions, EngineOptions]:
    """Settings by name, put into the sections that declare them. Raises StartupError for unknown or wrong ones."""
    left = dict(settings)
    sections: list[Any] = []
    for options in SECTIONS:
        names = [declared.name for declared in fields(options) if declared.name in left]
        sections.append(options(**{name: left.pop(name) for name in names}))
    if left:
        raise StartupError(f"unknown setting {next(iter(left))!r}")
    for section in sections:
        try:
            check_options(section)
        except ValueError as error:
            raise StartupError(str(error)) from error
    model, device, scheduler, engine = sections
    return model, device, scheduler, engine


def sampling_of(keywords: SamplingFields) -> Sampling:
    """Keywords as the core wants them: a seed always, stop strings as bytes."""
    stop = keywords.get("stop", ())
    strings = [stop] if isinstance(stop, str) else stop
    chosen: dict[str, Any] = {"seed": 0, **keywords, "stop": tuple(string.encode() for string in strings)}
    chosen.pop("grammar", None)
    return Sampling(**chosen)


def collect_deltas(batch: Batch, tokens_by_key: dict[int, list[int]]) -> None:
    """Append the new tokens of each request in a batch to its list."""
    tokens = unpack_tokens(batch.delta_tokens).tolist()
    start = 0
    keys = memoryview(batch.delta_keys).cast("q")
    for key, count in zip(keys, unpack_tokens(batch.delta_counts).tolist(), strict=True):
        tokens_by_key[key] += tokens[start : start + count]
        start += count


def value_of(reply: Reply) -> Any:
    """The value of a reply. Raises the UserError that it carries instead."""
    if reply.error:
        raise refusal(reply.error.status, reply.error.code, reply.error.message, reply.error.param)
    return reply.value


def raise_refusal(done: Done) -> None:
    """Raise the UserError of a request that was refused or failed; return if it was neither."""
    if done.reason == "error":
        raise refusal(done.status, done.code, done.message, done.param)


def refusal(status: int, code: str, message: str, param: str | None) -> UserError:
    """The exception that the core raised, as far as the wire tells: the class with this code."""
    kinds: list[type[UserError]] = UserError.__subclasses__()
    error = next((kind for kind in kinds if kind.code == code), UserError)(message, param=param)
    error.status, error.code = status, code
    return error

"""Open an engine: a device, and a machine whose limits follow from settings, model and device."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from sessile.contract.messages import EngineReady
from sessile.contract.model import ModelFacts
from sessile.core.limits import Limits, SchedulerOptions, TenantPolicy
from sessile.core.machine import Machine
from sessile.engine.clock import Clock
from sessile.engine.config import EngineOptions
from sessile.engine.drafting import MakeDrafter, StepFacts, TimedDrafter, can_pay, lookup_drafter
from sessile.engine.executor import Executor
from sessile.engine.garbage import IdleCollector
from sessile.engine.grammars import GrammarDesk
from sessile.engine.inbox import Inbox
from sessile.engine.launch_time import LaunchTime
from sessile.engine.loop import EngineLoop
from sessile.engine.outbox import Outbox
from sessile.engine.pace import Pace
from sessile.grammar.compiler import GrammarCompiler, Tokenize
from sessile.grammar.following import CompiledGrammars

if TYPE_CHECKING:
    from sessile.engine.corpora import CorpusDesk

CPU_STEP_LIMIT_MS, GPU_STEP_LIMIT_MS = 250.0, 100.0
CPU_ROWS_MAX, GPU_ROWS_MAX = 64, 256
CPU_CHUNK_TOKENS, GPU_CHUNK_TOKENS = 512, 8192
CPU_CHUNK_TOKENS_MIN, GPU_CHUNK_TOKENS_MIN = 16, 512
"""Chunks that the pace never goes below: a GPU runs 512 tokens in about the time that it needs for one."""


class DeviceFacts(StepFacts, Protocol):
    """What an opened device says of itself and of the model on it."""

    @property
    def device(self) -> str:
        """Kind of device, "cpu" or "cuda"."""
        ...

    @property
    def model_path(self) -> str: ...
    @property
    def architecture(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def attention(self) -> str:
        """Which kernels attend."""
        ...

    @property
    def vocab_size(self) -> int: ...
    @property
    def context_tokens(self) -> int: ...
    @property
    def page_size(self) -> int: ...
    @property
    def pages_total(self) -> int: ...
    @property
    def kv_bytes(self) -> int: ...
    @property
    def weight_bytes(self) -> int: ...


class Device(Executor, Protocol):
    """An executor that says what it is."""

    @property
    def facts(self) -> DeviceFacts: ...


@dataclass(frozen=True)
class DeviceRequest:
    """What the scheduler asks of a device before it is opened; None leaves the choice to model or device."""

    page_size: int
    context_tokens: int | None
    rows_max: int
    drafts_max: int = 0


OpenDevice = Callable[[DeviceRequest], Device]


class DescribeModel(Protocol):
    """What the tokenizer says of a model with this vocabulary size (padding included) and context length."""

    def __call__(self, *, vocab_size: int, context_tokens: int) -> ModelFacts: ...


@dataclass
class Engine:
    """An opened engine: machine, device, drafter and what it drafts from. Owns all but the first until `close`."""

    machine: Machine
    device: Device
    ready: EngineReady
    options: EngineOptions
    drafter: TimedDrafter | None = None
    corpora: "CorpusDesk | None" = None
    """None where nobody drafts."""
    grammars: GrammarDesk | None = None
    """None where outputs follow no grammar, because nothing would end them."""

    def close(self) -> None:
        """Give back the device and what the drafter runs on. May be called again."""
        self.device.close()
        if self.drafter is not None:
            self.drafter.close()

    def loop(
        self, inbox: Inbox, outbox: Outbox, clock: Clock, collector: IdleCollector | None = None, *,
        just_in_time: bool = False,
    ) -> EngineLoop:  # fmt: skip
        """The loop that drives this engine with the given ends and clock.

        just_in_time: on a GPU, plan each step as late as it allows. The thread that runs the loop does not sleep then
        while a step runs: for a process of its own.
        """
        on_cpu = self.device.facts.device == "cpu"
        limit_ms = self.options.step_limit_ms
        if limit_ms is None:
            limit_ms = CPU_STEP_LIMIT_MS if on_cpu else GPU_STEP_LIMIT_MS
        tokens_min = CPU_CHUNK_TOKENS_MIN if on_cpu else GPU_CHUNK_TOKENS_MIN
        return EngineLoop(
            self.machine,
            self.device,
            inbox,
            outbox,
            clock,
            overlap=self.options.overlap == "on",
            pace=Pace(limit_ms, self.ready.chunk_tokens, tokens_min) if limit_ms else None,
            collector=collector,
            drafter=self.drafter,
            corpora=self.corpora,
            grammars=self.grammars,
            # On a CPU the device would have to share its cores with a host that does not sleep.
            launch_time=LaunchTime() if just_in_time and not on_cpu else None,
        )


def open_engine(
    scheduler: SchedulerOptions,
    options: EngineOptions,
    open_device: OpenDevice,
    describe_model: DescribeModel,
    *,
    on_cpu: bool,
    clock: Clock,
    tenants: tuple[TenantPolicy, ...] = (),
    make_drafter: MakeDrafter = lookup_drafter,
    tokenize: Tokenize | None = None,
) -> Engine:
    """Open the device and build the machine that its facts allow.

    on_cpu decides defaults. tenants: those with limits of their own. make_drafter: called if drafts are to be looked
    up. tokenize: how the model knows a text that a grammar leaves no choice about. The clock's origin is taken as the
    begin of the start. Raises StartupError.
    """
    rows_max = scheduler.rows_max or (CPU_ROWS_MAX if on_cpu else GPU_ROWS_MAX)
    drafts_max = 0 if options.speculate == "off" else options.drafts_max
    device = open_device(DeviceRequest(scheduler.page_size, scheduler.context_tokens, rows_max, drafts_max))
    facts = device.facts
    drafter, corpora = None, None
    if options.speculate == "on" or (drafts_max and can_pay(facts.step_ms, drafts_max)):
        # Here, because an engine that drafts nothing starts sooner without what is compiled there.
        from sessile.draft.shelf import Shelf
        from sessile.engine.corpora import CorpusDesk

        shelf = Shelf()
        drafter = TimedDrafter(make_drafter(shelf, facts), clock)
        corpora = CorpusDesk(shelf, facts.vocab_size)
    limits = limits_for(
        scheduler, facts, rows_max, on_cpu=on_cpu, tenants=tenants, drafts_max=drafts_max if drafter else 0
    )
    model = describe_model(vocab_size=facts.vocab_size, context_tokens=facts.context_tokens)
    grammars, desk = None, None
    if model.eos_ids and model.token_bytes:
        grammars = CompiledGrammars(model.vocab_size)
        desk = GrammarDesk(GrammarCompiler(model, tokenize), grammars, clock)
    machine = Machine(limits, model, drafter=drafter, grammars=grammars)
    ready = EngineReady(
        model_name=Path(facts.model_path).name.removesuffix(".gguf"),
        model_path=facts.model_path,
        architecture=facts.architecture,
        dtype=facts.dtype,
        device=facts.device,
        attention=facts.attention,
        vocab_size=facts.vocab_size,
        context_tokens=limits.context_tokens,
        page_size=limits.page_size,
        pages_total=limits.pages_total,
        rows_max=limits.rows_max,
        chunk_tokens=limits.chunk_tokens,
        queue_max=limits.queue_max,
        drafts_max=limits.drafts_max,
        kv_bytes=facts.kv_bytes,
        weight_bytes=facts.weight_bytes,
        start_s=clock.now_ns() / 1e9,
    )
    return Engine(machine, device, ready, options, drafter, corpora, desk)


def limits_for(
    scheduler: SchedulerOptions,
    facts: DeviceFacts,
    rows_max: int,
    *,
    on_cpu: bool,
    tenants: tuple[TenantPolicy, ...] = (),
    drafts_max: int = 0,
) -> Limits:
    """The bounds of a core on this device: what the settings say, else what suits the kind of device."""
    chunk_tokens = scheduler.chunk_tokens or (CPU_CHUNK_TOKENS if on_cpu else GPU_CHUNK_TOKENS)
    return Limits(
        pages_total=facts.pages_total,
        page_size=facts.page_size,
        rows_max=rows_max,
        context_tokens=facts.context_tokens,
        chunk_tokens=chunk_tokens,
        mixed_chunk=scheduler.mixed_chunk == "on",
        mixed_chunk_tokens=scheduler.mixed_chunk_tokens or chunk_tokens,
        drafts_max=drafts_max,
        sessions_max=scheduler.sessions_max,
        queue_max=scheduler.queue_max,
        queue_tokens_max=scheduler.queue_tokens_max,
        audit_level=scheduler.audit_level,
        contain_violations=True,
        retract_every=scheduler.retract_every,
        tenants=tenants,
    )

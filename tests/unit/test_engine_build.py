"""Opening an engine: what settings leave open follows from model and device. Driven with the simulator's toy device."""

from dataclasses import dataclass

import pytest

from sessile.contract.messages import Batch, GetStats, Sampling, Stats, Submit, pack_tokens
from sessile.contract.model import ModelFacts
from sessile.core.limits import SchedulerOptions, TenantPolicy
from sessile.engine.build import CPU_ROWS_MAX, GPU_ROWS_MAX, DeviceRequest, Engine, limits_for, open_engine
from sessile.engine.clock import MonotonicClock
from sessile.engine.config import EngineOptions
from sessile.engine.inbox import LocalInbox
from sessile.engine.outbox import LocalOutbox
from sessile.sim.toy import ToyDevice

VOCAB_SIZE, CONTEXT_TOKENS, PAGES_TOTAL = 300, 128, 64


@dataclass
class ToyFacts:
    page_size: int
    device: str = "cpu"
    model_path: str = "/models/Toy-1B.gguf"
    architecture: str = "toy"
    dtype: str = "none"
    attention: str = "none at all"
    vocab_size: int = VOCAB_SIZE
    context_tokens: int = CONTEXT_TOKENS
    pages_total: int = PAGES_TOTAL
    kv_bytes: int = 0
    weight_bytes: int = 0
    step_ms: tuple[tuple[int, float], ...] = ()
    decode_ms: tuple[tuple[int, float], ...] = ()
    late_ms: float = 0.0


class OpenedToy(ToyDevice):
    """A toy that notes what was asked of it."""

    def __init__(self, request: DeviceRequest) -> None:
        super().__init__(
            pages_total=PAGES_TOTAL,
            page_size=request.page_size,
            rows_max=request.rows_max,
            context_tokens=CONTEXT_TOKENS,
            drafts_max=request.drafts_max,
            vocab_size=VOCAB_SIZE,
        )
        self.request = request
        self.facts = ToyFacts(request.page_size)


def describe(*, vocab_size: int, context_tokens: int) -> ModelFacts:
    return ModelFacts(vocab_size=vocab_size, context_tokens=context_tokens, eos_ids=())


def opened(scheduler: SchedulerOptions | None = None, options: EngineOptions | None = None, *, on_cpu: bool) -> Engine:
    return open_engine(
        scheduler or SchedulerOptions(audit_level=2),
        options or EngineOptions(),
        OpenedToy,
        describe,
        on_cpu=on_cpu,
        clock=MonotonicClock(),
    )


def run_to_end(engine: Engine, *submits: Submit) -> list[Batch]:
    outbox = LocalOutbox()
    loop = engine.loop(LocalInbox(submits), outbox, MonotonicClock())
    batches: list[Batch] = []
    while sum(len(batch.done) for batch in batches) < len(submits):
        loop.turn()
        batches += outbox.take()
    return batches


@pytest.mark.parametrize(("on_cpu", "rows"), [(True, CPU_ROWS_MAX), (False, GPU_ROWS_MAX)])
def test_rows_and_chunk_suit_the_kind_of_device(on_cpu: bool, rows: int) -> None:
    ready = opened(on_cpu=on_cpu).ready
    assert (ready.rows_max, ready.chunk_tokens) == (rows, 512 if on_cpu else 8192)


def test_what_the_settings_say_wins_over_what_suits() -> None:
    ready = opened(SchedulerOptions(rows_max=3, chunk_tokens=7, page_size=4), on_cpu=True).ready
    assert (ready.rows_max, ready.chunk_tokens, ready.page_size) == (3, 7, 4)


def test_the_device_is_opened_for_the_rows_that_the_scheduler_will_use() -> None:
    device = opened(SchedulerOptions(rows_max=5), on_cpu=True).device
    assert isinstance(device, OpenedToy) and device.request.rows_max == 5


def test_what_attends_is_told_with_the_model() -> None:
    assert opened(on_cpu=True).ready.attention == "none at all"


def test_the_model_is_named_after_its_file() -> None:
    assert opened(on_cpu=True).ready.model_name == "Toy-1B"


@pytest.mark.parametrize("overlap", ["on", "off"])
def test_an_engine_answers_the_same_with_and_without_overlap(overlap: str) -> None:
    engine = opened(options=EngineOptions(overlap=overlap), on_cpu=True)
    sampling = Sampling(seed=7, temperature=0.0, max_new_tokens=20)
    submits = [Submit(key=key, tokens=pack_tokens([key, 5, 6, 7] * 10), sampling=sampling) for key in (1, 2)]
    tokens = b"".join(batch.delta_tokens for batch in run_to_end(engine, submits[0]))
    reference = opened(options=EngineOptions(overlap="off"), on_cpu=True)
    assert tokens == b"".join(batch.delta_tokens for batch in run_to_end(reference, submits[0]))
    assert len(tokens) == 20 * 4


def test_on_a_cpu_a_long_prompt_is_cut_before_the_speed_is_known() -> None:
    engine = opened(SchedulerOptions(audit_level=2), on_cpu=True)
    submit = Submit(key=1, tokens=pack_tokens([9] * 100), sampling=Sampling(seed=0, max_new_tokens=1))
    run_to_end(engine, submit)
    assert engine.machine.stats().steps_total == 2


def test_a_step_limit_of_zero_leaves_prompts_whole() -> None:
    engine = opened(options=EngineOptions(step_limit_ms=0.0), on_cpu=True)
    submit = Submit(key=1, tokens=pack_tokens([9] * 100), sampling=Sampling(seed=0, max_new_tokens=1))
    run_to_end(engine, submit)
    assert engine.machine.stats().steps_total == 1


def test_on_a_gpu_a_prompt_of_a_few_hundred_tokens_is_never_cut() -> None:
    engine = opened(SchedulerOptions(audit_level=2), on_cpu=False)
    assert isinstance(engine.device, OpenedToy)
    engine.device.facts.device = "cuda"
    submit = Submit(key=1, tokens=pack_tokens([9] * 100), sampling=Sampling(seed=0, max_new_tokens=1))
    run_to_end(engine, submit)
    assert engine.machine.stats().steps_total == 1


def test_steps_in_which_rows_decode_are_as_large_as_others_unless_the_settings_say_so() -> None:
    for scheduler, tokens in ((SchedulerOptions(), 8192), (SchedulerOptions(mixed_chunk_tokens=64), 64)):
        limits = limits_for(scheduler, ToyFacts(16), 8, on_cpu=False)
        assert (limits.chunk_tokens, limits.mixed_chunk_tokens) == (8192, tokens)


def test_the_limits_of_tenants_reach_the_core() -> None:
    clock, tenants = MonotonicClock(), (TenantPolicy("acme", weight=3), TenantPolicy("umbra"))
    engine = open_engine(
        SchedulerOptions(), EngineOptions(), OpenedToy, describe, on_cpu=True, clock=clock, tenants=tenants
    )
    assert [tenant.name for tenant in engine.machine.stats().tenants] == ["acme", "umbra"]


def test_stats_come_from_the_machine_through_the_loop() -> None:
    engine = opened(on_cpu=True)
    outbox = LocalOutbox()
    engine.loop(LocalInbox([GetStats(op=4)]), outbox, MonotonicClock()).turn()
    (batch,) = outbox.take()
    assert batch.replies[0].op == 4 and isinstance(batch.replies[0].value, Stats)


def test_h07_an_engine_that_serves_contains_violations() -> None:
    engine = opened(on_cpu=True)
    outbox = LocalOutbox()
    sampling = Sampling(seed=0, temperature=0.0, max_new_tokens=8)
    submits = [Submit(key=key, tokens=pack_tokens([key] * 20), sampling=sampling) for key in (1, 2)]
    loop = engine.loop(LocalInbox(submits), outbox, MonotonicClock())
    for _ in range(3):
        loop.turn()
    lease = engine.machine._books.requests[1].lease
    assert lease is not None
    lease.pages.append(lease.pages[0])
    done: dict[int, str] = {}
    while len(done) < 2:
        loop.turn()
        done |= {each.key: each.reason for batch in outbox.take() for each in batch.done}
    assert done == {1: "error", 2: "length"}

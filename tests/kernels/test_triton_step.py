"""The GPU's step, whole, in the interpreter: what transformers and the CPU's sampler say, it says."""

from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import Qwen3Config, Qwen3ForCausalLM

from sessile.contract.plan import (
    BIND_FLOATS,
    BIND_INTS,
    BIND_REPETITION,
    BIND_TOP_P,
    FROM_DEVICE,
    SAMPLE,
    SCRATCH_PAGE,
    StepPlan,
)
from sessile.device import gpu_factory, gpu_timing
from sessile.device.buckets import Bucket, decode_bucket
from sessile.device.config import DeviceOptions
from sessile.device.factory import open_device
from sessile.device.gpu_factory import open_gpu
from sessile.kernels import triton_plan, triton_sampling
from sessile.model.options import ModelOptions
from tests.kernels.layouts import DEVICE
from tests.parity.driver import Driver, Run
from tests.parity.tiny_models import MODELS, Tiny, make_tiny

pytestmark = pytest.mark.long

NEW_TOKENS = 3
LONG_PROMPT = [*range(40, 54)]
PROMPTS = [[5], [17, 9, 33, 8, 120, 64], [*range(30, 64)]]
SMALL = Qwen3Config(
    vocab_size=160, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, attention_bias=True, tie_word_embeddings=True, initializer_range=0.3,
)  # fmt: skip
COMMON: dict[str, Any] = {
    "page_size": 16, "context_tokens": 128, "rows_max": 10, "drafts_max": 4, "progress": lambda stage, done: None,
}  # fmt: skip


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """One layer of the model that has everything: grouped heads, their norms, biases and a tied head."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MODELS, "small", lambda: Qwen3ForCausalLM(SMALL))
        return make_tiny("small", tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module", autouse=True)
def few_programs() -> Iterator[None]:
    """The interpreter runs programs one after the other."""
    with pytest.MonkeyPatch.context() as patch:
        if DEVICE.type == "cpu":
            patch.setattr(triton_sampling, "PROGRAMS_WANTED", 4)
            patch.setattr(triton_plan, "STATE_PROGRAMS", 2)
            patch.setattr(gpu_factory, "WARM_PROMPT_TOKENS", ())
            patch.setattr(gpu_timing, "DECODING_ROWS", (1, 8))
            patch.setattr(gpu_timing, "VERIFYING_TOKENS", (16, 32))
            patch.setattr(gpu_timing, "STEPS_IN_A_ROW", 1)
            patch.setattr(gpu_timing, "ROUNDS", 1)
        yield


def opened(folder: Path) -> Any:
    options = ModelOptions(model=str(folder), dtype="float32")
    return open_gpu(options, DeviceOptions(kv_memory="2M"), **COMMON, device=DEVICE)


@pytest.fixture(scope="module")
def device(tiny: Tiny) -> Iterator[Any]:
    device = opened(tiny.folder)
    yield device
    device.close()


@pytest.fixture(scope="module")
def cpu(tiny: Tiny) -> Iterator[Any]:
    options = DeviceOptions(device="cpu", kv_memory="2M", threads=1)
    device = open_device(ModelOptions(model=str(tiny.folder), dtype="float32"), options, **COMMON)
    yield device
    device.close()


def test_mixed_steps_give_the_tokens_of_transformers(device: Any, tiny: Tiny) -> None:
    runs = [Run(prompt, NEW_TOKENS) for prompt in PROMPTS]
    Driver(device, chunk_tokens=24).run_all(runs)
    assert [run.output for run in runs] == [tiny.greedy(prompt, NEW_TOKENS) for prompt in PROMPTS]


SAMPLED = {
    "temperature": {"temperature": 0.8},
    "top-k": {"temperature": 1.5, "top_k": 5},
    "top-p": {"temperature": 1.0, "top_p": 0.7},
    "min-p": {"temperature": 2.0, "min_p": 0.2},
    "all filters": {"temperature": 1.2, "top_k": 20, "top_p": 0.9, "min_p": 0.05},
    "penalties": {"repetition": 1.3, "frequency": 0.5, "presence": 0.2},
    "bias and bans": {"biases": {7: 3.0, 9: -50.0}, "bans": [7], "min_new_tokens": 3},
    "log-probabilities": {"logprobs": 3, "score_top": 2},
    "drafts": {"drafts": [5] * 9, "drafts_max": 3},
    "masks": {"drafts": [5] * 9, "drafts_max": 3, "allowed": [[5, 7, 31, 33, 64, 159]] * 2, "temperature": 1.0},
}


def test_rows_sample_as_on_the_cpu(device: Any, cpu: Any) -> None:
    ours, theirs = ([Run(PROMPTS[1], NEW_TOKENS, seed=2**63 + 5, **asked) for asked in SAMPLED.values()] for _ in "ab")
    Driver(device, chunk_tokens=64).run_all(ours)
    Driver(cpu, chunk_tokens=64).run_all(theirs)
    for name, our, their in zip(SAMPLED, ours, theirs, strict=True):
        assert our.output == their.output, name
        assert our.output_logprobs == pytest.approx(their.output_logprobs, abs=1e-4), name
        assert (our.top_ids, our.score_top_ids) == (their.top_ids, their.score_top_ids), name
        assert our.scores == pytest.approx(their.scores, abs=1e-4), name


def test_accepted_drafts_are_emitted_together(device: Any, cpu: Any) -> None:
    plain = Run(PROMPTS[1], 6)
    Driver(cpu, chunk_tokens=24).run_all([plain])
    drafted = Run(PROMPTS[1], 6, drafts=[*plain.output[:3], 0, *plain.output[4:]], drafts_max=4)
    Driver(device, chunk_tokens=24).run_all([drafted])
    assert drafted.output == plain.output
    assert drafted.steps < plain.steps


def test_steps_are_timed_by_size_where_drafts_are_verified(device: Any) -> None:
    facts = device.facts
    sizes = [tokens for tokens, _ in facts.step_ms]
    # Up to 16 tokens a step is as large as one of 16, then as one of 32.
    assert sizes[:5] == [1, 2, 16, 17, 32] and sizes == sorted(set(sizes))
    assert facts.step_ms[1][1] == facts.step_ms[2][1] and facts.step_ms[3][1] == facts.step_ms[4][1]
    assert [rows for rows, _ in facts.decode_ms][:2] == [1, 8]
    assert facts.late_ms >= 0 and all(ms > 0 for _, ms in (*facts.step_ms, *facts.decode_ms))


class Rerun:
    """Stands for a graph where there are none: runs the step once more."""

    def __init__(self, runner: Any, bucket: Bucket) -> None:
        self._runner, self._bucket = runner, bucket

    def replay(self) -> None:
        self._runner._run(self._bucket)


def test_sizes_that_were_put_off_are_captured_one_by_one_or_as_soon_as_a_step_needs_one(
    device: Any, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner, captured = device._runner, []
    capture = runner._capture
    for name, value in {"captures": True, "graphs": {}, "_seen_buckets": {}, "_due": deque()}.items():
        monkeypatch.setattr(runner, name, value)

    def noted_capture(bucket: Bucket) -> Any:
        captured.append(bucket)
        if DEVICE.type == "cuda":
            return capture(bucket)
        return runner.graphs.setdefault(bucket, Rerun(runner, bucket))

    monkeypatch.setattr(runner, "_capture", noted_capture)
    mixed = [Bucket(tokens, 8, 8, True, True, True) for tokens in (16, 32, 64)]
    runner.prepare_later(mixed)
    assert device.prepare() and captured == mixed[:1]
    # A prompt of 34 tokens: its size is captured when it comes, the first time, decoding ones the second time.
    run = Run(PROMPTS[2], NEW_TOKENS)
    Driver(device, chunk_tokens=64).run_all([run])
    assert run.output == tiny.greedy(PROMPTS[2], NEW_TOKENS)
    assert captured == [mixed[0], mixed[2], decode_bucket(1)]
    assert device.prepare() and captured[-1] == mixed[1]
    assert not device.prepare()
    assert len(captured) == 4
    # What is captured while idle has done nothing to the rows or to what the next step reads.
    again = Run(PROMPTS[2], NEW_TOKENS)
    Driver(device, chunk_tokens=24).run_all([again])
    assert again.output == run.output


def going_on(pages: list[int]) -> list[StepPlan]:
    """A prompt of 14 tokens on a page of 16, then steps that go on from one another; the third of them brings a page.

    All on row 3, greedily.
    """
    none, one, row = np.zeros(1, np.int32), np.ones(1, np.int32), np.full(1, 3, np.int32)
    floats = np.zeros((1, BIND_FLOATS), np.float32)
    floats[:, [BIND_TOP_P, BIND_REPETITION]] = 1.0
    prompt = StepPlan.empty(
        1, bind_rows=row, bind_ints=np.zeros((1, BIND_INTS), np.int32), bind_floats=floats, bias_counts=none,
        ban_counts=none, prompt_counts=none, output_counts=none, table_rows=row, table_starts=none, table_counts=one,
        table_pages=none + pages[0], rows=row, starts=none, query_counts=one * len(LONG_PROMPT), draft_counts=none,
        flags=one * SAMPLE, output_indices=none, logprob_tops=-one, tokens=np.array(LONG_PROMPT, np.int32),
    )  # fmt: skip
    step = StepPlan.empty(
        2, rows=row, starts=one * len(LONG_PROMPT), query_counts=one, draft_counts=none,
        flags=one * (SAMPLE | FROM_DEVICE), output_indices=one, logprob_tops=-one, tokens=-one,
    )  # fmt: skip
    paged = {"table_rows": row, "table_starts": one, "table_counts": one, "table_pages": none + pages[1]}
    plans = [prompt, step]
    for ahead in range(1, 6):
        advanced = {"starts": step.starts + ahead, "output_indices": step.output_indices + ahead}
        plans.append(replace(step, step=2 + ahead, **advanced, **(paged if ahead == 2 else {})))
    return plans


def test_steps_that_go_on_are_a_graph_and_what_is_new_in_them(
    device: Any, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner, started = device._runner, []
    for name, value in {"captures": True, "graphs": {}, "_seen_buckets": {}, "_due": deque()}.items():
        monkeypatch.setattr(runner, name, value)
    if DEVICE.type == "cpu":
        monkeypatch.setattr(runner, "_capture", lambda size: runner.graphs.setdefault(size, Rerun(runner, size)))
    for name in ("_start", "_start_next"):
        call = getattr(runner, name)
        monkeypatch.setattr(
            runner, name, lambda plan, *last, name=name, call=call: (started.append(name), call(plan, *last))[1]
        )
    plans = going_on([5, 2])
    said = [device.launch(plan).result().tokens.tolist() for plan in plans]
    assert [token for tokens in said for token in tokens] == tiny.greedy(LONG_PROMPT, len(plans))
    # The prompt, the first step of its size, which is run, and the second, which is captured.
    assert started == ["_start"] * 3 + ["_start_next"] * 4


def test_h72_padding_writes_to_the_scratch_page_alone(device: Any) -> None:
    keys = device._runner._pool.keys
    keys.fill_(3.0)
    driver = Driver(device, chunk_tokens=24)
    page = driver.free_pages[-1]
    driver.run_all([Run(PROMPTS[1], NEW_TOKENS)])
    written = (keys != 3.0).flatten(2).any(dim=2).any(dim=0).reshape(-1, COMMON["page_size"]).any(dim=1)
    assert written.nonzero().flatten().tolist() == [SCRATCH_PAGE, page]

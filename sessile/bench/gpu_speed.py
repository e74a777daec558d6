"""Speed of the whole engine on a GPU, in process: decode steps, throughput, and turns on long histories."""

import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from sessile.bench.gpu_reclaimed import HISTORIES_TOKENS, print_cold, print_open_ended
from sessile.bench.gpu_shapes import ShapeEngine
from sessile.bench.gpu_speculate import print_speculation
from sessile.core.limits import SchedulerOptions
from sessile.engine.config import EngineOptions

GROUPS = ("steps", "throughput", "stalls", "turns", "speculation", "cold", "open")
"""What is measured of a shape."""
BATCHES = (1, 8, 64, 256)
PROMPT_TOKENS, STEP_TOKENS = 1024, 132
STEP_TARGETS_MS = {"8B": (5.9, 6.3, 9.3, 20.0), "1.5B": (1.6, 1.7, 2.4, 4.9)}
TURNS = ((4, 300, 16, 16, 8), (8, 150, 16, 16, 8), (8, 6, 32000, 128, 64), (2, 6, 100000, 128, 64),
         (1, 20, 100000, 16, 8), (64, 8, 2048, 128, 64))  # fmt: skip
"""Conversations, turns, and tokens of the first prompt, of each later one, and of each answer."""


def machine_line() -> str:
    """What the figures were taken on."""
    return f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}"


def measure_shape(
    shape: str, groups: set[str], batches: tuple[int, ...], scheduler: SchedulerOptions, options: EngineOptions,
    *, traced: bool = False, quantize: str = "none",
) -> None:  # fmt: skip
    """Print the figures of one shape: any of GROUPS."""
    if "speculation" in groups:
        with TemporaryDirectory() as folder:
            print_speculation(shape, Path(folder), scheduler, options, traced=traced)
    if groups == {"speculation"}:
        return
    with TemporaryDirectory() as folder:
        engine = ShapeEngine(shape, Path(folder), scheduler, options, traced=traced, quantize=quantize)
        facts = engine.engine.device.facts
        print(
            f"{shape}, {quantize}: ready in {engine.start_s:.1f} s; weights {facts.weight_bytes / 1e9:.2f} GB, "
            f"KV {facts.kv_bytes / 1e9:.1f} GB"
        )
        if "steps" in groups:
            for batch in batches:
                print_steps(engine, shape, batch)
                print_trace(engine)
        if "throughput" in groups:
            print_throughput(engine, shape)
            print_trace(engine)
        if "stalls" in groups:
            print_stalls(engine, shape)
            print_trace(engine)
        if "turns" in groups:
            for turns in TURNS:
                print_turns(engine, shape, *turns)
                print_trace(engine)
        if "cold" in groups:
            for history_tokens in HISTORIES_TOKENS:
                print_cold(engine, shape, history_tokens)
                print_trace(engine)
        if "open" in groups:
            print_open_ended(engine, shape)
            print_trace(engine)
        engine.close()


def print_trace(engine: ShapeEngine) -> None:
    """What the device did since the last time, if steps are traced."""
    if engine.trace:
        print(*engine.trace.report(), sep="\n  ")


def print_steps(engine: ShapeEngine, shape: str, batch: int) -> None:
    """Time between decode steps with all rows of a batch running, at about 1,090 tokens of context."""
    for _ in range(batch):
        engine.submit(engine.prompt(PROMPT_TOKENS), STEP_TOKENS)
    turns = engine.run(batch)
    full = np.array(turns.tokens[1:]) == batch
    steps_ms = np.diff(turns.ends_ns)[full] / 1e6
    # The first steps of a size run without a graph, then capture it.
    steady = steps_ms[8:-2]
    if not steady.size:
        print(f"{shape} decode step, batch {batch:3d}: the first rows ended before the last prompts were read")
        return
    target = STEP_TARGETS_MS[shape][BATCHES.index(batch)]
    print(
        f"{shape} decode step, batch {batch:3d}: median {np.median(steady):6.3f} ms, p99 "
        f"{np.percentile(steady, 99):6.3f}, of {steady.size} (target {target})"
    )


def print_throughput(engine: ShapeEngine, shape: str, requests: int = 256) -> None:
    """Output tokens a second of 256 requests of 1024 tokens in, 256 out; the second of two runs."""
    for run in range(2):
        started_ns = time.perf_counter_ns()
        for _ in range(requests):
            engine.submit(engine.prompt(1024), 256)
        turns = engine.run(requests)
        wall_s = (time.perf_counter_ns() - started_ns) / 1e9
        prefill_s = (max(turns.first_ns.values()) - started_ns) / 1e9
        print(
            f"{shape} throughput run {run}: {requests * 256 / wall_s:8.0f} output tokens/s in {wall_s:.2f} s, all "
            f"answering after {prefill_s:.2f} s, {len(turns.ends_ns)} steps"
        )


def print_stalls(engine: ShapeEngine, shape: str, rows: int = 32, prompt_tokens: int = 32_000) -> None:
    """Time between two tokens of decoding rows while a long prompt is read, and the prompt's time to its first."""
    for _ in range(rows):
        engine.submit(engine.prompt(PROMPT_TOKENS), 400)
    begun_ns: dict[int, int] = {}

    def read_prompt() -> None:
        begun_ns[engine.submit(engine.prompt(prompt_tokens), 1)] = time.perf_counter_ns()

    turns = engine.run(rows + 1, at_turn={150: read_prompt})
    key, begun = begun_ns.popitem()
    during = np.array([end for end, tokens in zip(turns.ends_ns, turns.tokens, strict=True) if tokens >= rows])
    gaps_ms = np.diff(during)[(during[1:] > begun) & (during[:-1] < turns.first_ns[key])] / 1e6
    print(
        f"{shape} stalls, {rows} rows decode while {prompt_tokens} tokens are read: between tokens median "
        f"{np.median(gaps_ms):.1f} ms, p99 {np.percentile(gaps_ms, 99):.1f}, longest {gaps_ms.max():.1f}; the prompt's "
        f"first token after {(turns.first_ns[key] - begun) / 1e6:.0f} ms, in {gaps_ms.size} steps"
    )


def print_turns(engine: ShapeEngine, shape: str, conversations: int, turns: int, first: int, added: int,
                generated: int) -> None:  # fmt: skip
    """Latency of the later turns of conversations side by side, each a streaming session."""
    names = [f"{shape}-{first}-{conversations}-{index}" for index in range(conversations)]
    sessions: dict[int, str] = {}
    begun_ns: dict[int, int] = {}
    left = {name: turns - 1 for name in names}

    def submit(name: str, tokens: int) -> None:
        key = engine.submit(engine.prompt(tokens), generated, name)
        sessions[key], begun_ns[key] = name, time.perf_counter_ns()

    def next_turn(key: int) -> None:
        ends_ns[key] = time.perf_counter_ns()
        if left[sessions[key]]:
            left[sessions[key]] -= 1
            submit(sessions[key], added)

    ends_ns: dict[int, int] = {}
    started_ns = time.perf_counter_ns()
    for name in names:
        engine.open_session(name)
        submit(name, first)
    done = engine.run(conversations * turns, next_turn)
    for name in names:
        engine.close_session(name)
    later = [key for key in sessions if key not in list(sessions)[:conversations]]
    walls_ms = [(ends_ns[key] - begun_ns[key]) / 1e6 for key in later]
    firsts_ms = [(done.first_ns[key] - begun_ns[key]) / 1e6 for key in later]
    print(
        f"{shape} turns, {conversations} × {turns}, {first}/{added}/{generated}: total "
        f"{(max(ends_ns.values()) - started_ns) / 1e9:5.2f} s, turn mean {np.mean(walls_ms):7.2f} ms "
        f"median {np.median(walls_ms):7.2f}, first token mean {np.mean(firsts_ms):6.2f} median "
        f"{np.median(firsts_ms):6.2f}"
    )

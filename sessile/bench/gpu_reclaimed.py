"""What a GPU gives to sessions whose KV was reclaimed, and to requests that leave max_tokens unset."""

import time
from collections.abc import Sequence

import numpy as np

from sessile.bench.gpu_shapes import NOISE_TEMPERATURE, ShapeEngine, Turns
from sessile.bench.intervals import shown
from sessile.contract.messages import Sampling

HISTORIES_TOKENS = (2_000, 8_000, 32_000)
ADDED_TOKENS, ANSWER_TOKENS = 16, 8
COLD_TURNS = 5

OPEN_PROMPT_TOKENS, OPEN_OUTPUT_TOKENS = 1024, 256
OPEN_SPREAD = 0.4
"""Standard deviation of the logarithm of an output's length."""
OPEN_PAIRS = 5
OPEN_SHARE_MIN = 0.95
SPARE_TOKENS = 8
"""The tokens at so many places at the end of an output stop it, so that one that numerics change does not run on."""


def print_cold(engine: ShapeEngine, shape: str, history_tokens: int, turns: int = COLD_TURNS) -> None:
    """Time to the first token of a session's turn whose KV is there, and of one whose KV was reclaimed, in turn."""
    session = f"{shape}-cold-{history_tokens}"
    engine.open_session(session)
    turn_ms(engine, session, history_tokens)
    warm_ms, cold_ms, computed = [], [], 0
    for _ in range(turns):
        first_ms, tokens = turn_ms(engine, session, ADDED_TOKENS)
        assert tokens <= ADDED_TOKENS + 1, f"{tokens} tokens were computed for a turn of {ADDED_TOKENS}"
        warm_ms.append(first_ms)
        engine.flush()
        first_ms, computed = turn_ms(engine, session, ADDED_TOKENS)
        assert computed >= history_tokens, f"only {computed} tokens were computed where all KV was reclaimed"
        cold_ms.append(first_ms)
    engine.close_session(session)
    cold = float(np.median(cold_ms))
    print(
        f"{shape} cold, {history_tokens} tokens of history: first token after {np.median(warm_ms):.2f} ms warm, "
        f"{cold:.1f} ms cold ({min(cold_ms):.1f}–{max(cold_ms):.1f}, {computed / cold:.0f} tokens a ms); medians of "
        f"{turns}"
    )


def turn_ms(engine: ShapeEngine, session: str, tokens: int) -> tuple[float, int]:
    """(ms to the first token of a turn, tokens that were computed for it)."""
    begun_ns = time.perf_counter_ns()
    key = engine.submit(engine.prompt(tokens), ANSWER_TOKENS, session)
    turns = engine.run(1)
    done = turns.done[key]
    return (turns.first_ns[key] - begun_ns) / 1e6, done.prompt_tokens - done.cached_tokens


def output_lengths(requests: int) -> list[int]:
    """Seeded, around OPEN_OUTPUT_TOKENS: most are shorter, a few twice as long."""
    spread = np.exp(OPEN_SPREAD * np.random.default_rng(2).standard_normal(requests) - OPEN_SPREAD**2 / 2)
    return [int(length) for length in np.clip(OPEN_OUTPUT_TOKENS * spread, 1, 2.5 * OPEN_OUTPUT_TOKENS)]


def stops_at(output: Sequence[int], length: int) -> tuple[tuple[int, ...], int]:
    """(tokens that end this output when it has so many: those from there on that did not come before; its length
    then, which is more if the first of them did come before)."""
    earlier = set(output[: length - 1])
    stops = tuple(dict.fromkeys(token for token in output[length - 1 :] if token not in earlier))
    assert stops, "an output says nothing new at its end, so nothing can stop it there"
    return stops, 1 + output.index(stops[0])


def print_open_ended(engine: ShapeEngine, shape: str, requests: int = 256, pairs: int = OPEN_PAIRS) -> None:
    """Throughput of requests that end by a stop token, with max_tokens unset against exactly what each will need.

    Each is sampled once to learn what it says; from the place on where it is to end, its own tokens are its stop
    tokens. The prefix cache is emptied before each run.
    """
    prompts = [engine.prompt(OPEN_PROMPT_TOKENS) for _ in range(requests)]
    ends = output_lengths(requests)
    said = _run_open(engine, prompts, [end + SPARE_TOKENS - 1 for end in ends], [()] * requests)[0]
    stops, lengths = zip(*map(stops_at, said, ends), strict=True)
    wanted: dict[str, list[int | None]] = {"unset": [None] * requests, "exact": list(lengths)}
    rates: dict[str, list[float]] = {"unset": [], "exact": []}
    steps, preemptions, other_lengths = {"unset": 0, "exact": 0}, 0, 0
    for number in range(pairs):
        for arm in ("unset", "exact") if number % 2 == 0 else ("exact", "unset"):
            outputs, turns = _run_open(engine, prompts, wanted[arm], stops)
            rates[arm].append(sum(map(len, outputs)) / ((turns.ends_ns[-1] - turns.begun_ns) / 1e9))
            steps[arm] = len(turns.ends_ns)
            if arm == "unset":
                preemptions += sum(done.preemptions for done in turns.done.values())
            other_lengths += sum(len(output) != length for output, length in zip(outputs, lengths, strict=True))
    ratios = [unset / exact for unset, exact in zip(rates["unset"], rates["exact"], strict=True)]
    print(
        f"{shape} open, {requests} × {OPEN_PROMPT_TOKENS} in, {min(lengths)} to {max(lengths)} out (mean "
        f"{np.mean(lengths):.0f}): unset / exact {shown(ratios)} of {pairs} (target ≥ {OPEN_SHARE_MIN:g}), "
        f"{np.median(rates['unset']):.0f} and {np.median(rates['exact']):.0f} output tokens/s, {steps['unset']} and "
        f"{steps['exact']} steps, {preemptions} preempted while unset; {other_lengths} of {2 * pairs * requests} "
        "outputs were longer or shorter than learned"
    )


def _run_open(
    engine: ShapeEngine, prompts: Sequence[np.ndarray], limits: Sequence[int | None], stops: Sequence[tuple[int, ...]]
) -> tuple[list[list[int]], Turns]:
    """(outputs, the run) of all prompts, sent at once to an empty prefix cache."""
    engine.flush()
    keys = []
    for number, (prompt, limit, stop) in enumerate(zip(prompts, limits, stops, strict=True)):
        sampling = Sampling(seed=number, temperature=NOISE_TEMPERATURE, max_new_tokens=limit, stop_token_ids=stop)
        keys.append(engine.send(prompt, sampling))
    turns = engine.run(len(keys))
    outputs = turns.outputs()
    return [outputs[key] for key in keys], turns

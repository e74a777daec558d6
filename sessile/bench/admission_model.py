"""The load of `sessile bench admission` on a model: the device computes, and time is time.

Whether and when a model ends its answers is up to the model. Here all logits but that of a stop token are flattened, so
that every request ends at a random place that its seed decides, whatever the model: with the limit unset, it first says
how long it will be, then the same requests run again with limits that say so.
"""

import math
import time

import numpy as np
from rich.console import Console

from sessile.bench.admission import PAGE_SIZE, Run, run_to_ends
from sessile.bench.intervals import shown
from sessile.contract.messages import Sampling, Submit, pack_tokens
from sessile.contract.model import ModelFacts
from sessile.contract.plan import StepPlan, StepResult
from sessile.core.limits import Limits
from sessile.core.machine import Machine
from sessile.device.config import DeviceOptions
from sessile.device.factory import open_device
from sessile.model.options import ModelOptions
from sessile.units import ceil_div

ROWS_MAX = 64
CHUNK_TOKENS = 512
CONTEXT_TOKENS = 1024
PROMPT_TOKENS_MEAN, OUTPUT_TOKENS_MEAN = 48, 48
POOL_SHARE = 0.25
"""Of what all requests hold at their ends."""
STOP_ID = 0
TEMPERATURE = 1000.0
"""So hot that all tokens are equally likely, but for the one with a bias."""


class ModelLoad:
    """Requests of a model, and the device that answers them. Owns the device."""

    def __init__(self, model: str, requests: int) -> None:
        self._device = open_device(
            ModelOptions(model=model), DeviceOptions(), page_size=PAGE_SIZE, context_tokens=CONTEXT_TOKENS,
            rows_max=ROWS_MAX, progress=lambda stage, share: None,
        )  # fmt: skip
        facts = self._device.facts
        self.name = f"{facts.model_path} ({facts.dtype} on {facts.device})"
        self._vocab_size = facts.vocab_size
        wanted_pages = requests * ceil_div(PROMPT_TOKENS_MEAN + OUTPUT_TOKENS_MEAN, PAGE_SIZE)
        self.pages = min(facts.pages_total - 1, max(int(POOL_SHARE * wanted_pages), CONTEXT_TOKENS // PAGE_SIZE))
        dice = np.random.default_rng(1)
        lengths = dice.integers(1, 2 * PROMPT_TOKENS_MEAN, requests)
        self._prompts = [dice.integers(1, self._vocab_size, length, np.int32) for length in lengths]

    def run(self, limits_tokens: dict[int, int] | None) -> tuple[Run, float]:
        """Run all requests to their ends, with these limits or with none; what it took, and how many seconds."""
        limits = Limits(
            pages_total=1 + self.pages, page_size=PAGE_SIZE, rows_max=ROWS_MAX, context_tokens=CONTEXT_TOKENS,
            chunk_tokens=CHUNK_TOKENS, audit_level=1,
        )  # fmt: skip
        machine = Machine(limits, ModelFacts(self._vocab_size, CONTEXT_TOKENS, eos_ids=()))
        bias = TEMPERATURE * math.log(self._vocab_size / OUTPUT_TOKENS_MEAN)
        submits = []
        for key, prompt in enumerate(self._prompts):
            sampling = Sampling(
                seed=key, temperature=TEMPERATURE, logit_bias=((STOP_ID, bias),), stop_token_ids=(STOP_ID,),
                max_new_tokens=limits_tokens[key] if limits_tokens else None,
            )  # fmt: skip
            submits.append(Submit(key=key, tokens=pack_tokens(prompt), sampling=sampling))
        started_ns = time.perf_counter_ns()
        run = run_to_ends(machine, self._answer, submits)
        return run, (time.perf_counter_ns() - started_ns) / 1e9

    def close(self) -> None:
        """Give the device back."""
        self._device.close()

    def _answer(self, plan: StepPlan) -> StepResult:
        return self._device.launch(plan).result()


def measure_on_model(model: str, requests: int, pairs: int, console: Console) -> float:
    """Run with limits unset and with exact ones, in pairs, and print both; the share of the first's tokens a second in
    the second's, the median over the pairs. Which of a pair runs first alternates: a machine's pace drifts.

    Raises StartupError if the model cannot be opened.
    """
    load = ModelLoad(model, requests)
    try:
        first, _ = load.run(None)  # Says how long each output is, and warms up: its time is not looked at.
        limits: dict[str, dict[int, int] | None] = {"exact": first.lengths_tokens, "unset": None}
        runs: dict[str, Run] = {}
        speeds: dict[str, float] = {}
        shares: list[float] = []
        for pair in range(pairs):
            for name in sorted(limits, reverse=pair % 2 == 0):
                runs[name], seconds = load.run(limits[name])
                speeds[name] = runs[name].output_tokens / seconds
            shares.append(speeds["unset"] / speeds["exact"])
    finally:
        load.close()
    console.print(f"{load.name}, a pool of {load.pages * PAGE_SIZE:,} tokens; speeds are the last pair's:")
    for name, run in sorted(runs.items()):
        console.print(
            f"  {name}: {speeds[name]:.1f} output tokens/s, {run.steps:,} steps, {run.preemptions} preempted, "
            f"first wait {max(run.first_steps.values())} and pause {max(run.pauses_steps.values())} steps"
        )
    each = " · ".join(f"{share:.3f}" for share in shares)
    console.print(f"  unset / exact by the clock: {each}; median [95 %] {shown(shares)}")
    console.print(f"  by steps: {runs['exact'].steps / runs['unset'].steps:.3f}")
    return float(np.median(shares))

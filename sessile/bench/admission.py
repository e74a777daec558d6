"""`sessile bench admission`: throughput of requests that leave max_tokens unset, against the same with exact limits.

By the bound a request may fill its whole context, so that only a few could run at once. The core admits by an estimate
and preempts when it was too low (H67). Here requests end by a stop token, far below their context, at lengths that vary
as those of real answers do; they run once with max_tokens unset and once with exactly the length that they will have.
A null device answers, so the figures are the same on every machine. Time is counted in steps and in tokens: a step
costs as much as it computes tokens, and a fixed part besides. With --model a model answers, and time is time.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
from rich.console import Console
from rich.table import Table

from sessile.bench.null_device import EOS_ID, FIRST_PLAIN_ID, VOCAB_SIZE, OverlappedDriver, null_result
from sessile.contract.messages import Batch, Sampling, Submit, pack_tokens
from sessile.contract.model import ModelFacts
from sessile.contract.plan import BIND_SEED_LOW, Ints, StepPlan, StepResult
from sessile.core.limits import Limits
from sessile.core.machine import Machine
from sessile.options import option
from sessile.units import ceil_div

SHARE_MIN = 0.95
"""Least throughput with max_tokens unset, relative to exact limits."""
ROWS_MAX = 256
PAGE_SIZE = 16
CONTEXT_TOKENS = 8192
FIXED_COST_TOKENS = 512
"""What a step costs beside its tokens: reading the weights, as a number of tokens that could be computed meanwhile."""
PROMPT_TOKENS_MEDIAN, OUTPUT_TOKENS_MEDIAN = 200, 120
SPREAD = 0.6
"""Standard deviation of the logarithm of a length."""
POOL_SHARES = (0.1, 0.25, 0.5, 1.0)
"""Sizes of the pool, as shares of what all requests hold at their ends: the last one has room for all at once."""


@dataclass(frozen=True)
class AdmissionBenchOptions:
    """What to measure."""

    requests: int = option(256, "Requests, all sent at once.", unit="requests", low=8, high=100_000)
    seed: int = option(1, "Seed of the lengths.", low=0)
    model: str | None = option(
        None, "Measure on this model as well, on this machine: a folder, a .gguf file, or `default`."
    )
    pairs: int = option(3, "On the model: runs with limits and without, in pairs.", unit="pairs", low=1)


@dataclass(frozen=True)
class Need:
    """One request: its prompt and the output that it will have, the stop token included."""

    prompt_tokens: int
    output_tokens: int

    @property
    def pages(self) -> int:
        """Pages that it holds at its end."""
        return ceil_div(self.prompt_tokens + self.output_tokens, PAGE_SIZE)


@dataclass
class Run:
    """What a run took. Waits in steps."""

    steps: int = 0
    computed_tokens: int = 0
    preemptions: int = 0
    recomputed_tokens: int = 0
    lengths_tokens: dict[int, int] = field(default_factory=dict)
    """By request: its output."""
    first_steps: dict[int, int] = field(default_factory=dict)
    """By request: the step of its first token."""
    pauses_steps: dict[int, int] = field(default_factory=dict)
    """By request: the longest wait between two of its tokens."""

    @property
    def cost_tokens(self) -> int:
        """How long it took, as a number of tokens that could have been computed."""
        return self.steps * FIXED_COST_TOKENS + self.computed_tokens

    @property
    def throughput(self) -> float:
        """Output tokens for each thousand tokens of cost."""
        return 1000 * self.output_tokens / self.cost_tokens

    @property
    def output_tokens(self) -> int:
        """Of all requests."""
        return sum(self.lengths_tokens.values())


def needs(requests: int, seed: int) -> list[Need]:
    """Requests with lengths as real traffic has them: most are short, a few are ten times longer."""
    dice = np.random.default_rng(seed)
    medians = np.array([PROMPT_TOKENS_MEDIAN, OUTPUT_TOKENS_MEDIAN])
    lengths = medians * np.exp(SPREAD * dice.standard_normal((requests, 2)))
    return [Need(*pair) for pair in np.clip(lengths, 1, CONTEXT_TOKENS // 4).astype(int).tolist()]


class EndingDevice:
    """A null device whose requests end by themselves. It knows each by its seed, with which the plan binds its row."""

    def __init__(self, output_tokens: Mapping[int, int]) -> None:
        """output_tokens: by seed, at which length the output ends with a stop token."""
        self._output_tokens = output_tokens
        self._row_lengths = np.zeros(ROWS_MAX, np.int64)

    def answer(self, plan: StepPlan) -> StepResult:
        """The result of a step."""
        for row, seed in zip(plan.bind_rows.tolist(), plan.bind_ints[:, BIND_SEED_LOW].tolist(), strict=True):
            self._row_lengths[row] = self._output_tokens[seed]
        result = null_result(plan)
        lasts = plan.output_indices + 1 >= self._row_lengths[plan.rows]
        result.tokens[lasts[result.emitted > 0]] = EOS_ID
        return result


def run_needs(wanted: list[Need], pages: int, *, exact: bool) -> Run:
    """Send all requests at once and run them to their ends. exact: with max_tokens set to what each will need."""
    limits = Limits(
        pages_total=1 + pages, page_size=PAGE_SIZE, rows_max=ROWS_MAX, context_tokens=CONTEXT_TOKENS,
        chunk_tokens=8192, audit_level=1,
    )  # fmt: skip
    machine = Machine(limits, ModelFacts(VOCAB_SIZE, CONTEXT_TOKENS, eos_ids=(EOS_ID,)))
    device = EndingDevice({key: need.output_tokens for key, need in enumerate(wanted)})
    dice = np.random.default_rng(0)
    submits = []
    for key, need in enumerate(wanted):
        tokens: Ints = dice.integers(FIRST_PLAIN_ID, VOCAB_SIZE, need.prompt_tokens, np.int32)
        sampling = Sampling(seed=key, max_new_tokens=need.output_tokens if exact else None)
        submits.append(Submit(key=key, tokens=pack_tokens(tokens), sampling=sampling))
    run = run_to_ends(machine, device.answer, submits)
    for key, need in enumerate(wanted):
        assert run.lengths_tokens[key] == need.output_tokens, "a request ended too early or too late"
    return run


def run_to_ends(machine: Machine, answer: Callable[[StepPlan], StepResult], submits: list[Submit]) -> Run:
    """Send all requests at once and turn the machine until the last one has ended."""
    driver = OverlappedDriver(machine, answer)
    for submit in submits:
        machine.receive(submit)
    run = Run()
    last_steps: dict[int, int] = {}
    while len(run.lengths_tokens) < len(submits):
        times, effects = driver.turn()
        run.steps += times.rows > 0
        run.computed_tokens += times.tokens
        if effects:
            _follow(run, effects, last_steps)
    machine.audit()
    stats = machine.stats()
    run.preemptions, run.recomputed_tokens = stats.preemptions_total, stats.recomputed_tokens_total
    return run


def _follow(run: Run, effects: Batch, last_steps: dict[int, int]) -> None:
    """Note who was given tokens in this step, and how long it had waited, and who has ended."""
    for key in memoryview(effects.delta_keys).cast("q").tolist():
        run.first_steps.setdefault(key, run.steps)
        run.pauses_steps[key] = max(run.pauses_steps.get(key, 0), run.steps - last_steps.get(key, run.steps))
        last_steps[key] = run.steps
    for done in effects.done:
        assert done.reason in ("stop", "length"), f"a request of the bench ended with {done.reason}: {done.message}"
        run.lengths_tokens[done.key] = done.completion_tokens


def measure_admission(options: AdmissionBenchOptions) -> int:
    """Measure and print; 0 if the target is met with every pool, and on the model if there is one, else 1."""
    console = Console()
    wanted = needs(options.requests, options.seed)
    table = Table(box=None, pad_edge=False)
    columns = ("pool,\ntokens", "limits", "steps", "preempted", "tokens\nrecomputed", "first\nwait", "pause",
               "through-\nput", f"≥ {SHARE_MIN:g}")  # fmt: skip
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    shares = []
    for share in POOL_SHARES:
        pages = pool_pages(wanted, share)
        exact, unset = (run_needs(wanted, pages, exact=each) for each in (True, False))
        shares.append(add_lines(table, pages, exact, unset))
    console.print(f"{options.requests} requests at once. Waits and pauses are the longest, in steps.")
    console.print(table)
    if options.model is not None:
        from sessile.bench.admission_model import measure_on_model

        shares.append(measure_on_model(options.model, options.requests, options.pairs, console))
    return 0 if min(shares) >= SHARE_MIN else 1


def add_lines(table: Table, pages: int, exact: Run, unset: Run) -> float:
    """Add a pair of runs to the table; the throughput of the second, relative to the first."""
    share = unset.throughput / exact.throughput
    verdict = "[green]met" if share >= SHARE_MIN else "[red]missed"
    table.add_row(f"{pages * PAGE_SIZE:,}", "exact", *figures(exact), "1.000")
    table.add_row("", "unset", *figures(unset), f"{share:.3f}", verdict)
    return share


def pool_pages(wanted: list[Need], share: float) -> int:
    """Pages of a pool with room for this share of all requests, and for one of full length, so that none is clamped."""
    return max(int(share * sum(need.pages for need in wanted)), ceil_div(CONTEXT_TOKENS, PAGE_SIZE))


def figures(run: Run) -> list[str]:
    """A run as cells of the table; its throughput is shown as a share of another's."""
    counts = (run.steps, run.preemptions, run.recomputed_tokens)
    waits = (max(run.first_steps.values()), max(run.pauses_steps.values()))
    return [f"{count:,}" for count in (*counts, *waits)]

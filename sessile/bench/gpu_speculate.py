"""Speculation on a GPU: the texts of `sessile bench speculate` as recorded, on a shape with seeded random weights.

Requests are sampled, so hot that their seeds decide. Greedy, random weights in bfloat16 would choose otherwise at many
a near tie when drafts change the shape of a step, and drafts that are to be right would be wrong from there on.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from sessile.bench.gpu_replay import Counts, Expected, ReplayingDrafter
from sessile.bench.gpu_shapes import NOISE_TEMPERATURE, ShapeEngine
from sessile.bench.intervals import shown
from sessile.bench.speculate_record import RECORDED, Recording
from sessile.contract.messages import Sampling
from sessile.core.limits import SchedulerOptions
from sessile.draft.drafter import LookupDrafter
from sessile.draft.shelf import Shelf
from sessile.engine.config import EngineOptions
from sessile.engine.drafting import StepFacts, step_times

SPECULATION_BATCHES = (1, 8, 32)
PAIRS, PAIRS_OF_CHAT = 5, 10


@dataclass
class Pairs:
    """A workload at one batch size: what rounds without and with speculation came to, in turn."""

    rates: dict[bool, list[float]] = field(default_factory=lambda: {False: [], True: []})
    """Output tokens a second, without and with."""
    again: list[float] = field(default_factory=list)
    """Those without in a second run of each round: how much two runs of the same differ."""
    counts: list[Counts] = field(default_factory=list)
    tokens: int = 0
    """Of all rounds with speculation."""
    requests: int = 0
    parted: int = 0
    """Requests whose output with speculation was another than without."""

    @property
    def ratios(self) -> list[float]:
        """With against without, in each round."""
        return [on / off for off, on in zip(self.rates[False], self.rates[True], strict=True)]

    @property
    def noise(self) -> list[float]:
        """Without against without, in each round."""
        return [again / off for off, again in zip(self.rates[False], self.again, strict=True)]

    def line(self) -> str:
        """The figures."""
        offered, accepted, asked, with_drafts, as_recorded = (
            sum(getattr(counts, name) for counts in self.counts)
            for name in ("offered", "accepted", "asked", "with_drafts", "as_recorded")
        )
        off, on = (np.median(self.rates[speculates]) for speculates in (False, True))
        drafted = (
            f"drafts in {with_drafts / asked:.0%} of a request's steps, {accepted:,} of {offered:,} accepted, "
            f"{as_recorded / with_drafts:.1%} of these steps as recorded"
            if with_drafts
            else "the pace let nothing be drafted"
        )
        parted = f"; {self.parted} of {self.requests} outputs part" if self.parted else ""
        return (
            f"ratio {shown(self.ratios)} of {len(self.ratios)} (without against itself {shown(self.noise)}), "
            f"{off:.0f} → {on:.0f} output tokens/s, {self.tokens / (self.tokens - accepted):.2f} tokens a step; "
            f"{drafted}{parted}"
        )


class SpeculationBench:
    """Runs recorded workloads on a shape, with and without speculation. Owns the engine until `close`."""

    def __init__(
        self, shape: str, folder: Path, scheduler: SchedulerOptions, options: EngineOptions, recording: Recording,
        *, traced: bool = False,
    ) -> None:  # fmt: skip
        self._recording = recording
        made: list[ReplayingDrafter] = []

        def make_drafter(shelf: Shelf, facts: StepFacts) -> ReplayingDrafter:
            times = step_times(facts)
            lookup = LookupDrafter(shelf, times)
            lookup.prepare()
            made.append(ReplayingDrafter(lookup, times))
            return made[0]

        options = replace(options, speculate="on", drafts_max=recording.drafts_max)
        self.engine = ShapeEngine(shape, folder, scheduler, options, traced=traced, make_drafter=make_drafter)
        self.drafter = made[0]

    def close(self) -> None:
        """Give the device back."""
        self.engine.close()

    def step_lines(self) -> list[str]:
        """What the device found out about its steps at the start."""
        facts = self.engine.engine.device.facts
        tables = {"that verify": facts.step_ms, "without drafts": facts.decode_ms}
        lines = [
            f"steps {kind}, ms by tokens: {', '.join(f'{tokens}: {ms:.2f}' for tokens, ms in table) or 'not measured'}"
            for kind, table in tables.items()
        ]
        times = self.drafter.late.times
        late = f"{times.late_ns / 1e6:.2f} ms, and {times.late_line_ns / 1e3:.0f} µs for each request"
        return [*lines, f"a step with drafts is taken to begin later by {late}"]

    def measure(self, name: str, batch: int, pairs: int) -> Pairs:
        """Rounds of `batch` requests of a workload each, as many as `pairs`, without, with speculation and without.

        Before a round its prompts are answered once without, which says what the model says and leaves the prompts in
        the prefix cache, and once with speculation, so that nothing happens for the first time in the round.
        """
        answers = self._recording.workloads[name]
        prompts = [self.engine.prompt(answer.prompt_tokens) for answer in answers]
        self.drafter.expected = {str(number): Expected(answer) for number, answer in enumerate(answers)}
        result = Pairs()
        for number in range(pairs):
            chosen = [(number * batch + place) % len(answers) for place in range(batch)]
            for speculates in (False, True):
                said = self._run(prompts, chosen, speculates=speculates)[0]
                for answer, output in zip(chosen, said, strict=True):
                    self.drafter.expected[str(answer)].learn(output)
            self.drafter.take_counts()
            outputs = {}
            around: list[float] = []
            for speculates in (False, True, False):
                outputs[speculates], rate = self._run(prompts, chosen, speculates=speculates)
                (result.rates[True] if speculates else around).append(rate)
            # Neither of the two that are compared always runs first.
            first, last = around if number % 2 == 0 else reversed(around)
            result.rates[False].append(first)
            result.again.append(last)
            result.counts.append(self.drafter.take_counts())
            result.tokens += sum(map(len, outputs[True]))
            result.requests += batch
            result.parted += sum(one != other for one, other in zip(outputs[False], outputs[True], strict=True))
        return result

    def _run(self, prompts: list[np.ndarray], chosen: list[int], *, speculates: bool) -> tuple[list[list[int]], float]:
        """(outputs, output tokens a second) of these prompts, sent at once."""
        keys = []
        for number in chosen:
            length = self.drafter.expected[str(number)].recorded.tokens
            sampling = Sampling(seed=number, temperature=NOISE_TEMPERATURE, max_new_tokens=length, ignore_eos=True)
            keys.append(self.engine.send(prompts[number], sampling, corpora=(str(number),) if speculates else None))
        turns = self.engine.run(len(keys))
        outputs = turns.outputs()
        wall_s = (turns.ends_ns[-1] - turns.begun_ns) / 1e9
        return [outputs[key] for key in keys], sum(map(len, outputs.values())) / wall_s


def print_speculation(
    shape: str, folder: Path, scheduler: SchedulerOptions, options: EngineOptions, *, traced: bool = False
) -> None:
    """Every workload that was recorded at every batch size, a line each."""
    recording = Recording.read(RECORDED)
    bench = SpeculationBench(shape, folder, scheduler, options, recording, traced=traced)
    print(f"{shape} speculation, drafts as recorded of {recording.model}; ready in {bench.engine.start_s:.1f} s")
    print(*bench.step_lines(), sep="\n")
    for name in recording.workloads:
        for batch in SPECULATION_BATCHES:
            pairs = PAIRS_OF_CHAT if name == "chat" else PAIRS
            print(f"{shape} speculation, {name}, batch {batch:2d}: {bench.measure(name, batch, pairs).line()}")
            if bench.engine.trace:
                print(*bench.engine.trace.report(), sep="\n  ")
    bench.close()

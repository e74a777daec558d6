"""`sessile bench speculate`: what speculation gains or costs on a model, text by text, against the same without it.

Each round runs the same requests in every arm, one arm after the other, every second round in reverse: what the machine
does meanwhile meets all arms alike. A ratio is taken within a round; its median and interval are over rounds. Rounds
take other prompts, as far as there are any. Prompts are in the prefix cache in all arms, so decoding is measured.

Greedy outputs of a small model end up in loops, which are easily drafted. So every prompt is answered once without
speculation; where a period of LOOP_TOKENS or less has come three times in a row the answer is cut, and no arm gets
beyond: neither tokens nor time behind it count.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from sessile.bench.intervals import median_interval
from sessile.bench.speculate_engine import Arm, Run, SpeculatingEngine
from sessile.bench.speculate_loads import DISTRACTORS, LOADS, PROMPTS, Load, Texts
from sessile.bench.speculate_record import DRAFTS_MAX, RecordedAnswer, Recording, recorded
from sessile.errors import StartupError
from sessile.model.options import ModelOptions
from sessile.options import option
from sessile.text.load import load_tokenizer

LOOP_TOKENS, LOOP_TIMES = 64, 3
GRAM_TOKENS = 4
LENGTH_MIN = 8
"""A shorter answer says nothing about a rate; its prompt is left out."""
PAIRS, PAIRS_OF_CHAT = 5, 15
RATIO_MIN = {"edit": 2.0, "documents": 1.5, "json": 1.5}
"""Least median ratio of output tokens a second at batch 1, corpora allowed."""
LOSS_MAX_RATIO = 0.98
"""What the interval of free chat has to reach."""
EARLIER_MIN, DISTRACTED_MIN = 2.5, 0.95
"""Least tokens a step: with the model's earlier outputs against without; among distractors against alone."""
AMONG = (1, 2, 4, DISTRACTORS)
MARGIN_MAX = 0.15
"""In nats: more than rounding to bfloat16 moves two log-probabilities apart."""
COLUMNS = 118

OFF, SEQUENCE = Arm("off", speculate=False), Arm("sequence", speculate=True)
TITLES = {
    "edit": "(a) code edit, most of the function repeated",
    "documents": "(b) answers that quote a given document",
    "json": "(c) templated JSON",
    "chat": "(d) free chat",
    "earlier": "(e) a corpus of the model's own earlier answers, the same questions again",
    "distracted": "(f) that corpus among others",
}


@dataclass(frozen=True)
class SpeculateBenchOptions:
    """What to measure."""

    model: str = option("default", "The model: a folder, a .gguf file, or `default`.")
    load_format: str = option(
        "auto", "dummy: seeded random weights, to try the bench on a folder without any.", choices=("auto", "dummy")
    )
    dtype: str = option(
        "float32", "Number format; in float32 outputs must be equal.", choices=("auto", "float32", "bfloat16")
    )
    workloads: str = option(",".join(TITLES), "Which, with commas between.")
    batches: str = option("1,8,32", f"Requests at once, with commas between; at most {PROMPTS}.")
    pairs: int | None = option(
        None, f"Rounds of each; default: {PAIRS_OF_CHAT} of free chat, {PAIRS} of all others.", unit="rounds", low=1
    )
    tokens: int = option(128, "Most output tokens of a request.", unit="tokens", low=LENGTH_MIN, high=4096)
    loops: str = option(
        "cut",
        "keep: count what a model says again and again, too, to see how much that flatters.",
        choices=("cut", "keep"),
    )
    drafts_max: int = option(7, "Most drafts of a request in a step.", unit="drafts", low=1, high=255)
    record: str | None = option(
        None,
        "Measure nothing: write to this file what drafts come to at each place of the answers, for `make gpu-bench`.",
    )


@dataclass(frozen=True)
class Case:
    """A workload ready to be run: its prompts, what counts of the answer to each, and its arms."""

    name: str
    prompts: list[list[int]]
    answers: list[list[int]]
    arms: list[Arm]


@dataclass
class Figures:
    """What an arm came to at one batch size, over all rounds."""

    runs: list[Run] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)
    processor_ratios: list[float] = field(default_factory=list)
    differing: int = 0
    margin: float = 0.0
    """The largest of those outputs that differ."""

    @property
    def tokens_a_step(self) -> float:
        """Of a request; 1 without drafts."""
        tokens = sum(run.tokens for run in self.runs)
        return tokens / (tokens - sum(run.accepted for run in self.runs))

    @property
    def interval(self) -> tuple[float, float]:
        """Of the median ratio, 95 %, by bootstrap."""
        return median_interval(self.ratios)

    def sources(self) -> str:
        """Drafts accepted of those offered, by source; corpora that are distractors count together."""
        totals: dict[str, tuple[int, int]] = {}
        for use in (use for run in self.runs for done in run.dones for use in done.sources):
            name = "distractors" if use.source.startswith("corpus:distractor") else use.source
            offered, accepted = totals.get(name, (0, 0))
            totals[name] = offered + use.drafts_offered, accepted + use.drafts_accepted
        return ", ".join(f"{name} {accepted:,}/{offered:,}" for name, (offered, accepted) in totals.items())


def loop_end(tokens: Sequence[int]) -> int:
    """How many tokens come before and with the third time in a row of a period of LOOP_TOKENS or less; else all."""
    repeated = [0] * (LOOP_TOKENS + 1)
    for place, token in enumerate(tokens):
        for period in range(1, min(place, LOOP_TOKENS) + 1):
            repeated[period] = repeated[period] + 1 if tokens[place - period] == token else 0
            if repeated[period] >= (LOOP_TIMES - 1) * period:
                return place + 1
    return len(tokens)


def distinct_share(outputs: Sequence[Sequence[int]]) -> float:
    """Different runs of GRAM_TOKENS tokens of all such runs, each output by itself."""
    grams = [[tuple(each[i : i + GRAM_TOKENS]) for i in range(len(each) - GRAM_TOKENS + 1)] for each in outputs]
    return sum(len(set(each)) for each in grams) / max(sum(map(len, grams)), 1)


class Bench:
    """Runs workloads on one engine and prints a table of each."""

    def __init__(self, options: SpeculateBenchOptions, console: Console) -> None:
        """Raises StartupError for a model that cannot be served, or an unknown workload."""
        self.names = chosen(options.workloads, tuple(TITLES))
        self.batches = sizes(options.batches)
        self._options = options
        self._console = console
        tokenizer = load_tokenizer(options.model)
        self._texts = Texts(tokenizer)
        self._loads = {name: LOADS[name](self._texts) for name in LOADS}
        longest = max(len(prompt) for load in self._loads.values() for prompt in load.prompts)
        # Room for all prompts, however few run at once: where the prefix cache has them for one arm and not for
        # another, rounding makes outputs part that speculation leaves alone.
        self.engine = SpeculatingEngine(
            ModelOptions(model=options.model, load_format=options.load_format, dtype=options.dtype), tokenizer,
            context_tokens=longest + options.tokens + 1, rows_max=PROMPTS, drafts_max=options.drafts_max,
        )  # fmt: skip

    def measure(self, name: str) -> bool:
        """Measure a workload and print it; whether it meets its targets."""
        load = self._loads.get(name, self._loads["chat"])
        pairs = self._options.pairs or (PAIRS_OF_CHAT if name == "chat" else PAIRS)
        case = self._prepared(name, load, min(PROMPTS, pairs * max(self.batches)))
        table = Table(box=None, pad_edge=False)
        for column in ("batch", "arm", "tokens/s", "ratio", "95 %", "processor", "tokens\na step", "outputs", "target"):
            table.add_column(column, justify="left" if column in ("arm", "outputs") else "right", no_wrap=True)
        is_met, sources = True, []
        for batch in self.batches:
            figures = self._rounds(case, batch, pairs)
            for number, arm in enumerate(case.arms):
                text, met = goal(case, batch, number, figures)
                add_row(table, batch, arm, figures[number], text if met else f"[red]{text}")
                is_met = is_met and met
                if arm.speculate:
                    sources.append(f"  batch {batch}, {arm.name}: {figures[number].sources() or 'nothing was drafted'}")
        self._console.print(table)
        self._console.print("drafts accepted/offered", *sources, sep="\n", highlight=False)
        return is_met

    def record(self, name: str) -> tuple[RecordedAnswer, ...]:
        """Let the model answer all prompts of a workload and look up drafts, with its corpus, at each place."""
        case = self._prepared(name, self._loads.get(name, self._loads["chat"]), PROMPTS)
        corpora = case.arms[-1].corpora
        answers = tuple(
            recorded(self.engine.shelf, corpora, prompt, answer, self._options.drafts_max)
            for prompt, answer in zip(case.prompts, case.answers, strict=True)
        )
        offered, accepted = sum(sum(each.offered) for each in answers), sum(sum(each.accepted) for each in answers)
        self._console.print(f"{len(answers)} answers recorded, {accepted:,} of {offered:,} drafts right.")
        return answers

    def _prepared(self, name: str, load: Load, count: int) -> Case:
        """Let the model answer without speculation, cut its answers, and put the corpora of the workload there."""
        prompts = load.prompts[:count]
        most = self._options.tokens
        outputs: list[list[int]] = []
        for first in range(0, count, max(self.batches)):
            some = prompts[first : first + max(self.batches)]
            outputs += self.engine.run(OFF, some, [most] * len(some), load.stop).outputs
        cut = [output[: loop_end(output)] if self._options.loops == "cut" else output for output in outputs]
        kept = [number for number, output in enumerate(cut) if len(output) >= LENGTH_MIN]
        self._console.print(f"\n[bold]{TITLES[name]}")
        tell_answers(self._console, load, prompts, outputs, cut)
        if not kept:
            raise StartupError(f"no answer of {name!r} has {LENGTH_MIN} tokens before it loops: give another model")
        arms = self._arms(name, load, cut)
        return Case(name, [prompts[i] for i in kept], [cut[i] for i in kept], arms)

    def _arms(self, name: str, load: Load, answers: Sequence[Sequence[int]]) -> list[Arm]:
        """The ways to run a workload, with its corpora put on the shelf."""
        if name not in ("earlier", "distracted"):
            self.engine.put(name, load.documents)
            return [OFF, SEQUENCE, Arm("+ corpus", speculate=True, corpora=(name,))]
        self.engine.put("earlier", [np.array(answer, np.int32) for answer in answers])
        if name == "earlier":
            return [OFF, SEQUENCE, Arm("+ corpus", speculate=True, corpora=("earlier",))]
        others = [f"distractor-{number:02}" for number in range(DISTRACTORS)]
        for corpus_id, documents in zip(others, self._texts.distractors(), strict=True):
            self.engine.put(corpus_id, documents)
        among = [Arm(f"among {count}", speculate=True, corpora=("earlier", *others[:count])) for count in AMONG]
        return [OFF, Arm("alone", speculate=True, corpora=("earlier",)), *among]

    def _rounds(self, case: Case, batch: int, pairs: int) -> list[Figures]:
        """Run every arm in every round; figures by arm."""
        figures = [Figures() for _ in case.arms]
        for number in range(pairs):
            chosen_prompts = [(number * batch + i) % len(case.prompts) for i in range(batch)]
            prompts = [case.prompts[i] for i in chosen_prompts]
            lengths = [len(case.answers[i]) for i in chosen_prompts]
            order = list(range(len(case.arms)))[:: 1 if number % 2 == 0 else -1]
            runs = {arm: self.engine.run(case.arms[arm], prompts, lengths) for arm in order}
            for arm, of_arm in enumerate(figures):
                self._note(of_arm, runs[0], runs[arm], prompts)
        return figures

    def _note(self, figures: Figures, off: Run, run: Run, prompts: Sequence[Sequence[int]]) -> None:
        """Add a run to its arm's figures, beside the one without speculation in the same round."""
        figures.runs.append(run)
        figures.ratios.append(run.rate / off.rate)
        figures.processor_ratios.append(run.tokens / run.processor_s / (off.tokens / off.processor_s))
        for prompt, one, other in zip(prompts, off.outputs, run.outputs, strict=True):
            if one != other:
                figures.differing += 1
                figures.margin = max(figures.margin, self.engine.margin(prompt, one, other))


def tell_answers(
    console: Console, load: Load, prompts: list[list[int]], whole: list[list[int]], cut: list[list[int]]
) -> None:
    """Say what the prompts are, and what became of their answers by cutting loops off."""
    looped = sum(len(short) < len(long) for short, long in zip(cut, whole, strict=True))
    console.print(
        f"{len(prompts)} prompts of {min(map(len, prompts))} to {max(map(len, prompts))} tokens; begun for the model: "
        f"{load.begun_for_it or 'nothing'}. {looped} answers end in a loop."
    )
    for name, answers in (("as they came", whole), ("without loops", cut)):
        tokens, share = sum(map(len, answers)), distinct_share(answers)
        console.print(f"Answers {name}: {tokens:,} tokens, {share:.2f} of their {GRAM_TOKENS}-grams distinct.")


def goal(case: Case, batch: int, arm: int, figures: Sequence[Figures]) -> tuple[str, bool]:
    """(the target of an arm, whether it is met); outputs have to be equal, or to differ at near ties, everywhere."""
    mine = figures[arm]
    is_exact = mine.margin <= MARGIN_MAX
    is_whole = arm == len(case.arms) - 1
    if case.name in RATIO_MIN and batch == 1 and is_whole:
        least = RATIO_MIN[case.name]
        return f"ratio ≥ {least:g}", is_exact and float(np.median(mine.ratios)) >= least
    if case.name == "chat" and arm > 0:
        return f"interval reaches {LOSS_MAX_RATIO:g}", is_exact and mine.interval[1] >= LOSS_MAX_RATIO
    if case.name == "earlier" and batch == 1 and is_whole:
        reached = mine.tokens_a_step / figures[1].tokens_a_step
        return f"{reached:.2f}, ≥ {EARLIER_MIN:g} × tokens a step", is_exact and reached >= EARLIER_MIN
    if case.name == "distracted" and arm > 1:
        reached = mine.tokens_a_step / figures[1].tokens_a_step
        return f"{reached:.3f}, ≥ {DISTRACTED_MIN:g} × alone", is_exact and reached >= DISTRACTED_MIN
    return "", is_exact


def add_row(table: Table, batch: int, arm: Arm, figures: Figures, target: str) -> None:
    """An arm as a line of the table."""
    rate = float(np.median([run.rate for run in figures.runs]))
    low, high = figures.interval
    equal = f"{figures.differing} differ, margin ≤ {figures.margin:.1g}" if figures.differing else "equal"
    ratio = (f"{np.median(figures.ratios):.2f}", f"{low:.2f}–{high:.2f}", f"{np.median(figures.processor_ratios):.2f}")
    if not arm.speculate:
        ratio, equal = ("", "", ""), ""
    table.add_row(str(batch), arm.name, f"{rate:.1f}", *ratio, f"{figures.tokens_a_step:.2f}", equal, target)


def chosen(text: str, known: Sequence[str]) -> list[str]:
    """Names with commas between. Raises StartupError for one that is not known."""
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in known:
            raise StartupError(f"--workloads: {name!r} is none of {', '.join(known)}")
    return names


def sizes(text: str) -> list[int]:
    """Batch sizes with commas between. Raises StartupError for what is none."""
    words = [word.strip() for word in text.split(",")]
    for word in words:
        if not word.isdecimal() or not 1 <= int(word) <= PROMPTS:
            raise StartupError(f"--batches: {word!r} is no number from 1 to {PROMPTS}")
    return [int(word) for word in words]


def measure_speculation(options: SpeculateBenchOptions) -> int:
    """Measure and print; 0 if all targets are met, else 1. Raises StartupError."""
    console = Console(width=COLUMNS)
    if options.record is not None and options.drafts_max > DRAFTS_MAX:
        raise StartupError(f"--record: at most {DRAFTS_MAX} drafts a place are recorded; lower --drafts-max")
    bench = Bench(options, console)
    try:
        ready = bench.engine.ready
        table = ", ".join(f"{tokens}: {ms:.1f}" for tokens, ms in bench.engine.step_ms)
        console.print(
            f"{ready.model_name}, {ready.dtype} on {ready.device}; at most {options.drafts_max} drafts a step. "
            f"Step times by tokens, ms: {table or 'not measured'}."
        )
        if options.record is not None:
            answers = {name: bench.record(name) for name in bench.names}
            Recording(f"{ready.model_name}, {ready.dtype}", options.drafts_max, answers).write(Path(options.record))
            return 0
        met = [bench.measure(name) for name in bench.names]
    finally:
        bench.engine.close()
    console.print("[green]met" if all(met) else "[red]missed")
    return 0 if all(met) else 1

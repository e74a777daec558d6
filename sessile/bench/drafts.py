"""`sessile bench drafts`: how good drafts are and what they cost, on Python source and without a model.

The text is what this environment has: the standard library and the installed packages, tokenised by the default model's
tokenizer. Files are taken in the order of a hash of their paths, first those of the corpus, then those that are held
out: a held-out file plays the model's output, from its first token on, and a draft is accepted where it is what the
file says. Near-copies are left out: files of which more than NEAR_COPY_SHARE of all runs of SHINGLE_TOKENS tokens occur
in the corpus too. Figures of time are medians; tokens a step depend on the files alone.
"""

import dataclasses
import hashlib
import sysconfig
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

from sessile.contract.drafting import DraftWish
from sessile.draft.corpus_index import CorpusIndex
from sessile.draft.drafter import LookupDrafter, LookupLine
from sessile.draft.merge import DraftRules
from sessile.draft.pace import StepTimes
from sessile.draft.shelf import Shelf
from sessile.errors import StartupError
from sessile.options import option
from sessile.text.load import load_tokenizer

Ints = npt.NDArray[np.int32]

FILE_BYTES_MIN, FILE_BYTES_MAX = 2_000, 200_000
"""Shorter files have nothing to say, longer ones are mostly tables."""
FILE_TOKENS_MAX = 4_000
"""Of a held-out file, from its start, so that one long file does not decide."""
SHINGLE_TOKENS = 16
NEAR_COPY_SHARE = 0.25
STEP_TIMES = StepTimes((1, 1024), (1_000_000, 1_000_001))
"""Of a device for which a token more costs nothing: here only what is drafted counts."""
DISTRACTORS = (0, 1, 2, 4, 64)
CORPORA_AT_ONCE = 4
CHAIN_MIN, BUILD_MIN, TOKEN_BYTES_MAX, DISTRACTED_MIN = 1.78, 0.8e6, 10.0, 0.95
SEARCH_MAX_US, DRAFT_MAX_US, ROWS_MAX_MS = 8.0, 30.0, 2.0
"""Targets, at the default size."""

SWEEP: dict[str, Sequence[Any]] = {
    "occurrences": (4, 8, 16, 32, 64),
    "match_cap": (2, 4, 8, 12, 16, 24),
    "session_prior": (1, 2, 4, 8, 16, 32),
    "window": (0, 1, 2, 4, 8),
    "decay": (1.0, 0.97, 0.9, 0.8),
    "share_min": (0.0, 0.05, 0.1, 0.2, 0.4),
    "factor": (1.0, 2.0, 4.0, 8.0, 64.0),
}
"""Values of each rule to try, the others as they are by default."""


@dataclass(frozen=True)
class DraftBenchOptions:
    """What to measure."""

    corpus_tokens: int = option(5_000_000, "Tokens of the corpus, about.", unit="tokens", low=1_000)
    held_out_tokens: int = option(150_000, "Tokens that are held out, about.", unit="tokens", low=100)
    drafts_max: int = option(11, "Most drafts a step.", unit="drafts", low=1, high=64)
    rows: int = option(64, "Rows that draft at once.", unit="rows", low=1, high=1024)
    rounds: int = option(100, "Steps of all rows at once that are timed.", unit="steps", low=3)
    threads: int = option(2, "Threads that build and look up.", unit="threads", low=1, high=64)
    sweep: str = option("off", "Try other values of each rule of drafting, too.", choices=("on", "off"))


@dataclass(frozen=True, slots=True)
class Source:
    """A file: the package it belongs to, and its tokens."""

    package: str
    tokens: Ints


@dataclass
class Tally:
    """What drafting came to over some texts."""

    steps: int = 0
    emitted: int = 0
    offered: int = 0

    @property
    def tokens_a_step(self) -> float:
        """Tokens emitted a step; 1 without drafts."""
        return self.emitted / self.steps

    @property
    def accept_rate(self) -> float:
        """Share of offered drafts that were accepted."""
        return (self.emitted - self.steps) / max(self.offered, 1)


def python_sources() -> Iterator[Source]:
    """Files of this environment, tokenised, in the order of a hash of their paths; no file twice."""
    tokenizer = load_tokenizer("default")
    paths = [
        (root, path)
        for root in (Path(sysconfig.get_path("stdlib")), Path(sysconfig.get_path("purelib")))
        for path in root.rglob("*.py")
        if root.name == "site-packages" or "site-packages" not in path.parts
    ]
    paths.sort(key=lambda each: hashlib.sha256(str(each[1].relative_to(each[0])).encode()).digest())
    seen: set[bytes] = set()
    for root, path in paths:
        source = path.read_bytes()
        digest = hashlib.sha256(source).digest()
        if FILE_BYTES_MIN <= len(source) <= FILE_BYTES_MAX and digest not in seen:
            seen.add(digest)
            text = source.decode(errors="replace")
            tokens = np.array(tokenizer.encode(text, add_special_tokens=False), np.int32)
            yield Source(path.relative_to(root).parts[0], tokens)


def shingles(tokens: Ints) -> npt.NDArray[np.uint64]:
    """A hash of each run of SHINGLE_TOKENS tokens."""
    runs = np.zeros(max(len(tokens) - SHINGLE_TOKENS + 1, 0), np.uint64)
    for offset in range(SHINGLE_TOKENS):
        here = tokens[offset : offset + len(runs)].astype(np.uint64)
        runs = runs * np.uint64(1_000_003) ^ here * np.uint64(0x9E3779B97F4A7C15)
    return runs


def without_near_copies(candidates: Sequence[Source], corpus: Sequence[Source]) -> list[Source]:
    """The candidates that say mostly what the corpus does not."""
    known = np.sort(np.concatenate([shingles(source.tokens) for source in corpus]))
    kept = []
    for source in candidates:
        runs = shingles(source.tokens)
        spots = np.minimum(np.searchsorted(known, runs), len(known) - 1)
        if len(runs) and np.mean(known[spots] == runs) <= NEAR_COPY_SHARE:
            kept.append(source)
    return kept


def gathered(options: DraftBenchOptions) -> tuple[list[Source], list[Source], int]:
    """(corpus, held out, how many near-copies were left out)"""
    corpus: list[Source] = []
    rest: list[Source] = []
    tokens = held_out = 0
    for source in python_sources():
        if tokens < options.corpus_tokens:
            corpus.append(source)
            tokens += len(source.tokens)
        elif held_out < 1.3 * options.held_out_tokens:
            rest.append(source)
            held_out += min(len(source.tokens), FILE_TOKENS_MAX)
        else:
            break
    kept = without_near_copies(rest, corpus)
    if tokens < options.corpus_tokens or not kept:
        raise StartupError(f"this environment has {tokens:,} tokens of Python source: give a smaller --corpus-tokens")
    return corpus, kept, len(rest) - len(kept)


def drafter_over(corpora: Sequence[CorpusIndex], threads: int = 1, rules: DraftRules | None = None) -> LookupDrafter:
    """A drafter with these corpora for everybody."""
    shelf = Shelf()
    for number, index in enumerate(corpora):
        shelf.put("", f"corpus-{number:03}", index)
    return LookupDrafter(shelf, STEP_TIMES, rules=rules, threads=threads)


def drafted(drafter: LookupDrafter, texts: Sequence[Ints], drafts_max: int) -> Tally:
    """Let each text be the output of a model that is helped by the drafter."""
    tally = Tally()
    for text in texts:
        tokens = text[:FILE_TOKENS_MAX].tolist()
        line = drafter.start(drafter.new_index(), DraftWish("", None, drafts_max))
        line.index.extend(text[:1].tobytes())
        known = 1
        while known < len(tokens):
            drafts = drafter.draft([line], [drafts_max])[0]
            accepted = 0
            for draft, token in zip(drafts, tokens[known:], strict=False):
                if draft != token:
                    break
                accepted += 1
            drafter.settled(line, accepted)
            emitted = min(accepted + 1, len(tokens) - known)
            line.index.extend(text[known : known + emitted].tobytes())
            known += emitted
            tally = Tally(tally.steps + 1, tally.emitted + emitted, tally.offered + len(drafts))
    return tally


@dataclass(frozen=True, slots=True)
class Taken:
    """Median times of a call in µs: by the clock, and of the processor, which a busy machine does not stretch."""

    wall_us: float
    processor_us: float


def median_of(call: Callable[[int], object], times: int, between: Callable[[int], object] = int) -> Taken:
    """Of call(0), call(1) …; `between` is called after each and not timed; the first tenth is not counted."""
    taken_ns = np.empty((times, 2))
    for number in range(times):
        started_ns = time.perf_counter_ns(), time.process_time_ns()
        call(number)
        taken_ns[number] = time.perf_counter_ns() - started_ns[0], time.process_time_ns() - started_ns[1]
        between(number)
    wall_ns, processor_ns = np.median(taken_ns[times // 10 :], axis=0)
    return Taken(float(wall_ns) / 1e3, float(processor_ns) / 1e3)


def measure_quality(table: Table, index: CorpusIndex, texts: Sequence[Ints], options: DraftBenchOptions) -> bool:
    """Tokens a step with the sequence alone, the corpus alone, both; whether a chain reaches its target."""
    chain = Tally()
    for name, corpora, rules in (
        ("nothing but the sequence", [], DraftRules()),
        ("sequence and corpus", [index], DraftRules()),
    ):
        chain = drafted(drafter_over(corpora, rules=rules), texts, options.drafts_max)
        target = f"≥ {CHAIN_MIN}" if corpora else ""
        table.add_row(f"tokens a step, {name}", f"{chain.tokens_a_step:.3f}", "", target)
        table.add_row("  share of drafts accepted", f"{chain.accept_rate:.2f}", "", "")
    return chain.tokens_a_step >= CHAIN_MIN


def measure_cost(
    table: Table, index: CorpusIndex, build: Taken, texts: Sequence[Ints], options: DraftBenchOptions
) -> bool:
    """Build, memory, one draft, and many rows with several corpora; whether all keep to their targets."""
    drafter = drafter_over([index])
    text = np.concatenate(texts)
    lines = standing_lines(drafter, text, 1000, options.drafts_max)
    lines_searched = len(lines)
    search = median_of(lambda _: drafter.matches(lines), 11)
    look = median_of(lambda i: drafter.limits([lines[i]], [options.drafts_max], 1), len(lines))
    draft = median_of(lambda i: drafter.draft([lines[i]], [options.drafts_max]), len(lines))
    search_us = search.wall_us / lines_searched
    rate, size = 1e6 * index.tokens / build.wall_us, index.resident_bytes / index.tokens
    processor_rate = index.tokens / build.processor_us
    table.add_row("build, million tokens/s", f"{rate / 1e6:.2f}", f"{processor_rate:.2f}", f"≥ {BUILD_MIN / 1e6:g}")
    table.add_row("bytes a token", f"{size:.2f}", "", f"≤ {TOKEN_BYTES_MAX:g}")
    name = f"search, {lines_searched:,} at once, µs each"
    table.add_row(name, f"{search_us:.1f}", f"{search.processor_us / lines_searched:.1f}", f"≤ {SEARCH_MAX_US:g}")
    table.add_row("limits of one line, p50, µs", f"{look.wall_us:.1f}", f"{look.processor_us:.1f}", "")
    name = "drafts of one line, p50, µs"
    table.add_row(name, f"{draft.wall_us:.1f}", f"{draft.processor_us:.1f}", f"≤ {DRAFT_MAX_US:g}")
    is_fast = rate >= BUILD_MIN and search_us <= SEARCH_MAX_US and draft.wall_us <= DRAFT_MAX_US
    return is_fast and size <= TOKEN_BYTES_MAX


def standing_lines(drafter: LookupDrafter, text: Ints, count: int, drafts_max: int) -> list[LookupLine]:
    """Lines whose sequences end at as many places all over the text, each at most 2,000 tokens long."""
    lines = []
    for end in np.linspace(min(2_000, len(text) // 2), len(text), count, dtype=np.int64).tolist():
        line = drafter.start(drafter.new_index(), DraftWish("", None, drafts_max))
        line.index.extend(text[max(end - 2_000, 0) : end].tobytes())
        lines.append(line)
    return lines


def measure_rows(table: Table, corpus: Sequence[Source], texts: Sequence[Ints], options: DraftBenchOptions) -> bool:
    """A step of many rows over several corpora that are the corpus in pieces; whether it keeps to its target."""
    pieces = [[source.tokens for source in corpus[i::CORPORA_AT_ONCE]] for i in range(CORPORA_AT_ONCE)]
    drafter = drafter_over([CorpusIndex.build(piece) for piece in pieces], options.threads)
    text = np.concatenate(texts)
    lines = standing_lines(drafter, text, options.rows, options.drafts_max)
    fresh = np.resize(text, (options.rounds, options.rows, 2))
    caps = [options.drafts_max] * len(lines)

    def go_on(number: int) -> None:
        for line, new in zip(lines, fresh[number], strict=True):
            drafter.settled(line, 0)
            line.index.extend(new.tobytes())

    step = median_of(lambda _: drafter.draft(lines, caps), options.rounds, go_on)
    drafter.close()
    name = f"{options.rows} rows × {CORPORA_AT_ONCE} corpora, p50, ms"
    table.add_row(name, f"{step.wall_us / 1e3:.2f}", f"{step.processor_us / 1e3:.2f}", f"≤ {ROWS_MAX_MS:g}")
    return step.wall_us <= 1e3 * ROWS_MAX_MS


def measure_distractors(table: Table, corpus: Sequence[Source], options: DraftBenchOptions) -> bool:
    """Files of one package against the rest of it, among corpora of the other packages; whether they distract."""
    sizes: dict[str, int] = {}
    for source in corpus:
        sizes[source.package] = sizes.get(source.package, 0) + len(source.tokens)
    package = max(sorted(sizes), key=lambda name: sizes[name])
    own = [source for source in corpus if source.package == package]
    others = [source for source in corpus if source.package != package]
    held_out, matching = own[: len(own) // 5 or 1], own[len(own) // 5 or 1 :] or own
    texts = [source.tokens for source in without_near_copies(held_out, matching)] or [own[0].tokens]
    total, kept = 0, []
    for text in texts:
        if total < options.held_out_tokens // 2:
            kept.append(text)
            total += min(len(text), FILE_TOKENS_MAX)
    indexes = [CorpusIndex.build([source.tokens for source in matching])]
    count = max(DISTRACTORS)
    # Corpora of several sizes, down to a few files; one with nothing in it would be no distractor.
    pieces = [others[i::count] for i in range(count)]
    indexes += [CorpusIndex.build([source.tokens for source in piece]) for piece in pieces if piece]
    alone, met = 0.0, True
    for number in DISTRACTORS:
        reached = drafted(drafter_over(indexes[: 1 + number]), kept, options.drafts_max).tokens_a_step
        alone = alone or reached
        met = met and reached >= DISTRACTED_MIN * alone
        name = f"tokens a step in {package}, {number} distractors" if number else f"tokens a step in {package}, alone"
        table.add_row(name, f"{reached:.3f}", "", f"≥ {DISTRACTED_MIN * alone:.3f}" if number else "")
    return met


def measure_sweep(console: Console, index: CorpusIndex, texts: Sequence[Ints], drafts_max: int) -> None:
    """Tokens a step for each value of each rule, the others as they are by default."""
    table = Table("rule", "value", "tokens a step", "drafts accepted", box=None, pad_edge=False)
    for rule, values in SWEEP.items():
        for value in values:
            rules = dataclasses.replace(DraftRules(), **{rule: value})
            tally = drafted(drafter_over([index], rules=rules), texts, drafts_max)
            is_default = value == getattr(DraftRules(), rule)
            table.add_row(
                rule, f"{value:g}{' *' if is_default else ''}", f"{tally.tokens_a_step:.3f}", f"{tally.accept_rate:.2f}"
            )
    console.print(table)


def measure_drafts(options: DraftBenchOptions) -> int:
    """Measure and print; 0 if all targets are met, else 1."""
    console = Console()
    with console.status("tokenising Python source"):
        corpus, held_out, copies = gathered(options)
    texts = [source.tokens for source in held_out]
    documents = [source.tokens for source in corpus]
    drafter_over([]).prepare()
    CorpusIndex.build(documents[:1], threads=options.threads)  # compiles what is measured next
    built: list[CorpusIndex] = []
    build = median_of(lambda _: built.append(CorpusIndex.build(documents, threads=options.threads)), 1)
    index = built[0]
    tokens = sum(min(len(text), FILE_TOKENS_MAX) for text in texts)
    console.print(
        f"{index.tokens:,} tokens in {index.documents:,} files; {tokens:,} tokens of {len(texts)} files held out, "
        f"{copies} near-copies left out; at most {options.drafts_max} drafts, {options.threads} threads."
    )
    table = Table("", "measured", "processor", "target", box=None, pad_edge=False)
    met = measure_quality(table, index, texts, options)
    met &= measure_cost(table, index, build, texts, options)
    met &= measure_rows(table, corpus, texts, options)
    met &= measure_distractors(table, corpus, options)
    console.print(table)
    if options.sweep == "on":
        measure_sweep(console, index, texts, options.drafts_max)
    console.print("[green]met" if met else "[red]missed")
    return 0 if met else 1

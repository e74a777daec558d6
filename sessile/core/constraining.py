"""Outputs that follow a grammar: what a request brings, and the masks of a step.

A mask follows from all tokens before it, so a row with a grammar that decodes makes the plan late, as drafts do: its
masks are filled when the step in flight has settled. Drafts that the grammar forbids are cut before they are verified.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sessile.contract.grammar import GrammarLine
from sessile.contract.messages import Submit
from sessile.contract.plan import Ints
from sessile.core.books import Books
from sessile.core.marks import Mark
from sessile.core.planned import PromptPart
from sessile.core.request import Request
from sessile.core.rows import Column
from sessile.errors import InvalidRequest


def constraint_of(books: Books, message: Submit) -> GrammarLine | None:
    """The grammar that a message brings, at its start. Raises UserError, with nothing changed."""
    grammar = message.grammar
    if grammar is None:
        return None
    field = grammar.field or grammar.kind
    if books.grammars is None:
        raise InvalidRequest(f"{field}: this engine follows no grammars", param=field)
    if not books.facts.eos_ids:
        raise InvalidRequest(f"{field}: the model has no end-of-sequence token, which ends a grammar", param=field)
    # Both would have an output go on where its grammar must end.
    for name, asked in (
        ("ignore_eos", message.sampling.ignore_eos), ("min_new_tokens", message.sampling.min_new_tokens > 0)
    ):  # fmt: skip
        if asked:
            raise InvalidRequest(f"{name}: where the output ends is for its {field} to say; leave it out", param=name)
    return books.grammars.start(grammar)


def are_any(books: Books, decodes: Column) -> bool:
    """Whether any of these rows has a grammar."""
    rows = books.rows
    return rows.constraints_wanted and bool(np.count_nonzero(rows.constrained[decodes]))


@dataclass(frozen=True, slots=True)
class Masks:
    """What grammars leave of a step: drafts by decoding row int64[d], all drafts end to end, and masks.

    words int32[k, words]: those of decoding rows, place by place, then one for each prompt in `parts` that samples.
    """

    counts: Column
    drafts: Column
    decodes: list[int]
    """Indices of the decoding rows that have masks."""
    parts: list[int]
    """Indices of the prompts that have one."""
    words: Ints

    def queries(self, parts: Sequence[PromptPart]) -> Ints:
        """The places of the masks, as indices into the step's tokens: those of decoding rows, then of `parts`."""
        sizes = 1 + self.counts
        firsts = (sizes.cumsum() - sizes).tolist()
        counts = self.counts.tolist()
        places = [place for i in self.decodes for place in range(firsts[i], firsts[i] + 1 + counts[i])]
        ends = int(sizes.sum()) + np.cumsum([part.count for part in parts])
        places += [int(ends[i]) - 1 for i in self.parts]
        return np.array(places, np.int32)


def constrain(
    books: Books, decodes: Column, counts: Column, drafts: Column, parts: Sequence[PromptPart]
) -> Masks | None:
    """Cut the drafts of rows with a grammar to what it allows, and fill their masks; None if no row has one.

    counts int64[d], drafts int64[sum counts]: proposed for the decoding rows. All that they have emitted has settled.
    """
    rows = books.rows
    if not rows.constraints_wanted:
        return None
    indices = rows.constrained[decodes].nonzero()[0].tolist()
    sampled = [i for i, part in enumerate(parts) if part.samples and part.request.constraint is not None]
    if not indices and not sampled:
        return None
    requests = [rows.occupant(row) for row in decodes[indices].tolist()] + [parts[i].request for i in sampled]
    lines = [_caught_up(books, request) for request in requests]
    ends = counts.cumsum()
    proposed = [drafts[int(ends[i] - counts[i]) : int(ends[i])].tolist() for i in indices]
    assert books.grammars is not None
    allowed, words = books.grammars.masks(lines, proposed + [[] for _ in sampled])
    for request, line in zip(requests, lines, strict=True):
        if line.failure:
            assert request.row is not None
            # Its masks mean nothing. It ends when the step settles: no step may take its row for a plain one then.
            rows.make_slow(request.row)
            books.marks[Mark.STRAYED] += 1
    if len(drafts):
        counts, drafts = _cut(books, decodes, counts, drafts, dict(zip(indices, allowed, strict=False)))
    return Masks(counts, drafts, indices, sampled, words)


def _caught_up(books: Books, request: Request) -> GrammarLine:
    """The line of a running request, told all output that has settled."""
    line = request.constraint
    assert line is not None
    books.collect_output(request)
    if line.tokens < request.output_tokens:
        line.extend(request.output[line.tokens :])
    assert line.tokens == request.output_tokens, "a grammar was told other tokens than were emitted"
    return line


def _cut(
    books: Books, decodes: Column, counts: Column, drafts: Column, allowed: dict[int, int]
) -> tuple[Column, Column]:
    """Drafts without those behind the first that a grammar forbids."""
    kept = counts.copy()
    stays = np.ones(len(drafts), np.bool_)
    ends = counts.cumsum().tolist()
    for index, count in allowed.items():
        proposed = int(counts[index])
        assert 0 <= count <= proposed, "a grammar allowed more drafts than there are"
        if count == proposed:
            continue
        kept[index] = count
        stays[ends[index] - proposed + count : ends[index]] = False
        books.marks[Mark.DRAFTS_FORBIDDEN] += 1
        line = books.rows.occupant(int(decodes[index])).drafts.line
        if not count and books.drafter is not None and line is not None:
            books.drafter.settled(line, 0)  # Nobody will verify them: the drafter is told what came of them here.
    return kept, drafts[stays]

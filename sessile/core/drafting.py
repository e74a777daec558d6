"""Drafts as the core sees them: who holds the index of a sequence, and what a drafter is told and asked.

An index has one holder at every moment. Between turns it is with the session, warm or cold. A request that drafts takes
it over while its prompt is computed, or else when it is first asked for, and hands it back at its end, cut to what the
session's history is then; a plain request begins an index of its own and drops it. It is told nothing but settled
tokens: what a request begins with when it is taken over, the rest right before it is asked. So it may lag behind its
sequence, and is never ahead of it.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from sessile.contract.drafting import Drafter, DraftLine, DraftWish, SequenceIndex
from sessile.contract.messages import Done, SourceFigures, Submit, with_drafts
from sessile.core.books import Books
from sessile.core.marks import Mark
from sessile.core.planned import NO_ROWS, PromptPart
from sessile.core.request import Drafts, Phase, Request
from sessile.core.rows import Column, RowTable, row_by_row
from sessile.core.session import Session
from sessile.core.tenants import Tenant
from sessile.errors import InvalidRequest

_NO_WISH = DraftWish("", None, 0)
UNDRAFTED_TOKENS = 2
"""Of a request's output: the first comes with its prompt, and the last needs no successor."""


def drafts_of(books: Books, message: Submit, tenant: Tenant) -> Drafts:
    """What a message allows, as far as this engine drafts. Raises UserError, with nothing changed."""
    drafter, name = books.drafter, tenant.policy.name
    if message.remember and name and not tenant.policy.remembers:
        raise InvalidRequest("remember: this key keeps no history of its requests", param="remember")
    if drafter is None:
        for field, asked in (
            ("speculate", message.speculate), ("corpora", message.corpora is not None), ("remember", message.remember)
        ):  # fmt: skip
            if asked:
                raise InvalidRequest(
                    f"{field}: this server looks up no drafts; it has to be started with --speculate", param=field
                )
        return Drafts(_NO_WISH)
    most = books.limits.drafts_max if message.drafts_max < 0 else min(message.drafts_max, books.limits.drafts_max)
    wish = DraftWish(name, message.corpora, 0 if message.speculate is False else most)
    if message.corpora:
        drafter.check(wish)
    return Drafts(wish, message.remember)


def _line_of(books: Books, request: Request) -> DraftLine:
    """The line of a running request that may draft; with the first call its sequence's index comes to it."""
    drafts, drafter = request.drafts, books.drafter
    if drafts.line is None:
        assert drafter is not None and drafts.wish.drafts_max, f"request {request.key} may not draft"
        drafts.line = drafter.start(_taken_index(drafter, request.session), drafts.wish)
    return drafts.line


def _lines_of(books: Books, running: Column) -> list[DraftLine]:
    rows = books.rows
    return [_line_of(books, rows.occupant(row)) for row in running.tolist()]


def _taken_index(drafter: Drafter, session: Session | None) -> SequenceIndex:
    """A session's index, out of its hands; a branch's first one is a fork of that of the turn it goes on from."""
    if session is None:
        return drafter.new_index()
    index, session.index = session.index, None
    if index is not None:
        return index
    parent = session.parent
    if parent is None or parent.index is None:
        return drafter.new_index()
    # Forked only now: most branches may never draft, and a finished turn's history does not change.
    return parent.index.fork(min(parent.index.tokens, session.base_tokens))


def end_line(books: Books, request: Request, done: Done) -> Done:
    """A request that has a line ends: its session gets the index back, cut to the history that is left.

    Returns its Done with what drafts did for it.
    """
    drafts, session = request.drafts, request.session
    line, drafts.line = drafts.line, None
    assert line is not None
    if session is not None:
        session.index = line.index
        session.cut_index()
    sources = [SourceFigures(use.source, use.drafts_offered, use.drafts_accepted) for use in line.uses()]
    for use in sources:
        offered, accepted = books.totals.sources.get(use.source, (0, 0))
        books.totals.sources[use.source] = offered + use.drafts_offered, accepted + use.drafts_accepted
    return with_drafts(done, drafts.offered, drafts.accepted, sources)


def caught_up(books: Books, decodes: Column, which: Column, known: Column) -> list[DraftLine]:
    """The lines of the running rows decodes[which], their indexes told all tokens that have settled.

    which int64[d]: in ascending order. known [d]: of each of these rows.
    """
    drafter, rows = books.drafter, books.rows
    assert drafter is not None
    asked = decodes[which]
    lines = _lines_of(books, asked)
    behind = known - np.array([line.index.tokens for line in lines], np.int64)
    noted = rows.newest_noted(decodes, which, behind)
    if noted is not None:
        drafter.extend(lines, noted, behind)
        return lines
    gathered = rows.filled[asked]
    for i in (behind > gathered).nonzero()[0].tolist():
        request, index = rows.occupant(int(asked[i])), lines[i].index
        index.extend(request.tokens(index.tokens, request.known_tokens))
    # The audit, not this, says of an index that is ahead of its sequence whose it is.
    newest = np.maximum(np.minimum(behind, gathered), 0)
    if np.count_nonzero(newest):
        drafter.extend(lines, rows.newest(asked, newest), newest)
    return lines


def tell_prompts(books: Books, parts: list[PromptPart]) -> None:
    """Begin the lines of requests whose prompt is being computed, and tell their indexes what they begin with, while
    the device is at it.

    Nobody waits for it then: neither the prompt's step nor the first one that may have drafts.
    """
    for part in parts:
        request = part.request
        known, may_draft = request.known_tokens, request.drafts.wish.drafts_max > 0
        if not may_draft or request.phase is not Phase.RUNNING or request.goal_tokens - known <= UNDRAFTED_TOKENS:
            continue
        index = _line_of(books, request).index
        if index.tokens < known:
            index.extend(request.tokens(index.tokens, known))


def most_drafts(books: Books, decodes: Column, tokens: int) -> Column:
    """The most drafts worth verifying for each decoding row, int64[d], in a step of so many tokens without them.

    Of those in flight maybe none is right: so it may be more than turns out to be left of a request.
    """
    drafter, rows = books.drafter, books.rows
    assert drafter is not None
    known, pending = rows.reached(decodes)
    caps: Column = np.minimum(
        rows.drafts[decodes], most_that_can_follow(rows, decodes, known - 1 + np.minimum(pending, 1))
    )
    asked = caps.nonzero()[0]
    if not len(asked):
        return caps
    caps[asked] = _limits_of(drafter, caught_up(books, decodes, asked, known[asked]), caps[asked].tolist(), tokens)
    return caps


def _limits_of(drafter: Drafter, lines: list[DraftLine], caps: list[int], tokens: int) -> list[int]:
    """What the drafter says of each line, most often nothing but 0."""
    limits = list(drafter.limits(lines, caps, tokens))
    assert len(limits) == len(lines), "a drafter gave limits to other lines than it was asked about"
    if any(limits):
        assert all([0 <= limit <= cap for limit, cap in zip(limits, caps, strict=True)]), (
            f"a drafter's limits {limits} are below 0 or beyond what was asked for: {caps}"
        )
    return limits


class StandingLines:
    """The lines of rows that go on side by side, each a token a step: what stays as it is from ask to ask.

    Asked in vain step after step, they cost a step more than all else that it takes, if everything is looked up anew.
    It holds no line: that is the request's.
    """

    __slots__ = ("_asked", "_books", "_caps", "_decodes", "_is_marked", "_noted", "_noted_told", "_wanted")

    def __init__(self, books: Books, decodes: Column) -> None:
        """decodes: rows of which each is further from its end than the most drafts of a step."""
        self._books = books
        self._decodes = decodes
        self._caps: Column = books.rows.drafts[decodes]
        self._asked = self._caps.nonzero()[0]
        self._wanted: list[int] = self._caps[self._asked].tolist()
        self._noted: list[npt.NDArray[np.int32]] | None = None
        self._noted_told = 0
        """Of so many of the steps that were noted the lines have been told."""
        self._is_marked = False
        """The mark is set once: the simulator wants to know that it came here, and every step does."""

    def most_drafts(self, tokens: int) -> Column:
        """As the function of this name; nothing, if there are none."""
        drafter = self._books.drafter
        assert drafter is not None
        if not self._wanted:
            return NO_ROWS
        limits = _limits_of(drafter, self._caught_up(drafter), self._wanted, tokens)
        if not any(limits):
            return NO_ROWS
        caps = np.zeros_like(self._caps)
        caps[self._asked] = limits
        return caps

    def _caught_up(self, drafter: Drafter) -> list[DraftLine]:
        """The lines, told what has settled since the last time: the tokens of steps that were noted, if that is all."""
        books, rows = self._books, self._books.rows
        noted = rows.noted_steps(self._decodes)
        if noted is None or noted is not self._noted:
            known, _ = rows.reached(self._decodes)
            lines = caught_up(books, self._decodes, self._asked, known[self._asked])
            noted = rows.noted_steps(self._decodes)
        else:
            lines = _lines_of(books, self._decodes[self._asked])
            if fresh := noted[self._noted_told :]:
                tokens = row_by_row(fresh, self._asked)
                drafter.extend(lines, tokens, np.full(len(lines), len(fresh), np.int64))
                if not self._is_marked:
                    self._is_marked = True
                    books.marks[Mark.TOLD_BY_STEP] += 1
        self._noted, self._noted_told = noted, 0 if noted is None else len(noted)
        return lines


def most_that_can_follow(rows: RowTable[Request], decodes: Column, kv_tokens: Column) -> Column:
    """The most drafts that rows with so much KV have a use for: a request's last token needs no successor."""
    most: Column = np.maximum(rows.kv_goal[decodes] - kv_tokens - 1, 0)
    return most


def drafts_for(books: Books, decodes: Column, caps: Column) -> tuple[Column, Column]:
    """(how many drafts each decoding row gets int64[d], all of them end to end int64); every step has settled."""
    drafter, rows = books.drafter, books.rows
    counts = np.zeros(len(decodes), np.int64)
    caps = np.minimum(caps, most_that_can_follow(rows, decodes, rows.settled[decodes]))
    asked = (caps > 0).nonzero()[0]
    if not len(asked):
        return counts, counts[:0]
    assert drafter is not None
    wanted = caps[asked].tolist()
    lines = caught_up(books, decodes, asked, rows.known[decodes[asked]])
    proposed: list[Sequence[int]] = list(drafter.draft(lines, wanted))
    counts[asked] = [len(each) for each in proposed]
    assert len(proposed) == len(lines) and (counts <= caps).all(), "a drafter proposed more than it was asked for"
    drafts = np.array([token for each in proposed for token in each], np.int64)
    assert not len(drafts) or 0 <= drafts.min() <= drafts.max() < books.facts.vocab_size, "a draft is no token"
    return counts, drafts


def judge_drafts(books: Books, request: Request, offered: int, accepted: int) -> None:
    """Of so many drafts of one step so many were accepted and emitted."""
    drafts = request.drafts
    assert books.drafter is not None and drafts.line is not None
    drafts.offered += offered
    drafts.accepted += accepted
    books.totals.drafts_accepted += accepted
    books.drafter.settled(drafts.line, accepted)


def remember(books: Books, request: Request) -> None:
    """Tell the drafter of a request that came to its own end and asked for it: what it brought and what it got."""
    assert books.drafter is not None
    books.drafter.remember(request.tenant.policy.name, request.delta + request.output.tobytes())

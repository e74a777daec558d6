"""Drafts as the core sees them: who holds the index of a sequence, and what a drafter is told and asked.

An index has one holder at every moment. Between turns it is with the session, warm or cold. A request that drafts takes
it over while its prompt is computed, or else when it is first asked for, and hands it back at its end, cut to what the
session's history is then; a plain request begins an index of its own and drops it. It is told nothing but settled
tokens: what a request begins with when it is taken over, the rest right before it is asked. So it may lag behind its
sequence, and is never ahead of it.
"""

from collections.abc import Sequence

import numpy as np

from sessile.contract.drafting import Drafter, DraftLine, DraftWish, SequenceIndex
from sessile.contract.messages import Done, SourceFigures, Submit, with_drafts
from sessile.core.books import Books
from sessile.core.planned import PromptPart
from sessile.core.request import Drafts, Phase, Request
from sessile.core.rows import Column, RowTable
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


def caught_up(books: Books, asked: Column, known: Column) -> list[DraftLine]:
    """The lines of running rows int64[d], their indexes told all tokens that have settled. known [d]: of each row."""
    drafter, rows = books.drafter, books.rows
    assert drafter is not None
    lines = [_line_of(books, rows.occupant(row)) for row in asked.tolist()]
    behind = known - np.array([line.index.tokens for line in lines], np.int64)
    noted = rows.newest_noted(asked, behind)
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
    if len(asked) < len(decodes):
        decodes, known = decodes[asked], known[asked]
    wanted = caps[asked]
    limits = np.array(drafter.limits(caught_up(books, decodes, known), wanted.tolist(), tokens), np.int64)
    assert limits.shape == asked.shape, "a drafter gave limits to other lines than it was asked about"
    assert limits.min() >= 0 and not np.count_nonzero(limits > wanted), "a drafter's limit is beyond what was asked for"
    caps[asked] = limits
    return caps


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
    rows_asked = decodes[asked]
    lines = caught_up(books, rows_asked, rows.known[rows_asked])
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

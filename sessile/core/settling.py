"""What a step's result changes: tokens become facts, KV becomes settled, requests end.

A result is validated whole before anything changes; then rows are applied one by one, each all or nothing. Rows that
only append one token are applied together, as array operations; all others take the long way. Where violations are
contained, a row that cannot be applied costs its request alone (H74).
"""

from collections.abc import Iterable

import numpy as np

from sessile.contract.messages import Scores, TokenDetail
from sessile.contract.plan import Ints, StepResult
from sessile.core.assembly import Flight, scored_range
from sessile.core.books import Books
from sessile.core.containment import drained, guarded
from sessile.core.drafting import judge_drafts
from sessile.core.ending import end_request
from sessile.core.planned import PromptPart
from sessile.core.request import Phase, Request
from sessile.core.rows import ONES, OUTPUT_COLUMNS, Column, Flags, spread
from sessile.core.stop import StopFound
from sessile.errors import PlanError


def settle_step(books: Books, flight: Flight, result: StepResult) -> None:
    """Apply a result to the books. Raises PlanError, with nothing changed, if it does not answer the plan."""
    _validate(flight, result)
    books.settled_step = flight.plan.step
    is_faulty = np.count_nonzero(result.faulty) > 0
    if is_faulty or not flight.is_steady or not _settle_by_note(books, flight, result):
        if flight.is_drafted:
            books.rows.pending[flight.rows] -= flight.counted
        else:
            books.rows.settle_one(flight.sampling)
        _settle_prompts(books, flight, result)
        if is_faulty:
            _settle_others(books, flight, result, range(len(flight.rows)))
        else:
            _settle_plain(books, flight, result)
    for request in books.victims:
        if request.phase is Phase.RUNNING:
            guarded(books, request, books.preempt, request)
    books.victims.clear()
    drained(books)


def _validate(flight: Flight, result: StepResult) -> None:
    plan, allowed, emitted = flight.plan, flight.allowed, result.emitted
    if result.step != plan.step:
        raise PlanError(f"step {plan.step} is due but the device settled step {result.step}")
    same_rows = result.rows is plan.rows or result.rows.tobytes() == plan.rows.tobytes()
    if not same_rows or result.query_counts.tobytes() != plan.query_counts.tobytes():
        raise PlanError(f"step {plan.step}: the device ran other rows or token counts than the plan asked for")
    # Where one token or none is allowed, that many must be emitted; with drafts, from one up.
    exact = emitted.tobytes() == allowed.tobytes()
    if not exact and (np.count_nonzero(emitted > allowed) or np.count_nonzero(emitted < np.minimum(allowed, 1))):
        raise PlanError(f"step {plan.step}: the device emitted token counts that the plan does not allow")
    if (
        len(result.tokens) != (flight.samples if exact and not flight.is_drafted else int(emitted.sum()))
        or len(result.faulty) != len(plan.rows)
        or len(result.score_logprobs) != len(plan.score_queries)
    ):
        raise PlanError(f"step {plan.step}: the result's arrays do not have the plan's lengths")


def _settle_by_note(books: Books, flight: Flight, result: StepResult) -> bool:
    """Have the row table note a step that only appends one token to each row, as most do. Returns whether it is such:
    if not, nothing was settled."""
    rows = books.rows
    if books.limits.audit_level >= 2 and rows.are_plain(flight.sampling):
        assert (rows.live > rows.slow)[flight.rows].all(), "rows were changed without being counted"
    keys = rows.append_once_more(flight.rows, flight.sampling, result.tokens)
    if keys is None:
        return False
    _tell(books, keys, result.tokens)
    return True


def _tell(books: Books, keys: Column, tokens: Ints) -> None:
    """One new token of each request."""
    books.totals.generated_tokens += len(keys)
    books.effects.deltas(keys, ONES[: len(keys)], tokens)


def _settle_prompts(books: Books, flight: Flight, result: StepResult) -> None:
    scores = _score_offsets(flight) if len(result.score_logprobs) else {}
    for index, part in enumerate(flight.parts, flight.decodes):
        # A faulty row's KV is worth nothing: it may be neither kept nor published. Its request ends further down.
        if part.request.phase is Phase.RUNNING and not result.faulty[index]:
            guarded(books, part.request, _settle_prompt, books, part.request, part, result, scores)


def _settle_plain(books: Books, flight: Flight, result: StepResult) -> None:
    """Rows that append one token with nothing to look at but stop tokens and length go together, others one by one.

    Not plain: rows with stop strings, log-probabilities, a least output; a prompt of which one token was left; rows
    whose request has ended. The rows of a step with a faulty row all go the long way.
    """
    rows = books.rows
    plain = rows.live > rows.slow
    plain &= flight.sampling
    if not flight.is_steady:  # What goes on from a token on the device has its prompt behind it.
        plain &= rows.settled >= rows.prompt
    count = int(np.count_nonzero(plain))
    if count == len(flight.rows):
        if flight.is_steady:
            rows.note_plain(flight.sampling)
        _append_one(books, flight.rows, flight.sampling, result.tokens)
        return
    chosen = plain[flight.rows]
    if count:
        if flight.is_drafted:
            tokens = result.tokens[result.emitted.cumsum()[chosen] - 1]
        elif count == flight.samples:
            tokens = result.tokens
        else:
            tokens = result.tokens[chosen[(flight.allowed > 0).nonzero()[0]]]
        _append_one(books, flight.rows[chosen], plain, tokens)
    if flight.is_drafted:
        chosen |= _settle_drafted(books, flight, result)
    if count < flight.samples or flight.is_drafted:
        _settle_others(books, flight, result, (~chosen).nonzero()[0].tolist())


def _settle_drafted(books: Books, flight: Flight, result: StepResult) -> Flags:
    """Rows with drafts that append what was accepted, with nothing more to look at, together. Returns bool[n]: which.

    Not those that end with it: which of their tokens are the last takes a look at each.
    """
    rows, plan = books.rows, flight.plan
    goes_on = rows.live > rows.slow
    goes_on &= rows.settled >= rows.prompt
    handled: Flags = goes_on[flight.rows]
    handled &= plan.draft_counts > 0
    room = np.minimum(rows.kv_goal - rows.known, OUTPUT_COLUMNS - 1 - rows.filled)
    handled &= result.emitted <= room[flight.rows]
    which, _ = spread(result.emitted.astype(np.int64))
    for stops in rows.stops[: rows.stop_columns]:
        handled[which[stops[flight.rows][which] == result.tokens]] = False
    active = flight.rows[handled]
    if not len(active):
        return handled
    emitted, tokens = result.emitted[handled].astype(np.int64), result.tokens[handled[which]]
    settled = plan.starts[handled] + emitted
    rows.append_several(active, emitted, settled, tokens)
    current = rows.last_step[active] == plan.step
    rows.planned[active[current]] = settled[current]
    books.totals.generated_tokens += len(tokens)
    books.effects.deltas(rows.key[active], emitted.astype(np.int32), tokens)
    offered = plan.draft_counts[handled].tolist()
    for row, drafts, accepted in zip(active.tolist(), offered, (emitted - 1).tolist(), strict=True):
        request = rows.occupant(row)
        guarded(books, request, judge_drafts, books, request, drafts, accepted)
    return handled


def _append_one(books: Books, active: Column, plain: Flags, tokens: Ints) -> None:
    """Append one token to each plain row, send them all as one, and end the requests that are complete.

    active [d]: the plain rows in the order of their tokens [d]. plain: the same as bool[rows_max].
    """
    if not len(active):
        return
    rows = books.rows
    rows.append_one(active, plain, tokens)
    _tell(books, rows.key[active], tokens)
    filled = rows.filled[active]
    if np.maximum.reduce(filled) == OUTPUT_COLUMNS:
        # Whoever is half full too: with rows that began at different times every few steps would stop for some.
        for row in active[filled >= OUTPUT_COLUMNS // 2].tolist():
            books.collect_output(rows.occupant(row))
    ended = rows.known > rows.kv_goal
    ended &= plain
    stopped: dict[int, int] = {}
    if rows.stop_columns:
        hit = np.zeros(len(active), np.bool_)
        for stops in rows.stops[: rows.stop_columns]:
            hit |= stops[active] == tokens
        stopped = dict(zip(active[hit].tolist(), tokens[hit].tolist(), strict=True))
        ended[active[hit]] = True
    for row in ended.nonzero()[0].tolist():
        request = rows.occupant(row)
        if row in stopped:
            guarded(books, request, end_request, books, request, "stop", matched=stopped[row])
        else:
            guarded(books, request, end_request, books, request, "length")


def _settle_others(books: Books, flight: Flight, result: StepResult, indices: Iterable[int]) -> None:
    """The long way, row by row, for what is not plain."""
    plan, decodes = flight.plan, flight.decodes
    ends = result.emitted.cumsum().tolist()
    tokens = result.tokens.tolist()
    details = _detail_offsets(plan.logprob_tops, result) if len(result.logprobs) else None
    for index in indices:
        if index < decodes:
            request = books.rows.occupant(int(flight.rows[index]))
        else:
            request = flight.parts[index - decodes].request
        if request.phase is not Phase.RUNNING:
            continue  # It ended while this step was in flight: its tokens were never promised to anybody.
        emitted = tokens[ends[index - 1] if index else 0 : ends[index]]
        detail = details[index] if details else None
        guarded(books, request, _settle_other, books, request, flight, result, index, emitted, detail)


def _settle_other(
    books: Books,
    request: Request,
    flight: Flight,
    result: StepResult,
    index: int,
    emitted: list[int],
    detail: tuple[int, int, int] | None,
) -> None:
    plan = flight.plan
    if result.faulty[index]:
        end_request(books, request, "error", message="the model's output was not finite", status=500)
        return
    if request.constraint is not None and request.constraint.failure:
        # What was sampled followed no grammar, and nobody was told.
        end_request(books, request, "error", message=request.constraint.failure, status=400)
        return
    books.collect_output(request)
    drafts = int(plan.draft_counts[index])
    if index < flight.decodes:
        _settle_decode(books, request, plan.step, int(plan.starts[index]), drafts, len(emitted) - 1)
    if emitted:
        _emit(books, request, emitted, drafts, result, detail)


def _settle_prompt(
    books: Books, request: Request, part: PromptPart, result: StepResult, score_offsets: dict[int, tuple[int, int]]
) -> None:
    """Prompt tokens have KV now: count them, publish full pages, hand out scores."""
    rows = books.rows
    row = part.row
    end = part.start + part.count
    rows.settled[row] = end
    reached, prompt_tokens = request.reached_tokens, request.prompt_tokens
    request.computed_tokens += max(0, min(end, prompt_tokens) - max(part.start, reached))
    books.totals.computed_tokens += part.count
    if reached > part.start:
        books.totals.recomputed_tokens += min(end, reached) - part.start
    if end > reached:
        request.reached_tokens = end
    if request.scores_from >= 0:
        _send_scores(books, request, part, result, score_offsets)
    if request.publishing:
        assert request.pin is not None and request.lease is not None
        size = books.limits.page_size
        full = min(end, prompt_tokens) // size
        if full > len(request.pin.pages):
            tokens = request.tokens(len(request.pin.pages) * size, full * size)
            request.publishing = books.tree.publish_live(request.pin, request.lease, tokens)
            rows.pinned[row] = len(request.pin.pages)
            books.share(request)
    if end == request.goal_tokens - 1 and request.known_tokens == request.goal_tokens:
        end_request(books, request, "length")


def _settle_decode(books: Books, request: Request, step: int, start: int, drafts: int, accepted: int) -> None:
    rows = books.rows
    row = request.row
    assert row is not None
    settled = start + 1 + accepted
    # A prompt of which one token was left runs beside the decoding rows.
    fresh = int(request.reached_tokens <= start < request.prompt_tokens)
    request.computed_tokens += fresh
    books.totals.computed_tokens += fresh
    request.reached_tokens = max(request.reached_tokens, settled)
    rows.settled[row] = settled
    if drafts and rows.last_step[row] == step:
        rows.planned[row] = settled


def _emit(
    books: Books,
    request: Request,
    tokens: list[int],
    drafts: int,
    result: StepResult,
    detail: tuple[int, int, int] | None,
) -> None:
    """Append output tokens up to the first stop, send them, and end the request if it stopped or is full.

    drafts: how many were verified for them.
    """
    kept = 0
    reason = ""
    matched: int | bytes | None = None
    found: StopFound | None = None
    for token in tokens:
        request.output.append(token)
        kept += 1
        # Up to min_new_tokens nothing but the length ends the output.
        may_stop = request.output_tokens > request.sampling.min_new_tokens
        pattern: bytes | None = None
        if request.matcher is not None:
            text = _text(books, request, token)
            if may_stop:
                found = request.matcher.feed(text)
            else:
                request.matcher.skip(text)
        if request.patterns is not None and may_stop:
            pattern = request.patterns.feed(_text(books, request, token))
        if may_stop and token in request.stop_ids:
            reason, matched = "stop", token
        elif found is not None:
            reason, matched = "stop", found.stop
        elif pattern is not None:
            reason, matched = "stop", pattern
        elif request.known_tokens >= request.goal_tokens:
            reason = "length"
        if reason:
            break
    row = request.row
    assert row is not None
    books.rows.known[row] = request.known_tokens
    books.rows.last_token[row] = tokens[kept - 1]
    books.totals.generated_tokens += kept
    books.effects.delta(request.key, tokens[:kept])
    if detail is not None and request.logprobs >= 0:
        _send_detail(books, request, kept, result, detail)
    if drafts:
        judge_drafts(books, request, drafts, kept - 1)
    if reason:
        kept_bytes = found.kept_bytes if isinstance(matched, bytes) and found is not None else -1
        end_request(books, request, reason, matched=matched, kept_bytes=kept_bytes)


def _text(books: Books, request: Request, token: int) -> bytes:
    facts = books.facts
    if request.sampling.skip_special_tokens and token in facts.special_ids:
        return b""
    return facts.token_bytes[token]


def _detail_offsets(tops: Ints, result: StepResult) -> list[tuple[int, int, int]]:
    """For each row: where its log-probabilities and its top entries begin, and how many tops a token has."""
    wanted = tops >= 0
    tokens = np.where(wanted, result.emitted, 0)
    entries = tokens * np.maximum(tops, 0)
    return list(
        zip((np.cumsum(tokens) - tokens).tolist(), (np.cumsum(entries) - entries).tolist(), tops.tolist(), strict=True)
    )


def _send_detail(books: Books, request: Request, kept: int, result: StepResult, detail: tuple[int, int, int]) -> None:
    start, entry, top = detail
    told = TokenDetail(
        request.key,
        result.logprobs[start : start + kept].astype("<f4").tobytes(),
        result.top_ids[entry : entry + kept * top].astype("<i4").tobytes(),
        result.top_logprobs[entry : entry + kept * top].astype("<f4").tobytes(),
    )
    books.effects.detail(told)
    if request.rid:
        request.replied.append(told)


def _score_offsets(flight: Flight) -> dict[int, tuple[int, int]]:
    """For each part that scores, by row: where its scores and its top entries begin in the result."""
    offsets: dict[int, tuple[int, int]] = {}
    score = entry = 0
    for part in flight.parts:
        if part.request.scores_from >= 0:
            offsets[part.row] = (score, entry)
            first, last = scored_range(part)
            score += last - first
            entry += (last - first) * max(part.request.logprobs, 0)
    return offsets


def _send_scores(
    books: Books, request: Request, part: PromptPart, result: StepResult, offsets: dict[int, tuple[int, int]]
) -> None:
    first, last = scored_range(part)
    if first == last:
        return
    score, entry = offsets[part.row]
    count = last - first
    entries = count * max(request.logprobs, 0)
    request.scored_tokens = last
    told = Scores(
        request.key,
        first,
        request.tokens(first, last),
        result.score_logprobs[score : score + count].astype("<f4").tobytes(),
        result.score_top_ids[entry : entry + entries].astype("<i4").tobytes(),
        result.score_top_logprobs[entry : entry + entries].astype("<f4").tobytes(),
    )
    books.effects.scores(told)
    if request.rid:
        request.replied.append(told)

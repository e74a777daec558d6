"""How many drafts are worth verifying, compiled: asked between two steps of a device that waits for the answer.

What a step costs and what a line has learned is told by `pace.py`, which says what all of it means.
"""

import numpy as np
from numba import carray

from sessile.draft.compiled import entry, piece, pointer

MATCH_LENGTHS = (1, 2, 3, 5, 9, 17, 33)
"""Matches are judged in classes; each begins at one of these lengths."""
CLASSES = len(MATCH_LENGTHS)
EXPECTED = (0.08, 0.15, 0.35, 0.50, 0.65, 0.80, 0.90)
"""Share of drafts accepted in each class before any was seen: a little below what held-out Python source gives."""
EXPECTED_WEIGHT = 4.0
"""Drafts that what is expected counts for."""
REST_FADE = 1 - 1 / 64
"""What is left of what was learned after a step for which it allowed no draft: so that a line that changes from chat to
code is tried again, at a cost of a few drafts in a hundred steps."""
GAIN_MIN = 1.02
"""Wait without drafts against that with them, below which none are offered: the table is as noisy as that."""
SHARED_GAIN_MIN = 1.07
"""The same where several lines would wait for drafts to begin: what is gained so is a few lines', what it costs all's,
and a bet that gains little on average keeps the slowest of them longer."""

ACCEPTED_AT, JUDGED_AT, RESTS_AT, LEARNED_FIELDS = 0, CLASSES, 2 * CLASSES, 2 * CLASSES + 1
"""Fields float64 of what a line has learned: drafts accepted and judged, of each class, as they were so many steps
without a draft ago."""


@piece
def _class_of(match):  # type: ignore[no-untyped-def]
    """The class of a match of at least one token."""
    kind = 0
    while kind + 1 < CLASSES and match >= MATCH_LENGTHS[kind + 1]:
        kind += 1
    return kind


@piece
def _between(tokens, at, times):  # type: ignore[no-untyped-def]
    """The time of a step of so many tokens: between two points along a line, before the first as at that."""
    if tokens <= at[0]:
        return times[0]
    low = 0
    while low + 1 < at.size and at[low + 1] <= tokens:
        low += 1
    if low + 1 == at.size:
        return times[low]
    return (times[low + 1] - times[low]) / (at[low + 1] - at[low]) * (tokens - at[low]) + times[low]


@piece
def step_ns(tokens, at, times):  # type: ignore[no-untyped-def]
    """The time of a step of so many tokens; beyond the last point along the last line. at, times float64[m], m ≥ 2."""
    if tokens <= at[-1]:
        return _between(tokens, at, times)
    return times[-1] + (tokens - at[-1]) * ((times[-1] - times[-2]) / (at[-1] - at[-2]))


@piece
def plain_step_ns(tokens, plain_at, plain_times, at, times):  # type: ignore[no-untyped-def]
    """The same of a step without drafts. plain_at, plain_times float64[p]: how those are run, where it is otherwise.

    Beyond the last that was measured it holds prompts too, and runs like one that verifies.
    """
    if plain_at.size and tokens <= plain_at[-1]:
        return _between(tokens, plain_at, plain_times)
    return step_ns(tokens, at, times)


@piece
def path_chances(learned, match, drafts, chances, first):  # type: ignore[no-untyped-def]
    """The chance that the first 1, 2 … drafts behind a match of ≥ 1 tokens are all accepted; each makes it longer.

    learned: the address of what the line has learned. Written: chances[first : first + drafts].
    """
    fields = carray(pointer(learned), (LEARNED_FIELDS,), np.float64)
    left, path = REST_FADE ** fields[RESTS_AT], 1.0
    for depth in range(drafts):
        kind = _class_of(match + depth)
        accepted, judged = fields[ACCEPTED_AT + kind] * left, fields[JUDGED_AT + kind] * left
        path *= (accepted + EXPECTED_WEIGHT * EXPECTED[kind]) / (judged + EXPECTED_WEIGHT)
        chances[first + depth] = path


@piece
def _settle_in(heap, size, at, chances, nexts):  # type: ignore[no-untyped-def]
    """Restore the heap of lines below `at`: the line whose next draft is likeliest comes first, then the lowest."""
    line = heap[at]
    while 2 * at + 1 < size:
        child = 2 * at + 1
        if child + 1 < size and _is_before(heap[child + 1], heap[child], chances, nexts):
            child += 1
        if not _is_before(heap[child], line, chances, nexts):
            break
        heap[at] = heap[child]
        at = child
    heap[at] = line


@piece
def _is_before(one, other, chances, nexts):  # type: ignore[no-untyped-def]
    chance, other_chance = chances[nexts[one]], chances[nexts[other]]
    return chance > other_chance or (chance == other_chance and one < other)


@piece
def worthwhile(chances, room, lines, tokens, late_ns, begins, at, times, plain_ns, limits):  # type: ignore[no-untyped-def]
    """How many drafts of each line a step that runs `tokens` tokens without them should verify.

    chances float64[n * room]: of `path_chances`, those of a line in a row, not rising, and 0 behind the last that it
    allows. lines: ≥ n, all that the step serves; it verifies nothing for the others. late_ns: what a late step takes
    longer. begins: the step in flight has no drafts. The step behind drafts has to wait for them in any case; so of
    steps with drafts in a row each pays for one late part, and the first pays for that of the step behind the last one
    as well. at, times: as of `step_ns`; plain_ns: of the step without drafts. Written: limits int32[n].
    """
    count = limits.size
    heap, size = np.empty(count, np.int32), 0
    nexts, sums, shares = np.empty(count, np.int64), np.empty(count), np.empty(count)
    for line in range(count):
        limits[line] = 0
        nexts[line], sums[line], shares[line] = line * room, 0.0, 1.0
        if chances[line * room] > 0.0:
            heap[size] = line
            size += 1
    for spot in range(size // 2 - 1, -1, -1):
        _settle_in(heap, size, spot, chances, nexts)
    taken = np.empty(count * room, np.int32)
    if begins:
        late_ns *= 2.0
    saved, best, number, worth = 0.0, np.inf, 0, 0
    while size > 0:
        line = heap[0]
        sums[line] += chances[nexts[line]]
        share = 1.0 / (1.0 + sums[line])  # Of a step, that the line waits for each of its tokens.
        saved += shares[line] - share
        shares[line] = share
        taken[number] = line
        number += 1
        wait = (1.0 - saved / lines) * (step_ns(tokens + number, at, times) + late_ns)
        if wait < best:
            best, worth = wait, number
        nexts[line] += 1
        if nexts[line] == (line + 1) * room or chances[nexts[line]] <= 0.0:
            size -= 1
            heap[0] = heap[size]
        _settle_in(heap, size, 0, chances, nexts)
    gain_min = SHARED_GAIN_MIN if begins and lines > 1 else GAIN_MIN
    if best * gain_min <= plain_ns:
        for number in range(worth):
            limits[taken[number]] += 1


@entry
def weigh_drafts(learned, matches, allowed, tokens, late_ns, begins, at, times, plain_at, plain_times, limits):  # type: ignore[no-untyped-def]
    """How many drafts of each line to verify, at most as many as it allows; for a line with 0 it is a step's rest.

    learned int64[n]: addresses. matches int32[n]: 0 where nothing matches. allowed int32[n]. The others as of
    `worthwhile` and `plain_step_ns`. Written: limits int32[n]. Returns their sum.
    """
    lines, room = learned.size, 0
    for line in range(lines):
        limits[line] = 0
        if matches[line] > 0:
            room = max(room, allowed[line])
    if room > 0:
        chances = np.empty(lines * room)
        for spot in range(lines * room):
            chances[spot] = 0.0
        for line in range(lines):
            if matches[line] > 0:
                path_chances(learned[line], matches[line], allowed[line], chances, line * room)
        plain_ns = plain_step_ns(tokens, plain_at, plain_times, at, times)
        worthwhile(chances, room, lines, tokens, late_ns, begins, at, times, plain_ns, limits)
    total = 0
    for line in range(lines):
        total += limits[line]
        if limits[line] == 0:
            carray(pointer(learned[line]), (LEARNED_FIELDS,), np.float64)[RESTS_AT] += 1.0
    return total

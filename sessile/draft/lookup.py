"""The hot path of drafting, compiled: find what ends like a sequence does, and merge what followed it into one tree.

A *part* is a body of tokens with a way to find earlier places in it. It is told to compiled code by the address of
PART_FIELDS int64, which its owner keeps alive: a corpus sorted by reversed contexts (suffixes.py), or a text with
chains of its last few tokens (session_index.py). A *source* is one or several parts with one prior.

A place is where an occurrence goes on: the index in its part of the token behind the match.
"""

import numpy as np
from numba import carray

from sessile.draft.compiled import entry, int32_at, piece, pointer
from sessile.draft.suffixes import DEPTH_TOKENS, SEPARATOR

PART_FIELDS = 8
KIND, TOKENS_AT, TOKENS, PLACES_AT, PLACES, HEADS_AT, HEAD_BITS = range(7)
"""Fields of a part. PLACES_AT: of a corpus its sorted positions, of a text the next older place of each chain."""
SORTED, CHAINED = 0, 1
"""Kinds of parts."""
GRAM_TOKENS = 3
"""The chains of a text join places behind the same so many tokens; a shorter match is not found there."""

LOOKS_MAX = 1024
"""Most places of a chain that are looked at: others that share its bucket could be many, by chance or by design."""

LINE_INDEX_AT, LINE_PRIORS_AT, LINE_PARTS, LINE_FIRST_PART = range(4)
"""Fields of a line's record; from the last on, address and source of each part."""

PRIOR_ONE = 1024
"""A source's prior of 1: weights are whole numbers, so that their sums do not depend on an order."""


@piece
def gram_hash(tokens, end, bits):  # type: ignore[no-untyped-def]
    """Bucket, of 2 ** bits, of the GRAM_TOKENS tokens before `end`; -1 if a separator is among them."""
    mixed = np.uint64(0)
    for i in range(end - GRAM_TOKENS, end):
        if tokens[i] == SEPARATOR:
            return np.int64(-1)
        mixed = (mixed ^ np.uint64(tokens[i])) * np.uint64(0x9E3779B97F4A7C15)
        mixed ^= mixed >> np.uint64(29)
    return np.int64(mixed >> np.uint64(64 - bits))


@piece
def _link(tokens, older, heads, bits, first, last):  # type: ignore[no-untyped-def]
    for place in range(max(first, GRAM_TOKENS), last):
        bucket = gram_hash(tokens, place, bits) if tokens[place] != SEPARATOR else np.int64(-1)
        if bucket >= 0:
            older[place] = heads[bucket]
            heads[bucket] = place


@entry
def link_places(tokens, older, heads, bits, first, last):  # type: ignore[no-untyped-def]
    """Put the places first … last - 1 at the heads of their chains, in this order."""
    _link(tokens, older, heads, bits, first, last)


@entry
def append_to_texts(parts, tokens, counts):  # type: ignore[no-untyped-def]
    """Append counts[i] of `tokens`, which are end to end, to the text with chains of parts[i].

    parts int64[n]: addresses. tokens int32, counts int64[n]. Returns -1, or, with nothing appended to any, the first i
    that has too little room.
    """
    for i in range(parts.size):
        part = carray(pointer(parts[i]), (PART_FIELDS,), np.int64)
        if part[TOKENS] + counts[i] > part[PLACES]:
            return i
    at = 0
    for i in range(parts.size):
        part = carray(pointer(parts[i]), (PART_FIELDS,), np.int64)
        text = carray(pointer(part[TOKENS_AT]), (part[PLACES],), np.int32)
        older = carray(pointer(part[PLACES_AT]), (part[PLACES],), np.int32)
        heads = carray(pointer(part[HEADS_AT]), (np.int64(1) << part[HEAD_BITS],), np.int32)
        first = part[TOKENS]
        for j in range(counts[i]):
            text[first + j] = tokens[at + j]
        _link(text, older, heads, part[HEAD_BITS], first, first + counts[i])
        part[TOKENS] = first + counts[i]
        at += counts[i]
    return -1


@entry
def unlink_places(tokens, older, heads, bits, first, last):  # type: ignore[no-untyped-def]
    """Undo `link_places`: what it linked last must still be at the heads."""
    for place in range(last - 1, max(first, GRAM_TOKENS) - 1, -1):
        bucket = gram_hash(tokens, place, bits) if tokens[place] != SEPARATOR else np.int64(-1)
        if bucket >= 0:
            heads[bucket] = older[place]


@piece
def _match_length(tokens, place, query, end, length):  # type: ignore[no-untyped-def]
    """How many tokens before `place` are those before `end` of the query; the nearest `length` are known to be."""
    most = min(min(end, place), DEPTH_TOKENS)
    while length < most and tokens[place - 1 - length] == query[end - 1 - length]:
        length += 1
    return length


@piece
def _search(tokens, positions, query, end):  # type: ignore[no-untyped-def]
    """(i, match of positions[i - 1], match of positions[i]): where query[:end] belongs, behind all that equal it.

    The longest matches are next to there, and on either side they only get shorter. Of what lies between two contexts
    nothing matches less than the worse of them: so much of each comparison is left out (Manber and Myers, 1990).
    """
    low, high = 0, positions.size
    low_match = high_match = 0
    most = min(end, DEPTH_TOKENS)
    while low < high:
        middle = (low + high) // 2
        place = positions[middle]
        match = _match_length(tokens, place, query, end, min(low_match, high_match))
        if match == most or tokens[place - 1 - match] < query[end - 1 - match]:
            low, low_match = middle + 1, match
        else:
            high, high_match = middle, match
    return low, low_match, high_match


@piece
def _add(found, count, tokens_at, tokens, place, match, part, source):  # type: ignore[no-untyped-def]
    """Write one occurrence down: where it goes on, for how many tokens, its match, its source, part and place."""
    found[count, 0] = tokens_at + 4 * place
    found[count, 1] = tokens - place
    found[count, 2] = match
    found[count, 3] = source
    found[count, 4] = (part << 32) | place
    return count + 1


@piece
def _collect_sorted(part, number, source, query, end, spot, floor, most, found, count):  # type: ignore[no-untyped-def]
    """Write down the `most` longest matches around `spot` in a corpus, none shorter than `floor`."""
    tokens = carray(pointer(part[TOKENS_AT]), (part[TOKENS],), np.int32)
    positions = carray(pointer(part[PLACES_AT]), (part[PLACES],), np.int32)
    left, right = spot - 1, spot
    left_match = _match_length(tokens, positions[left], query, end, 0) if left >= 0 else -1
    right_match = _match_length(tokens, positions[right], query, end, 0) if right < positions.size else -1
    for _ in range(most):
        if max(left_match, right_match) < floor:
            break
        if left_match >= right_match:
            count = _add(found, count, part[TOKENS_AT], part[TOKENS], positions[left], left_match, number, source)
            left -= 1
            left_match = _match_length(tokens, positions[left], query, end, 0) if left >= 0 else -1
        else:
            count = _add(found, count, part[TOKENS_AT], part[TOKENS], positions[right], right_match, number, source)
            right += 1
            right_match = _match_length(tokens, positions[right], query, end, 0) if right < positions.size else -1
    return count


@piece
def _collect_chained(part, number, source, query, end, most, found, count):  # type: ignore[no-untyped-def]
    """Write down the `most` newest matches in a text, all of GRAM_TOKENS or more; returns (count, longest match)."""
    longest = 0
    if end < GRAM_TOKENS or part[TOKENS] <= GRAM_TOKENS:
        return count, longest
    tokens = carray(pointer(part[TOKENS_AT]), (part[TOKENS],), np.int32)
    older = carray(pointer(part[PLACES_AT]), (part[TOKENS],), np.int32)
    heads = carray(pointer(part[HEADS_AT]), (np.int64(1) << part[HEAD_BITS],), np.int32)
    place = heads[gram_hash(query, end, part[HEAD_BITS])]
    taken = looks = 0
    while place > 0 and taken < most and looks < LOOKS_MAX:
        looks += 1
        match = _match_length(tokens, place, query, end, 0)
        # What merely shares the bucket costs a look and takes no one's turn.
        if match >= GRAM_TOKENS:
            taken += 1
            longest = max(longest, match)
            count = _add(found, count, part[TOKENS_AT], part[TOKENS], place, match, number, source)
        place = older[place]
    return count, longest


GOES_ON_AT, LEFT, MATCH, SOURCE, PLACE, WEIGHT = range(6)
"""Columns of an occurrence. GOES_ON_AT: address of the token behind the match; LEFT: how many its part has from there.
PLACE: number of the part, then the place in it; with SOURCE before it, a total order over all occurrences."""
FOUND_COLUMNS = 6

NODE_TOKEN, NODE_PARENT, NODE_SOURCE, NODE_MATCH = range(4)
"""Columns of a tree's node. NODE_PARENT: number of the parent, -1 at the top. NODE_SOURCE, NODE_MATCH: of the best of
the occurrences that say so."""
NODE_COLUMNS = 4

TOKEN, PARENT, DEPTH, FIRST, LAST, BEST, TOTAL = range(7)
"""Columns of a candidate: a node that may yet be taken. FIRST, LAST: its occurrences in `order`; BEST: the best one."""
CANDIDATE_COLUMNS = 7


@piece
def _is_better(found, one, other):  # type: ignore[no-untyped-def]
    """Whether occurrence `one` goes before `other`: more weight, longer match, lower source, later place."""
    if found[one, WEIGHT] != found[other, WEIGHT]:
        return found[one, WEIGHT] > found[other, WEIGHT]
    if found[one, MATCH] != found[other, MATCH]:
        return found[one, MATCH] > found[other, MATCH]
    if found[one, SOURCE] != found[other, SOURCE]:
        return found[one, SOURCE] < found[other, SOURCE]
    return found[one, PLACE] > found[other, PLACE]


@piece
def _is_likelier(found, candidates, shares, one, other):  # type: ignore[no-untyped-def]
    """Whether candidate `one` is taken before `other`: a larger share, then the better occurrence.

    One occurrence may be the best of two candidates, if one is below the other: the upper one goes first.
    """
    if shares[one] != shares[other]:
        return shares[one] > shares[other]
    best, rival = candidates[one, BEST], candidates[other, BEST]
    if best != rival:
        return _is_better(found, best, rival)
    if candidates[one, DEPTH] != candidates[other, DEPTH]:
        return candidates[one, DEPTH] < candidates[other, DEPTH]
    return candidates[one, TOKEN] < candidates[other, TOKEN]


@piece
def _group(found, order, first, last, depth, slots, groups, group_of):  # type: ignore[no-untyped-def]
    """Group the occurrences order[first:last] by their token at `depth`; returns (end, groups).

    They are reordered so that each group lies together, in order of first appearance; those that end there are dropped
    behind `end`. groups [n, CANDIDATE_COLUMNS]: TOKEN, FIRST, LAST, BEST and TOTAL are written. slots: int32, a power
    of two ≥ 2 × the occurrences, all -1, and so again afterwards. group_of: scratch, int32[2, occurrences].
    """
    mask = slots.size - 1
    count, end = 0, first
    for i in range(first, last):
        each = order[i]
        if depth >= found[each, LEFT]:
            continue
        token = int32_at(found[each, GOES_ON_AT] + 4 * depth)
        if token == SEPARATOR:
            continue
        slot = (np.int64(token) * 0x9E3779B1 >> 7) & mask
        while slots[slot] >= 0 and groups[slots[slot], TOKEN] != token:
            slot = (slot + 1) & mask
        number = slots[slot]
        if number < 0:
            number = count
            slots[slot] = number
            groups[number, TOKEN], groups[number, BEST], groups[number, TOTAL] = token, each, 0
            groups[number, FIRST], groups[number, LAST] = 0, slot
            count += 1
        elif _is_better(found, each, groups[number, BEST]):
            groups[number, BEST] = each
        groups[number, TOTAL] += found[each, WEIGHT]
        groups[number, FIRST] += 1
        group_of[0, end], group_of[1, end] = number, each
        end += 1
    start = first
    for number in range(count):
        slots[groups[number, LAST]] = -1
        start += groups[number, FIRST]
        groups[number, FIRST] = start - groups[number, FIRST]
        groups[number, LAST] = groups[number, FIRST]
    for i in range(first, end):
        number = group_of[0, i]
        order[groups[number, LAST]] = group_of[1, i]
        groups[number, LAST] += 1
    return count


@piece
def merge(found, count, budget, branches, decay, share_min, factor, scratch, tree):  # type: ignore[no-untyped-def]
    """Grow one tree from all occurrences, likeliest node first; returns how many of at most `budget` nodes it has.

    The share of a node is the weight of the occurrences that say its path, of all, × decay a level. A node is taken
    while its share is at least share_min and it is no deeper than factor × the match of its best occurrence. Each node
    has at most `branches` children: with 1 the tree is a chain. tree [budget, NODE_COLUMNS] is written.
    """
    order, slots, groups, group_of, candidates, shares = scratch
    total = np.int64(0)
    for i in range(count):
        order[i] = i
        total += found[i, WEIGHT]
    parent, depth, first, last = -1, 0, 0, count
    waiting, nodes = 0, 0
    while True:
        number = _group(found, order, first, last, depth, slots, groups, group_of)
        for i in range(number):
            groups[i, PARENT], groups[i, DEPTH] = parent, depth + 1
            shares[candidates.shape[0] + i] = groups[i, TOTAL] / total * decay ** (depth + 1)
        waiting = _push_likeliest(found, groups, number, branches, share_min, factor, candidates, waiting, shares)
        if waiting == 0 or nodes == budget:
            return nodes
        best = 0
        for i in range(1, waiting):
            if _is_likelier(found, candidates, shares, i, best):
                best = i
        tree[nodes, NODE_TOKEN], tree[nodes, NODE_PARENT] = candidates[best, TOKEN], candidates[best, PARENT]
        tree[nodes, NODE_SOURCE] = found[candidates[best, BEST], SOURCE]
        tree[nodes, NODE_MATCH] = found[candidates[best, BEST], MATCH]
        parent, depth = nodes, candidates[best, DEPTH]
        first, last = candidates[best, FIRST], candidates[best, LAST]
        nodes += 1
        waiting -= 1
        candidates[best] = candidates[waiting]
        shares[best] = shares[waiting]


@piece
def _push_likeliest(found, groups, count, branches, share_min, factor, candidates, waiting, shares):  # type: ignore[no-untyped-def]
    """Put the likeliest groups among the candidates, if they may be taken at all; returns how many wait then."""
    groups_from = candidates.shape[0]
    for taken in range(min(branches, count)):
        best = taken
        for i in range(taken + 1, count):
            if _is_likelier(found, groups, shares[groups_from:], i, best):
                best = i
        for column in range(CANDIDATE_COLUMNS):
            groups[taken, column], groups[best, column] = groups[best, column], groups[taken, column]
        a, b = groups_from + taken, groups_from + best
        shares[a], shares[b] = shares[b], shares[a]
        depth_max = max(1.0, factor * found[groups[taken, BEST], MATCH])
        if shares[a] >= share_min and groups[taken, DEPTH] <= depth_max:
            candidates[waiting] = groups[taken]
            shares[waiting] = shares[a]
            waiting += 1
    return waiting


@piece
def _longest_of(line, query, end, spots):  # type: ignore[no-untyped-def]
    """The longest match of a line in its sorted parts; spots [parts, 3] gets what `_search` says of each."""
    longest = 0
    for number in range(line[LINE_PARTS]):
        part = carray(pointer(line[LINE_FIRST_PART + 2 * number]), (PART_FIELDS,), np.int64)
        spots[number, 0] = spots[number, 1] = spots[number, 2] = 0
        if part[KIND] == SORTED and part[PLACES]:
            tokens = carray(pointer(part[TOKENS_AT]), (part[TOKENS],), np.int32)
            positions = carray(pointer(part[PLACES_AT]), (part[PLACES],), np.int32)
            spots[number, 0], spots[number, 1], spots[number, 2] = _search(tokens, positions, query, end)
            longest = max(longest, max(spots[number, 1], spots[number, 2]))
    return longest


@piece
def _find(line, most, match_min, match_cap, window, spots, found):  # type: ignore[no-untyped-def]
    """Write a line's occurrences down, with their weights; returns their number.

    What matches so much less than the longest that its weight would be under 2 ** -window of that one's is left out:
    of a hundred corpora most have nothing to say.
    """
    index = carray(pointer(line[LINE_INDEX_AT]), (PART_FIELDS,), np.int64)
    query = carray(pointer(index[TOKENS_AT]), (index[TOKENS],), np.int32)
    end = index[TOKENS]
    if end == 0:
        return 0
    longest = _longest_of(line, query, end, spots)
    count = 0
    for number in range(line[LINE_PARTS]):
        part = carray(pointer(line[LINE_FIRST_PART + 2 * number]), (PART_FIELDS,), np.int64)
        if part[KIND] == CHAINED:
            source = line[LINE_FIRST_PART + 2 * number + 1]
            count, match = _collect_chained(part, number, source, query, end, most, found, count)
            longest = max(longest, match)
    floor = max(match_min, min(longest, match_cap) - window)
    for number in range(line[LINE_PARTS]):
        part = carray(pointer(line[LINE_FIRST_PART + 2 * number]), (PART_FIELDS,), np.int64)
        if part[KIND] == SORTED and max(spots[number, 1], spots[number, 2]) >= floor:
            source = line[LINE_FIRST_PART + 2 * number + 1]
            count = _collect_sorted(part, number, source, query, end, spots[number, 0], floor, most, found, count)
    priors = carray(pointer(line[LINE_PRIORS_AT]), (1 << 20,), np.int64)
    kept = 0
    for i in range(count):
        if found[i, MATCH] >= floor:
            for column in range(FOUND_COLUMNS):
                found[kept, column] = found[i, column]
            found[kept, WEIGHT] = priors[found[kept, SOURCE]] << min(found[kept, MATCH], match_cap)
            kept += 1
    return kept


@piece
def _most_parts(lines, first, last):  # type: ignore[no-untyped-def]
    parts = 1
    for i in range(first, last):
        line = carray(pointer(lines[i]), (LINE_FIRST_PART,), np.int64)
        parts = max(parts, line[LINE_PARTS])
    return parts


@entry
def match_lines(lines, first, last, most, matches):  # type: ignore[no-untyped-def]
    """The longest match of each of the lines first … last - 1, as `draft_lines` finds it, and no drafts.

    lines int64[n]: addresses of line records. most: occurrences of a part. Written: matches int32[n].
    """
    parts = _most_parts(lines, first, last)
    found = np.empty((most, FOUND_COLUMNS), np.int64)
    spots = np.empty((parts, 3), np.int64)
    for i in range(first, last):
        matches[i] = 0
        line = carray(pointer(lines[i]), (LINE_FIRST_PART + 2 * parts,), np.int64)
        index = carray(pointer(line[LINE_INDEX_AT]), (PART_FIELDS,), np.int64)
        end = index[TOKENS]
        if end == 0:
            continue
        query = carray(pointer(index[TOKENS_AT]), (end,), np.int32)
        longest = _longest_of(line, query, end, spots)
        for number in range(line[LINE_PARTS]):
            part = carray(pointer(line[LINE_FIRST_PART + 2 * number]), (PART_FIELDS,), np.int64)
            if part[KIND] == CHAINED:
                longest = max(longest, _collect_chained(part, number, 0, query, end, most, found, 0)[1])
        matches[i] = longest


@entry
def draft_lines(lines, budgets, first, last, whole, real, trees, counts):  # type: ignore[no-untyped-def]
    """Draft for the lines first … last - 1; different ranges may run on different threads at once.

    lines int64[n]: addresses of line records. budgets int32[n]: most nodes. whole int64: (occurrences a part, least
    match, cap of matches, window, branches); real float64: (decay, share_min, factor). Written: trees
    int32[n, nodes, NODE_COLUMNS], counts int32[n] of nodes.
    """
    most, match_min, match_cap, window, branches = whole[0], whole[1], whole[2], whole[3], whole[4]
    parts, nodes = _most_parts(lines, first, last), 1
    for i in range(first, last):
        nodes = max(nodes, budgets[i])
    room = parts * most
    slots_size = 4
    while slots_size < 2 * room:
        slots_size *= 2
    found = np.empty((room, FOUND_COLUMNS), np.int64)
    spots = np.empty((parts, 3), np.int64)
    waiting = (nodes + 1) * branches
    scratch = (
        np.empty(room, np.int64),
        np.full(slots_size, -1, np.int32),
        np.empty((room, CANDIDATE_COLUMNS), np.int64),
        np.empty((2, room), np.int32),
        np.empty((waiting, CANDIDATE_COLUMNS), np.int64),
        np.empty(waiting + room, np.float64),
    )
    for i in range(first, last):
        counts[i] = 0
        line = carray(pointer(lines[i]), (LINE_FIRST_PART + 2 * parts,), np.int64)
        count = _find(line, most, match_min, match_cap, window, spots, found)
        if budgets[i] > 0 and count > 0:
            counts[i] = merge(found, count, budgets[i], branches, real[0], real[1], real[2], scratch, trees[i])

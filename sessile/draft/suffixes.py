"""Sorting the positions of a corpus by their reversed contexts: what builds a `CorpusIndex`.

The tokens of a corpus are one int32 array in which SEPARATOR stands before, between and behind the documents. A
position is the index of a token that has a token of the same document before it; its context is what stands before it,
read backwards: nearest token first, at most DEPTH_TOKENS, and no further than the separator, which sorts before every
token. Equal contexts sort by position.

Positions are first counted into groups by their nearest token. A group is then sorted by the next KEY_TOKENS of its
contexts, packed into one integer, and each run of equal keys is again a group (multikey quicksort with cached keys,
Bentley and Sedgewick, 1997; Ng and Kakehi, 2007).
"""

import numpy as np

from sessile.draft.compiled import entry, piece

SEPARATOR = -1
KEY_TOKENS = 3
KEY_BITS = 21
"""Of one token in a key. 0 is the separator, so that ids up to 2 ** 21 - 2 fit."""
DEPTH_TOKENS = 1 + 21 * KEY_TOKENS
"""Most tokens of a context that count: the group's own, and 21 keys."""
TOKEN_ID_MAX = 2**KEY_BITS - 2
SMALL_GROUP = 3
"""Groups up to this size are sorted by comparing tokens where they are; gathering keys would cost more."""
SMALL_SORT = 24
"""Ranges up to this size are sorted by insertion."""


@piece
def _key(tokens, position, depth):  # type: ignore[no-untyped-def]
    """The KEY_TOKENS tokens of a context behind its first `depth`, as one integer that sorts as they do."""
    nearest = position - 1 - depth
    first = np.uint64(tokens[nearest] + 1)
    if first == 0:
        return np.uint64(0)
    second = np.uint64(tokens[nearest - 1] + 1)
    third = np.uint64(0)
    if second != 0:
        third = np.uint64(tokens[nearest - 2] + 1)
    bits = np.uint64(KEY_BITS)
    return (((first << bits) | second) << bits) | third


@piece
def _is_before(tokens, one, other, depth):  # type: ignore[no-untyped-def]
    """Whether the context of `one` sorts before that of `other`; their first `depth` tokens are known to be equal."""
    while depth < DEPTH_TOKENS:
        left, right = tokens[one - 1 - depth], tokens[other - 1 - depth]
        if left != right:
            return left < right
        if left == SEPARATOR:
            break
        depth += 1
    return one < other


@piece
def _sort_small_group(tokens, positions, first, last, depth):  # type: ignore[no-untyped-def]
    """Insertion sort of positions[first:last] by their contexts."""
    for i in range(first + 1, last):
        moved = positions[i]
        j = i
        while j > first and _is_before(tokens, moved, positions[j - 1], depth):
            positions[j] = positions[j - 1]
            j -= 1
        positions[j] = moved


@piece
def _insert(keys, positions, first, last):  # type: ignore[no-untyped-def]
    """Insertion sort of the pairs (key, position) in [first, last)."""
    for i in range(first + 1, last):
        key, position = keys[i], positions[i]
        j = i
        while j > first and (key < keys[j - 1] or (key == keys[j - 1] and position < positions[j - 1])):
            keys[j], positions[j] = keys[j - 1], positions[j - 1]
            j -= 1
        keys[j], positions[j] = key, position


@piece
def _partition(keys, positions, first, last):  # type: ignore[no-untyped-def]
    """Hoare's partition of the pairs in [first, last) around the median of three; returns where the right part begins.

    Pairs differ in their position, so there are no runs of equal ones to be slow on.
    """
    middle, end = (first + last) // 2, last - 1
    for one, other in ((first, middle), (middle, end), (first, middle)):
        if keys[other] < keys[one] or (keys[other] == keys[one] and positions[other] < positions[one]):
            keys[one], keys[other] = keys[other], keys[one]
            positions[one], positions[other] = positions[other], positions[one]
    key, position = keys[middle], positions[middle]
    i, j = first, end
    while True:
        while keys[i] < key or (keys[i] == key and positions[i] < position):
            i += 1
        while key < keys[j] or (key == keys[j] and position < positions[j]):
            j -= 1
        if i >= j:
            return j + 1
        keys[i], keys[j] = keys[j], keys[i]
        positions[i], positions[j] = positions[j], positions[i]
        i += 1
        j -= 1


@piece
def _sort_pairs(keys, positions, first, last):  # type: ignore[no-untyped-def]
    """Sort the pairs (key, position) in [first, last)."""
    # The longer part waits and the shorter one goes on, so that 64 places hold for any length.
    starts, ends = np.empty(64, np.int64), np.empty(64, np.int64)
    starts[0], ends[0], waiting = first, last, 1
    while waiting:
        waiting -= 1
        low, high = starts[waiting], ends[waiting]
        while high - low > SMALL_SORT:
            cut = _partition(keys, positions, low, high)
            if cut - low > high - cut:
                starts[waiting], ends[waiting] = low, cut
                low = cut
            else:
                starts[waiting], ends[waiting] = cut, high
                high = cut
            waiting += 1
        _insert(keys, positions, low, high)


@entry
def count_positions(tokens, counts):  # type: ignore[no-untyped-def]
    """counts[token] += positions whose nearest context token it is; returns how many positions there are."""
    total = 0
    for position in range(1, tokens.size):
        if tokens[position] != SEPARATOR and tokens[position - 1] != SEPARATOR:
            counts[tokens[position - 1]] += 1
            total += 1
    return total


@entry
def scatter_positions(tokens, offsets, positions):  # type: ignore[no-untyped-def]
    """Write every position into the group of its nearest token, ascending. offsets: starts of the groups; they move."""
    for position in range(1, tokens.size):
        if tokens[position] != SEPARATOR and tokens[position - 1] != SEPARATOR:
            nearest = tokens[position - 1]
            positions[offsets[nearest]] = position
            offsets[nearest] += 1


@piece
def _push_runs(keys, first, last, depth, groups, waiting):  # type: ignore[no-untyped-def]
    """Put each run of equal keys that is not yet sorted out on the stack of groups; returns (groups, their number)."""
    last_token = np.uint64((1 << KEY_BITS) - 1)
    start = first
    for i in range(first + 1, last + 1):
        if i < last and keys[i] == keys[start]:
            continue
        # A key that ends with a separator is of contexts that end there: equal, and in order of position already.
        if i - start > 1 and keys[start] & last_token:
            if waiting == groups.shape[0]:
                longer = np.empty((2 * waiting, 3), np.int64)
                longer[:waiting] = groups
                groups = longer
            groups[waiting, 0], groups[waiting, 1], groups[waiting, 2] = start, i, depth
            waiting += 1
        start = i
    return groups, waiting


@entry
def sort_groups(tokens, positions, keys, bounds, stop):  # type: ignore[no-untyped-def]
    """Sort positions within each group [bounds[i], bounds[i + 1]), whose nearest tokens are equal.

    keys: uint64, as many as positions, overwritten between the bounds. stop: uint8[1]; returns early once it is set.
    """
    groups = np.empty((64, 3), np.int64)
    for number in range(bounds.size - 1):
        groups[0, 0], groups[0, 1], groups[0, 2] = bounds[number], bounds[number + 1], 1
        waiting = 1
        while waiting:
            if stop[0]:
                return
            waiting -= 1
            first, last, depth = groups[waiting, 0], groups[waiting, 1], groups[waiting, 2]
            if depth >= DEPTH_TOKENS or last - first < 2:
                continue
            if last - first <= SMALL_GROUP:
                _sort_small_group(tokens, positions, first, last, depth)
                continue
            are_equal = True
            for i in range(first, last):
                keys[i] = _key(tokens, positions[i], depth)
                are_equal &= keys[i] == keys[first]
            if not are_equal:
                _sort_pairs(keys, positions, first, last)
            groups, waiting = _push_runs(keys, first, last, depth + KEY_TOKENS, groups, waiting)

"""A slow, obviously right drafter's twin: lists and dictionaries, against which the compiled code is compared."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sessile.draft.lookup import GRAM_TOKENS
from sessile.draft.merge import DraftRules
from sessile.draft.suffixes import DEPTH_TOKENS, SEPARATOR

Ints = npt.NDArray[np.int32]


def context_of(flat: Ints, position: int) -> list[int]:
    """What stands before a position, nearest token first, down to the separator or the depth that counts."""
    context: list[int] = []
    while flat[position - 1 - len(context)] != SEPARATOR and len(context) < DEPTH_TOKENS:
        context.append(int(flat[position - 1 - len(context)]))
    return context


def positions_of(flat: Ints) -> list[int]:
    """Every position that has a token before it in its document."""
    return [p for p in range(1, len(flat)) if flat[p] != SEPARATOR and flat[p - 1] != SEPARATOR]


def sorted_positions(flat: Ints) -> list[int]:
    """The positions as an index has them."""
    return sorted(positions_of(flat), key=lambda p: (context_of(flat, p), p))


@dataclass(frozen=True)
class TwinPart:
    """A body of tokens. flat: with separators. source: rank, number: among all parts; is_text: chains, not a corpus."""

    flat: Ints
    source: int
    number: int
    is_text: bool


@dataclass(frozen=True)
class Occurrence:
    """Where a context was seen before: what followed there, and how it ranks (larger is better)."""

    weight: int
    match: int
    source: int
    number: int
    place: int
    follows: tuple[int, ...]

    @property
    def rank(self) -> tuple[int, int, int, int, int]:
        return (self.weight, self.match, -self.source, self.number, self.place)


def match_of(flat: Ints, place: int, query: list[int]) -> int:
    """How many tokens before the place are the last ones of the query."""
    length = 0
    while length < min(len(query), place, DEPTH_TOKENS) and flat[place - 1 - length] == query[-1 - length]:
        length += 1
    return length


def places_in_corpus(part: TwinPart, query: list[int], most: int) -> list[int]:
    """The longest matches around where the query belongs in the order, the lower side first where both are equal."""
    order = sorted_positions(part.flat)
    wanted = query[::-1][:DEPTH_TOKENS]
    # Behind all that begin as the query does.
    spot = sum(context_of(part.flat, p)[: len(wanted)] <= wanted for p in order)
    below, above = order[:spot][::-1], order[spot:]
    taken: list[int] = []
    while len(taken) < most and (below or above):
        left = match_of(part.flat, below[0], query) if below else -1
        right = match_of(part.flat, above[0], query) if above else -1
        taken.append(below.pop(0) if left >= right else above.pop(0))
    return taken


def places_in_text(part: TwinPart, query: list[int], most: int) -> list[int]:
    """The newest places behind the query's last GRAM_TOKENS tokens."""
    if len(query) < GRAM_TOKENS:
        return []
    last = query[-GRAM_TOKENS:]
    ends = range(len(part.flat) - 1, GRAM_TOKENS - 1, -1)
    return [p for p in ends if part.flat[p] != SEPARATOR and part.flat[p - GRAM_TOKENS : p].tolist() == last][:most]


def what_follows(flat: Ints, place: int) -> tuple[int, ...]:
    """The tokens from a place to the end of its document."""
    rest = flat[place:].tolist()
    return tuple(rest[: rest.index(SEPARATOR)] if SEPARATOR in rest else rest)


def occurrences(parts: list[TwinPart], query: list[int], priors: dict[int, int], rules: DraftRules) -> list[Occurrence]:
    """All that counts for a draft."""
    found = []
    for part in parts:
        look = places_in_text if part.is_text else places_in_corpus
        for place in look(part, query, rules.occurrences):
            match = match_of(part.flat, place, query)
            weight = priors[part.source] << min(match, rules.match_cap)
            follows = what_follows(part.flat, place)
            found.append(Occurrence(weight, match, part.source, part.number, place, follows))
    longest = max((each.match for each in found), default=0)
    floor = max(rules.match_min, min(longest, rules.match_cap) - rules.window)
    return [each for each in found if each.match >= floor]


def merged(found: list[Occurrence], budget: int, rules: DraftRules) -> list[tuple[int, int, int, int]]:
    """The nodes (token, parent, source, match) that a merge takes, in its order, straight from its definition."""
    total = sum(each.weight for each in found)
    nodes: list[tuple[int, int, int, int]] = []
    candidates = children((), -1, found, total, rules)
    while candidates and len(nodes) < budget:
        candidates.sort(key=lambda each: (-each[0], *(-number for number in each[1].rank), len(each[2]), each[2][-1]))
        _, best, path, parent = candidates.pop(0)
        nodes.append((path[-1], parent, best.source, best.match))
        candidates += children(path, len(nodes) - 1, found, total, rules)
    return nodes


Candidate = tuple[float, Occurrence, tuple[int, ...], int]


def children(
    path: tuple[int, ...], parent: int, found: list[Occurrence], total: int, rules: DraftRules
) -> list[Candidate]:
    """(share, best occurrence, path, parent) of the children of a node that may be taken."""
    depth = len(path) + 1
    here = [each for each in found if len(each.follows) >= depth and each.follows[: depth - 1] == path]
    groups: dict[int, list[Occurrence]] = {}
    for each in here:
        groups.setdefault(each.follows[depth - 1], []).append(each)
    options = [
        (
            sum(each.weight for each in group) / total * rules.decay**depth,
            max(group, key=lambda each: each.rank),
            (*path, token),
            parent,
        )
        for token, group in groups.items()
    ]
    options.sort(key=lambda each: (-each[0], *(-number for number in each[1].rank)))
    return [
        each
        for each in options[: rules.branches]
        if each[0] >= rules.share_min and depth <= max(1.0, rules.factor * each[1].match)
    ]

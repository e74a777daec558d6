"""One merge over all sources, compared with its definition written out in lists."""

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sessile.draft.corpus_index import CorpusIndex
from sessile.draft.lookup import PRIOR_ONE
from sessile.draft.merge import DraftRules, Merger, chain_of
from sessile.draft.session_index import SessionIndex
from tests.unit.draft_twin import TwinPart, merged, occurrences

Ints = npt.NDArray[np.int32]
EVERYTHING = DraftRules(occurrences=1024, match_cap=24, window=24, decay=1.0, share_min=0.0, factor=64.0)

words = st.lists(st.integers(0, 2), min_size=1, max_size=40)
corpora = st.lists(st.lists(words, min_size=1, max_size=3), max_size=3)
rules = st.builds(
    DraftRules,
    occurrences=st.integers(1, 12),
    match_min=st.integers(1, 4),
    match_cap=st.integers(1, 8),
    window=st.integers(1, 6),
    branches=st.integers(1, 3),
    decay=st.sampled_from([1.0, 0.9, 0.5]),
    share_min=st.sampled_from([0.0, 0.1, 0.5]),
    factor=st.sampled_from([0.5, 1.0, 8.0]),
)


class Setting:
    """A sequence and corpora, for the merge and for its twin."""

    def __init__(self, sequence: list[int], corpora: list[list[list[int]]]) -> None:
        self.sequence = sequence
        self._index = SessionIndex()
        self._index.extend(np.array(sequence, np.int32).tobytes())
        self._corpora = [CorpusIndex.build([np.array(each, np.int32) for each in corpus]) for corpus in corpora]
        self._priors = np.array([16 * PRIOR_ONE] + [PRIOR_ONE // (1 + i) for i in range(len(corpora))], np.int64)

    def merged(self, budget: int, rules: DraftRules, threads: int = 1) -> list[tuple[int, ...]]:
        own = self._index.part.ctypes.data
        parts = [own, 0] + [number for i, each in enumerate(self._corpora) for number in (each.part.ctypes.data, 1 + i)]
        record = np.array([own, self._priors.ctypes.data, len(parts) // 2, *parts], np.int64)
        merger = Merger(rules, threads)
        lines = np.array([record.ctypes.data], np.int64)
        trees = merger.draft(lines, np.array([budget], np.int32), 1)
        merger.close()
        return [tuple(node) for node in trees.nodes[0, : trees.counts[0]].tolist()]

    def expected(self, budget: int, rules: DraftRules) -> list[tuple[int, int, int, int]]:
        parts = [TwinPart(np.array(self.sequence, np.int32), 0, 0, True)]
        parts += [TwinPart(each.flat, 1 + i, 1 + i, False) for i, each in enumerate(self._corpora)]
        priors = dict(enumerate(self._priors.tolist()))
        return merged(occurrences(parts, self.sequence, priors, rules), budget, rules)

    def drafts(self, budget: int, rules: DraftRules = EVERYTHING) -> list[int]:
        return [token for token, *_ in self.merged(budget, rules)]


@given(sequence=words, corpora=corpora, budget=st.integers(1, 12), rules=rules)
def test_a_merge_takes_the_nodes_that_its_definition_does(
    sequence: list[int], corpora: list[list[list[int]]], budget: int, rules: DraftRules
) -> None:
    setting = Setting(sequence, corpora)
    assert setting.merged(budget, rules) == setting.expected(budget, rules)


@given(sequence=words, corpora=corpora, budget=st.integers(1, 12))
def test_a_chain_is_a_tree_with_one_branch(sequence: list[int], corpora: list[list[list[int]]], budget: int) -> None:
    nodes = Setting(sequence, corpora).merged(budget, EVERYTHING)
    assert chain_of(nodes) == list(range(len(nodes)))


def test_a_chain_follows_the_first_child_of_each_node() -> None:
    nodes = [(7, -1), (8, -1), (1, 1), (2, 0), (3, 3), (4, 2)]
    assert chain_of(nodes) == [0, 3, 4]


def test_what_followed_the_longest_match_is_drafted() -> None:
    setting = Setting([5, 1, 2, 3], [[[9, 1, 2, 3, 8, 8], [5, 1, 2, 3, 7, 6, 4]]])
    assert setting.drafts(3) == [7, 6, 4]


def test_what_followed_more_often_is_drafted_among_equal_matches() -> None:
    setting = Setting([1, 2], [[[1, 2, 7, 7], [1, 2, 8, 8], [1, 2, 8, 9, 9]]])
    assert setting.drafts(1) == [8]


def test_the_end_of_a_document_is_never_crossed() -> None:
    assert Setting([1, 2], [[[1, 2, 3], [4, 5]]]).drafts(8) == [3]


def test_the_end_of_a_document_leaves_the_drafts_to_the_others() -> None:
    assert Setting([5, 1, 2], [[[5, 1, 2], [1, 2, 6, 7]]]).drafts(2) == [6, 7]


def test_of_equal_weights_the_longer_match_goes_first() -> None:
    capped = replace(EVERYTHING, match_cap=1)
    assert Setting([1, 2], [[[3, 2, 8], [1, 2, 7]]]).drafts(1, capped) == [7]


def test_of_equal_matches_the_later_place_goes_first() -> None:
    assert Setting([1, 2], [[[1, 2, 8], [1, 2, 7]]]).drafts(1) == [7]


def test_a_depth_of_factor_times_the_match_is_not_exceeded() -> None:
    setting = Setting([1, 2], [[[1, 2, 3, 4, 5, 6, 7, 8]]])
    assert setting.drafts(8, replace(EVERYTHING, factor=1.5)) == [3, 4, 5]


def test_a_path_ends_where_its_share_falls_below_the_least() -> None:
    setting = Setting([1, 2], [[[1, 2, 3, 4, 4], [1, 2, 3, 5, 5], [1, 2, 3, 6, 6]]])
    assert setting.drafts(8, replace(EVERYTHING, share_min=0.5)) == [3]


def test_h46_a_hundred_corpora_share_a_budget_of_four() -> None:
    useless = [[[50, 51, 52, 53]]] * 99
    assert Setting([1, 2, 3], [*useless, [[1, 2, 3, 4, 5, 6, 7, 8]]]).drafts(4) == [4, 5, 6, 7]


@pytest.mark.parametrize("budget", [1, 3])
def test_h46_the_budget_caps_nodes_and_no_source_is_left_out(budget: int) -> None:
    several = [[[1, 2, 3, 10 + i, 20 + i]] for i in range(5)]
    nodes = Setting([1, 2, 3], several).merged(budget, replace(EVERYTHING, branches=8))
    assert len(nodes) == budget
    assert len(Setting([1, 2, 3], several).merged(64, replace(EVERYTHING, branches=8))) == 10

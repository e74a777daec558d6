"""An index of a corpus: its order, its file, and what a build does when it is told to stop."""

import threading
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sessile.draft.corpus_file import HEADER_BYTES, LABEL_BYTES, stored_checksum, write_corpus
from sessile.draft.corpus_index import CorpusIndex
from sessile.draft.suffixes import SMALL_SORT, TOKEN_ID_MAX
from sessile.errors import BuildCancelled, CorpusFileError, InvalidRequest
from tests.unit.draft_twin import sorted_positions

Ints = npt.NDArray[np.int32]

few_words = st.lists(st.lists(st.integers(0, 3), max_size=120), max_size=6)


def array(tokens: list[int]) -> Ints:
    return np.array(tokens, np.int32)


def random_documents(tokens: int, vocabulary: int, seed: int) -> list[Ints]:
    random = np.random.default_rng(seed)
    text = random.integers(0, vocabulary, tokens, np.int32)
    return np.array_split(text, 7)


@given(documents=few_words, copies=st.integers(0, 3))
def test_positions_are_sorted_by_what_stands_before_them(documents: list[list[int]], copies: int) -> None:
    arrays = [array(document) for document in documents + documents[:1] * copies]
    index = CorpusIndex.build(arrays)
    assert index.positions.tolist() == sorted_positions(index.flat)


@pytest.mark.parametrize("vocabulary", [1, 2, 50])
def test_groups_larger_than_what_is_sorted_by_insertion_are_sorted_too(vocabulary: int) -> None:
    index = CorpusIndex.build(random_documents(40 * SMALL_SORT, vocabulary, seed=vocabulary))
    assert index.positions.tolist() == sorted_positions(index.flat)


def test_h45_an_index_does_not_depend_on_the_threads_that_built_it() -> None:
    documents = random_documents(5_000, 20, seed=1)
    alone = CorpusIndex.build(documents, threads=1)
    assert np.array_equal(alone.positions, CorpusIndex.build(documents, threads=5).positions)


def test_an_index_takes_eight_bytes_a_token() -> None:
    index = CorpusIndex.build(random_documents(10_000, 1_000, seed=2))
    assert (index.tokens, index.documents) == (10_000, 7)
    assert index.resident_bytes <= 8.1 * index.tokens


def test_documents_may_lie_behind_each_other_in_one_array() -> None:
    documents = random_documents(500, 20, seed=3)
    starts = np.cumsum([0] + [len(each) for each in documents[:-1]]).tolist()
    flat = CorpusIndex.build_flat(np.concatenate(documents), starts)
    assert np.array_equal(flat.positions, CorpusIndex.build(documents).positions)


@pytest.mark.parametrize("token", [-1, TOKEN_ID_MAX + 1])
def test_a_number_that_is_no_token_is_refused_with_its_document(token: int) -> None:
    with pytest.raises(InvalidRequest, match="document 1"):
        CorpusIndex.build([array([1]), array([2, token])])


def test_the_largest_token_has_its_place_in_the_order() -> None:
    index = CorpusIndex.build([array([0, TOKEN_ID_MAX] * 20)])
    assert index.positions.tolist() == sorted_positions(index.flat)


def test_a_build_stops_when_it_is_told_to() -> None:
    with pytest.raises(BuildCancelled):
        CorpusIndex.build(random_documents(1_000, 20, seed=4), threads=2, is_cancelled=lambda: True)


def test_a_build_that_stops_leaves_no_thread_behind() -> None:
    before = threading.active_count()
    with pytest.raises(BuildCancelled):
        CorpusIndex.build(random_documents(1_000, 20, seed=4), threads=4, is_cancelled=lambda: True)
    assert threading.active_count() == before


def test_progress_rises_to_one() -> None:
    told: list[float] = []
    CorpusIndex.build(random_documents(5_000, 20, seed=5), progress=told.append)
    assert told == sorted(told) and told[-1] == 1.0


@pytest.fixture
def saved(tmp_path: Path) -> tuple[CorpusIndex, Path]:
    index = CorpusIndex.build(random_documents(2_000, 30, seed=6))
    index.save(tmp_path / "corpus")
    return index, tmp_path / "corpus"


@pytest.mark.parametrize("verify", [True, False])
def test_an_index_that_was_saved_is_loaded_as_it_was(saved: tuple[CorpusIndex, Path], verify: bool) -> None:
    index, path = saved
    loaded = CorpusIndex.load(path, verify=verify)
    assert np.array_equal(loaded.flat, index.flat) and np.array_equal(loaded.positions, index.positions)
    assert (loaded.tokens, loaded.documents) == (index.tokens, index.documents)


def test_sections_of_a_file_are_aligned_for_whoever_maps_them(saved: tuple[CorpusIndex, Path]) -> None:
    loaded = CorpusIndex.load(saved[1])
    assert loaded.flat.ctypes.data % 64 == 0 and loaded.positions.ctypes.data % 64 == 0


def test_an_empty_corpus_is_saved_and_loaded(tmp_path: Path) -> None:
    CorpusIndex.build([]).save(tmp_path / "empty")
    assert CorpusIndex.load(tmp_path / "empty").tokens == 0


def test_an_index_cannot_be_written_to(saved: tuple[CorpusIndex, Path]) -> None:
    for index in (saved[0], CorpusIndex.load(saved[1])):
        with pytest.raises(ValueError, match="read-only"):
            index.positions[0] = 1


@pytest.mark.parametrize("length", [0, 5, HEADER_BYTES, HEADER_BYTES + 1000, -1])
def test_a_truncated_file_is_refused(saved: tuple[CorpusIndex, Path], length: int) -> None:
    whole = saved[1].read_bytes()
    saved[1].write_bytes(whole[:length])
    with pytest.raises(CorpusFileError, match="bytes where|no corpus"):
        CorpusIndex.load(saved[1], verify=False)


def test_a_label_comes_back_and_the_checksum_is_of_it_too(saved: tuple[CorpusIndex, Path], tmp_path: Path) -> None:
    index, plain = saved
    index.save(tmp_path / "labelled", label=b"of this model")
    assert CorpusIndex.load(tmp_path / "labelled").label == b"of this model".ljust(LABEL_BYTES, b"\0")
    assert CorpusIndex.load(plain).label == bytes(LABEL_BYTES)
    assert stored_checksum(tmp_path / "labelled") != stored_checksum(plain)


@pytest.mark.parametrize("offset", [17, 50, 70, HEADER_BYTES + 3, -1])
def test_a_damaged_file_is_refused(saved: tuple[CorpusIndex, Path], offset: int) -> None:
    whole = bytearray(saved[1].read_bytes())
    whole[offset] ^= 1
    saved[1].write_bytes(whole)
    with pytest.raises(CorpusFileError, match="damaged"):
        CorpusIndex.load(saved[1])


@pytest.mark.parametrize(
    ("section", "at", "value"),
    [("positions", 0, -1), ("positions", 7, 0), ("positions", -1, 1 << 30), ("tokens", 5, -2), ("tokens", 5, 1 << 30),
     ("tokens", 0, 3), ("tokens", -1, 3)],
)  # fmt: skip
def test_what_no_index_holds_is_refused_though_its_checksum_is_right(
    saved: tuple[CorpusIndex, Path], section: str, at: int, value: int
) -> None:
    index, path = saved
    arrays = {"tokens": index.flat.copy(), "positions": index.positions.copy()}
    arrays[section][at] = value
    write_corpus(path, arrays["tokens"], arrays["positions"], index.documents)
    with pytest.raises(CorpusFileError, match="is no index"):
        CorpusIndex.load(path)


def test_more_documents_than_tokens_are_refused(saved: tuple[CorpusIndex, Path]) -> None:
    index, path = saved
    write_corpus(path, index.flat, index.positions, 1 << 40)
    with pytest.raises(CorpusFileError, match="is no index"):
        CorpusIndex.load(path)


def test_a_file_of_another_version_is_refused_with_both_numbers(saved: tuple[CorpusIndex, Path]) -> None:
    whole = bytearray(saved[1].read_bytes())
    whole[8] = 9
    saved[1].write_bytes(whole)
    with pytest.raises(CorpusFileError, match="format 9 .* reads 1"):
        CorpusIndex.load(saved[1])


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("words " * 100)
    with pytest.raises(CorpusFileError, match="no corpus"):
        CorpusIndex.load(tmp_path / "notes.txt")


def test_a_save_that_fails_leaves_what_was_there(saved: tuple[CorpusIndex, Path], tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder"):
        saved[0].save(tmp_path / "folder")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus", "folder"]

"""The bench of drafts, small enough to run in seconds: what it measures is there, and texts are held out."""

import re

import numpy as np
import pytest

from sessile.bench.drafts import (
    NEAR_COPY_SHARE,
    DraftBenchOptions,
    Source,
    drafted,
    drafter_over,
    measure_drafts,
    without_near_copies,
)
from sessile.draft.corpus_index import CorpusIndex


def source(tokens: list[int]) -> Source:
    return Source("package", np.array(tokens, np.int32))


def test_near_copies_are_left_out_and_what_shares_a_little_stays() -> None:
    corpus = [source(list(range(1000)))]
    copy, other = source(list(range(400, 900))), source(list(range(2000, 2500)))
    shared = int(NEAR_COPY_SHARE * 400)
    partly = source([*range(shared), *range(3000, 3400)])
    assert without_near_copies([copy, other, partly], corpus) == [other, partly]


def test_a_text_that_the_corpus_has_takes_a_step_for_every_draft_and_one() -> None:
    text = np.arange(1201, dtype=np.int32)
    tally = drafted(drafter_over([CorpusIndex.build([text])]), [text], drafts_max=11)
    assert tally.emitted == 1200
    assert 1200 / 12 <= tally.steps <= 1200 / 12 + 3


def test_without_a_match_a_step_emits_one_token() -> None:
    text = np.arange(100, dtype=np.int32)
    assert drafted(drafter_over([]), [text], drafts_max=11).tokens_a_step == 1.0


def test_the_whole_bench_runs_on_little_text(capsys: pytest.CaptureFixture[str]) -> None:
    options = DraftBenchOptions(corpus_tokens=5_000, held_out_tokens=1_000, rows=4, rounds=3, threads=1)
    assert measure_drafts(options) in (0, 1)
    printed = capsys.readouterr().out
    for line in ("sequence and corpus", "bytes a token", "4 rows × 4 corpora", "64 distractors"):
        assert re.search(rf"{line}.* \d+\.\d+ ", printed), line

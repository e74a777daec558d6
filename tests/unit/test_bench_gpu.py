"""What `make gpu-bench` measures beside steps and turns, on a tiny shape on the CPU: drafts as recorded, cold sessions,
requests that end by themselves."""

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from sessile.bench import gpu_reclaimed, gpu_shapes
from sessile.bench.gpu_reclaimed import output_lengths, print_cold, print_open_ended, stops_at
from sessile.bench.gpu_replay import Expected
from sessile.bench.gpu_shapes import SHAPES, ShapeEngine
from sessile.bench.gpu_speculate import SpeculationBench
from sessile.bench.speculate_record import MATCH_MAX, RECORDED, RecordedAnswer, Recording, agreeing, recorded
from sessile.core.limits import SchedulerOptions
from sessile.draft.corpus_index import CorpusIndex
from sessile.draft.pace import LateScale, StepTimes
from sessile.draft.shelf import OPERATOR, Shelf
from sessile.engine.config import EngineOptions

TINY = SHAPES["8B"] | {
    "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32,
    "intermediate_size": 64, "vocab_size": 4096, "max_position_embeddings": 1024, "dtype": "float32",
}  # fmt: skip
SCHEDULER = SchedulerOptions(rows_max=8, audit_level=2)
FREE, DEAR = StepTimes((1, 1000), (1_000_000, 1_000_001)), StepTimes((1, 2), (1_000_000, 3_000_000))


def answer_of(tokens: int, offered: int, accepted: int, prompt_tokens: int = 20) -> RecordedAnswer:
    """An answer with the same at every place, as far as it goes."""
    left = range(tokens, 0, -1)
    return RecordedAnswer(
        prompt_tokens, (12,) * tokens, tuple(min(offered, n) for n in left), tuple(min(accepted, n) for n in left)
    )


@pytest.fixture(autouse=True)
def tiny_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(gpu_shapes.SHAPES, "tiny", TINY)


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[ShapeEngine]:
    engine = ShapeEngine("tiny", tmp_path, SCHEDULER, EngineOptions())
    yield engine
    engine.close()


def bench_of(folder: Path, answer: RecordedAnswer, times: StepTimes) -> SpeculationBench:
    bench = SpeculationBench("tiny", folder, SCHEDULER, EngineOptions(), Recording("m", 7, {"edit": (answer,) * 4}))
    bench.drafter.late = LateScale(times)
    return bench


def test_as_many_drafts_are_accepted_as_were_recorded(tmp_path: Path) -> None:
    bench = bench_of(tmp_path, answer_of(24, offered=5, accepted=3), FREE)
    for batch in (1, 3):
        pairs = bench.measure("edit", batch, 1)
        (counts,) = pairs.counts
        assert counts.with_drafts == counts.as_recorded > 0
        assert pairs.tokens == 24 * batch
        # Behind the first token five steps emit four each; near the end fewer drafts fit.
        assert 5 * 3 * batch <= counts.accepted < counts.offered
        assert len(pairs.ratios) == len(pairs.noise) == 1 and "100.0% of these steps as recorded" in pairs.line()
    bench.close()


def test_the_pace_of_service_decides_how_many_drafts_are_offered(tmp_path: Path) -> None:
    bench = bench_of(tmp_path, answer_of(24, offered=5, accepted=0), DEAR)
    pairs = bench.measure("edit", 2, 1)
    bench.close()
    assert pairs.counts[0].asked > 0 and pairs.counts[0].offered == 0
    assert "the pace let nothing be drafted" in pairs.line()


def test_drafts_that_are_always_wrong_are_offered_less_and_less(tmp_path: Path) -> None:
    late = StepTimes((1, 1000), (1_000_000, 1_000_001), late_ns=500_000)
    bench = bench_of(tmp_path, answer_of(64, offered=5, accepted=0), late)
    (counts,) = bench.measure("edit", 1, 1).counts
    bench.close()
    assert counts.accepted == 0 and 0 < counts.with_drafts < counts.asked / 2


def test_steps_that_accept_something_else_than_recorded_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = bench_of(tmp_path, answer_of(16, offered=4, accepted=4), FREE)
    monkeypatch.setattr(Expected, "learn", lambda self, said: setattr(self, "tokens", [token ^ 2 for token in said]))
    pairs = bench.measure("edit", 1, 1)
    bench.close()
    assert pairs.counts[0].with_drafts > pairs.counts[0].as_recorded == 0


def test_a_recording_is_read_as_it_was_written(tmp_path: Path) -> None:
    answers = (RecordedAnswer(7, (0, 9, MATCH_MAX), (0, 2, 1), (0, 1, 1)), answer_of(4, 2, 1))
    recording = Recording("a model", 7, {"edit": answers, "chat": ()})
    recording.write(tmp_path / "kept.json")
    assert Recording.read(tmp_path / "kept.json") == recording


def test_what_a_corpus_knows_is_recorded_as_right() -> None:
    shelf = Shelf()
    said = list(range(100, 120))
    shelf.put(OPERATOR, "known", CorpusIndex.build([np.array([5, 6, 7, 8, *said], np.int32)]))
    answer = recorded(shelf, ("known",), [5, 6, 7, 8], said, 7)
    assert (answer.prompt_tokens, answer.tokens) == (4, 20)
    assert answer.offered == answer.accepted and answer.offered[:2] == (7, 7) and answer.offered[-2:] == (2, 1)
    assert answer.matches[0] == 4 and answer.matches[5] == 9


def test_drafts_agree_up_to_the_first_that_does_not() -> None:
    assert [agreeing(drafts, [1, 2, 3]) for drafts in ([], [1, 2], [1, 9, 3], [9], [1, 2, 3, 4])] == [0, 2, 1, 0, 3]


def test_the_recording_that_is_shipped_has_every_workload_of_the_targets() -> None:
    recording = Recording.read(RECORDED)
    assert set(recording.workloads) == {"edit", "documents", "json", "chat", "earlier"}
    assert recording.drafts_max == 7 and RECORDED.stat().st_size < 100_000
    for answers in recording.workloads.values():
        assert 16 <= len(answers) <= 32 and all(max(answer.offered) <= 7 for answer in answers)
    right = {name: np.mean([sum(answer.accepted) / answer.tokens for answer in answers])
             for name, answers in recording.workloads.items()}  # fmt: skip
    assert right.pop("chat") < 1 < 3 < min(right.values())


def test_a_cold_turn_computes_its_history_again_and_a_warm_one_does_not(
    engine: ShapeEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    print_cold(engine, "tiny", 200, 2)
    printed = capsys.readouterr().out
    assert re.search(r"tiny cold, 200 tokens of history: first token after [\d.]+ ms warm, [\d.]+ ms cold", printed)


def test_requests_that_end_by_themselves_end_where_it_was_learned(
    engine: ShapeEngine, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_reclaimed, "OPEN_PROMPT_TOKENS", 16)
    monkeypatch.setattr(gpu_reclaimed, "OPEN_OUTPUT_TOKENS", 12)
    print_open_ended(engine, "tiny", 12, 2)
    printed = capsys.readouterr().out
    assert "0 of 48 outputs were longer or shorter" in printed and "unset / exact" in printed


def test_an_output_is_stopped_by_the_first_token_from_its_end_on_that_is_new() -> None:
    assert stops_at([5, 6, 7, 8, 9], 3) == ((7, 8, 9), 3)
    assert stops_at([5, 6, 5, 8, 8], 3) == ((8,), 4)
    with pytest.raises(AssertionError, match="nothing new"):
        stops_at([5, 5, 5], 2)


def test_lengths_are_the_same_every_time_and_around_their_mean() -> None:
    lengths = output_lengths(256)
    assert lengths == output_lengths(256) and 230 < np.mean(lengths) < 280
    assert min(lengths) < 128 and 400 < max(lengths) <= 640

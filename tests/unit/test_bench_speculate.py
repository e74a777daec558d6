"""The bench of speculation, on a tiny model: loops are cut, intervals are always the same, every workload runs."""

import re
from pathlib import Path

import pytest

from sessile.bench.intervals import median_interval
from sessile.bench.speculate import (
    LENGTH_MIN,
    LOOP_TOKENS,
    SpeculateBenchOptions,
    distinct_share,
    loop_end,
    measure_speculation,
)
from sessile.bench.speculate_loads import LOADS, PROMPTS, Texts
from sessile.bench.speculate_record import Recording
from sessile.errors import StartupError
from sessile.text.load import load_tokenizer
from tests.unit.tiny_folder import write_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize("period", [1, 5, LOOP_TOKENS])
def test_an_answer_ends_with_the_third_time_of_its_period(period: int) -> None:
    start, loop = list(range(1000, 1007)), list(range(period))
    assert loop_end([*start, *loop * 6]) == len(start) + 3 * period


def test_what_comes_twice_or_with_a_longer_period_is_kept_whole() -> None:
    for tokens in ([*range(100, 120)] * 2, [*range(LOOP_TOKENS + 1)] * 4, [1, 1, 2, 2, 1, 1, 2, 3]):
        assert loop_end(tokens) == len(tokens)


def test_a_loop_shows_in_the_share_of_distinct_grams() -> None:
    assert distinct_share([list(range(50))]) == 1.0
    assert distinct_share([list(range(5)) * 10, list(range(50))]) == (5 + 47) / (47 + 47)


def test_an_interval_is_the_same_every_time_and_holds_the_median() -> None:
    ratios = [1.9, 2.0, 2.1, 2.2, 1.4]
    low, high = median_interval(ratios)
    assert (low, high) == median_interval(ratios)
    assert 1.4 <= low <= 2.0 <= high <= 2.2


def test_every_load_has_a_prompt_for_each_row_of_the_largest_batch() -> None:
    texts = Texts(load_tokenizer("default"))
    for make in LOADS.values():
        load = make(texts)
        assert len({tuple(prompt) for prompt in load.prompts}) == PROMPTS
        assert load.documents


def test_prompts_are_the_same_every_time() -> None:
    tokenizer = load_tokenizer("default")
    for make in LOADS.values():
        assert make(Texts(tokenizer)).prompts == make(Texts(tokenizer)).prompts


@pytest.mark.long
def test_the_whole_bench_runs_on_a_tiny_model_and_outputs_are_equal(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = SpeculateBenchOptions(
        model=str(model), load_format="dummy", batches="1,2", pairs=2, tokens=24, drafts_max=5, loops="keep"
    )
    assert measure_speculation(options) in (0, 1)
    printed = capsys.readouterr().out
    for workload in "abcdef":
        assert f"({workload})" in printed
    assert len(re.findall(r" equal ", printed)) == 2 * (5 * 2 + 5)
    assert "differ" not in printed


def test_a_corpus_of_the_models_own_answers_takes_fewer_steps(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = SpeculateBenchOptions(
        model=str(model), load_format="dummy", workloads="earlier", batches="1", pairs=4, tokens=24, loops="keep"
    )
    measure_speculation(options)
    drafted = re.search(r"\+ corpus: .*corpus:earlier (\d+)/(\d+)", capsys.readouterr().out)
    assert drafted and int(drafted[1]) > 0


def test_a_recording_has_every_place_of_every_answer(model: Path, tmp_path: Path) -> None:
    kept = tmp_path / "recorded.json"
    options = SpeculateBenchOptions(
        model=str(model), load_format="dummy", workloads="chat,earlier", batches="8", tokens=12, drafts_max=3,
        loops="keep", record=str(kept),
    )  # fmt: skip
    assert measure_speculation(options) == 0
    recording = Recording.read(kept)
    assert recording.drafts_max == 3 and list(recording.workloads) == ["chat", "earlier"]
    for answers in recording.workloads.values():
        # Answers that this model ends by itself before they say anything are left out.
        assert 0 < len(answers) <= PROMPTS and all(LENGTH_MIN <= answer.tokens <= 12 for answer in answers)
    right = {name: sum(sum(answer.accepted) for answer in answers) for name, answers in recording.workloads.items()}
    assert right["earlier"] > 2 * right["chat"], "what the model said before, it says again"


def test_more_drafts_than_a_digit_holds_are_not_recorded(model: Path, tmp_path: Path) -> None:
    options = SpeculateBenchOptions(
        model=str(model), load_format="dummy", drafts_max=36, record=str(tmp_path / "recorded.json")
    )
    with pytest.raises(StartupError, match="lower --drafts-max"):
        measure_speculation(options)


@pytest.mark.parametrize(("workloads", "batches"), [("edit,nothing", "1"), ("edit", "0"), ("edit", "1,many")])
def test_unknown_workloads_and_batches_are_refused(model: Path, workloads: str, batches: str) -> None:
    with pytest.raises(StartupError, match="--(workloads|batches)"):
        measure_speculation(
            SpeculateBenchOptions(model=str(model), load_format="dummy", workloads=workloads, batches=batches)
        )

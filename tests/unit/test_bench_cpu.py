"""The benches of the CPU read what other engines print, and judge distances as they say."""

import sys

import pytest
import torch

from sessile.bench.cpu import PREFILL, CpuBenchOptions, Figures, OwnArm, PeerArm, read_rates, table_of
from sessile.bench.quality import MEAN_KL_MAX, Distance, parts_of, prose
from sessile.errors import StartupError


def test_the_lines_of_a_peer_are_read() -> None:
    text = "ov None B=1 decode 131.5 tok/s (7.6 ms/step)\nB=32 decode 972 tok/s\nov None prefill2048 2559 tok/s\n"
    assert read_rates(text) == {"batch 1": 131.5, "batch 32": 972.0, PREFILL: 2559.0}


def test_a_peer_is_run_once_a_round() -> None:
    arm = PeerArm(f"""other={sys.executable} -c 'print("B=8 decode 10.5 tok/s")'""")
    arm.run()
    arm.run()
    assert arm.figures == Figures("other", {"batch 8": [10.5, 10.5]})


@pytest.mark.parametrize(
    ("entry", "says"),
    [("nameless", "NAME=COMMAND"), ("a=/no/such/program", "by hand"), (f"a={sys.executable} -c 1", "printed no rate")],
)
def test_a_peer_that_cannot_be_measured_is_refused(entry: str, says: str) -> None:
    with pytest.raises(StartupError, match=says):
        PeerArm(entry).run()


@pytest.mark.parametrize(
    ("way", "says"),
    [("nosuch:auto", "nosuch:auto.*must be one of"), ("native:int7", "must be one of"),
     ("native:auto:auto:none:int7", "must be one of"), ("native:auto:auto:none:auto:more", "more than five")],
)  # fmt: skip
def test_ways_of_ours_that_are_none_are_refused(way: str, says: str) -> None:
    with pytest.raises(StartupError, match=says):
        OwnArm(way, CpuBenchOptions(), [1])


@pytest.mark.parametrize(
    "way", ["", "float32", "bfloat16:int7", "bfloat16:auto:none:int7", "float32:none:none:auto:x"]
)
def test_ways_to_compare_that_are_none_are_refused(way: str) -> None:
    with pytest.raises(StartupError, match="is no DTYPE:QUANTIZE"):
        parts_of(way)


def test_what_a_way_to_compare_leaves_out_is_nothing_that_rounds() -> None:
    assert parts_of("bfloat16:auto") == ["bfloat16", "auto", "none", "auto"]
    assert parts_of("float32:none:none:model") == ["float32", "none", "none", "model"]


def test_arms_that_lack_a_figure_are_not_compared() -> None:
    table = table_of([Figures("ours", {"batch 1": [10.0, 20.0]}), Figures("theirs", {"batch 1": [10.0]})], 2)
    assert [list(column.cells) for column in table.columns] == [
        ["batch 1", "batch 1"], ["ours", "theirs"], ["15", "not measured"], ["", ""], ["10 20", ""],
    ]  # fmt: skip


def test_a_ratio_is_taken_within_a_round() -> None:
    ours, theirs = [10.0, 30.0, 20.0], [5.0, 15.0, 20.0]
    table = table_of([Figures("ours", {"batch 1": ours}), Figures("theirs", {"batch 1": theirs})], 3)
    row = [list(column.cells)[1] for column in table.columns]
    assert row == ["batch 1", "theirs", "15", "2.00 [1.00–2.00]", "5 15 20"]


def test_a_distribution_is_no_distance_from_itself() -> None:
    distance, logits = Distance(), torch.randn(5, 11, generator=torch.Generator().manual_seed(0))
    distance.add(logits, logits + 3)  # logits are up to a constant
    assert distance.mean_kl == pytest.approx(0, abs=1e-6)
    assert distance.top_1 == 1 and distance.passes


def test_a_distribution_that_is_far_away_does_not_pass() -> None:
    distance = Distance()
    distance.add(torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 2.0]]))
    assert distance.top_1 == 0 and distance.mean_kl > MEAN_KL_MAX and not distance.passes


def test_there_is_prose_enough_in_the_standard_library() -> None:
    texts = list(prose())
    assert sum(map(len, texts)) > 100_000

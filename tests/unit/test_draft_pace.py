"""How many drafts are worth it, given a table of step times and what was accepted before."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sessile.draft.pace import JUDGED_MAX, LATE_SCALE_MAX, Acceptance, LateScale, StepTimes, affordable
from sessile.draft.weighing import GAIN_MIN, SHARED_GAIN_MIN
from tests.unit.weighed import chances_of, learned_by, plain_ns, step_ns, worthwhile

FREE = StepTimes((1, 1000), (1_000_000, 1_000_001))
LINEAR = StepTimes((1, 2), (1_000_000, 2_000_000))
"""Every token costs as much as the first: a draft can at best come out even."""


def limits(chances: list[list[float]], times: StepTimes, tokens: int | None = None) -> list[int]:
    return worthwhile(np.array(chances), len(chances), tokens or len(chances), LateScale(times)).tolist()


def affords(
    lines: list[Acceptance], matches: list[int], allowed: list[int], late: LateScale, *, begins: bool = True
) -> list[int]:
    told = learned_by(lines), np.array(matches, np.int32), np.array(allowed, np.int32)
    return affordable(*told, len(lines), late, begins=begins).tolist()


def rest(line: Acceptance) -> None:
    """A step in which nothing matches."""
    assert affords([line], [0], [1], LateScale(FREE)) == [0]


def test_h50_where_a_token_costs_as_much_as_a_step_nothing_is_drafted() -> None:
    assert limits([[0.9, 0.8, 0.7]] * 4, LINEAR) == [0, 0, 0, 0]


def test_where_tokens_are_free_every_likely_draft_is_verified() -> None:
    assert limits([[0.9, 0.8, 0.7], [0.5, 0.2, 0.1]], FREE) == [3, 3]


def test_a_line_without_a_match_gets_no_drafts() -> None:
    assert limits([[0.0, 0.0], [0.9, 0.5]], FREE) == [0, 2]


def test_the_likeliest_drafts_of_all_lines_are_taken_first() -> None:
    times = StepTimes((1, 5, 6), (100, 110, 1_000))
    assert limits([[0.9, 0.3], [0.8, 0.7]], times) == [1, 2]


def test_h50_what_a_late_part_costs_must_be_gained_first() -> None:
    late = StepTimes((1, 1000), (1_000_000, 1_000_001), late_ns=2_000_000)
    assert limits([[0.9, 0.8]], FREE) == [2]
    assert limits([[0.9, 0.8]], late) == [0]


def test_h50_what_a_late_part_costs_grows_with_the_lines_that_wait_for_it() -> None:
    late = StepTimes((1, 1000), (1_000_000, 1_000_001), late_line_ns=100_000)
    assert limits([[0.9, 0.8]], late) == [2]
    assert limits([[0.9, 0.8], *[[0.0, 0.0]] * 9], late) == [0] * 10


def test_h50_who_begins_to_draft_pays_for_the_step_behind_the_drafts_too() -> None:
    """It cannot be planned further than to the drafts, so it is late as well."""
    late = StepTimes((1, 1000), (1_000_000, 1_000_001), late_ns=800_000)
    chances = np.array([[0.9, 0.4]])
    assert worthwhile(chances, 1, 1, LateScale(late)).tolist() == [2]
    assert worthwhile(chances, 1, 1, LateScale(late), begins=True).tolist() == [0]


@pytest.mark.parametrize(("gain", "alone", "shared"), [(1.01, 0, 0), (1.05, 1, 0), (1.09, 1, 1)])
def test_h50_drafts_that_keep_others_waiting_begin_for_a_clearer_gain_and_go_on_for_less(
    gain: float, alone: int, shared: int
) -> None:
    """All lines are alike, so that alone and together the mean wait gains the same."""
    times = LateScale(StepTimes((1, 1000), (1_000_000, 1_000_001)))
    chances = np.array([[gain - 1]] * 4)
    assert worthwhile(chances[:1], 1, 1, times, begins=True).tolist() == [alone]
    assert worthwhile(chances, 4, 4, times, begins=True).tolist() == [shared] * 4
    assert worthwhile(chances, 4, 4, times).tolist() == [alone] * 4


def test_h50_a_large_batch_leaves_nothing_for_drafts_where_time_grows_with_it() -> None:
    times = StepTimes((1, 8, 64, 128), (1_000, 1_000, 2_000, 4_000))
    assert limits([[0.5, 0.3]], times) == [2]
    assert limits([[0.5, 0.3]] * 64, times) == [0] * 64


def test_h50_a_step_with_drafts_is_weighed_against_one_without_as_that_is_run() -> None:
    """A GPU has kernels and graphs of its own for steps in which each row runs one token."""
    alike = StepTimes((1, 16), (1_000, 1_001))
    dearer = StepTimes((1, 16), (1_000, 1_001), plain_tokens=(1, 8), plain_times_ns=(500, 500))
    assert limits([[0.9]] * 4, alike) == [1] * 4
    assert limits([[0.9]] * 4, dearer) == [0] * 4


def test_a_step_beyond_those_without_drafts_runs_like_one_that_verifies() -> None:
    times = StepTimes((1, 101), (1_000, 2_000), plain_tokens=(1, 9), plain_times_ns=(400, 800))
    assert [plain_ns(times, tokens) for tokens in (1, 5, 9, 51)] == [400, 600, 800, 1_500]
    assert plain_ns(StepTimes((1, 101), (1_000, 2_000)), 51) == 1_500


@given(
    lines=st.lists(st.lists(st.floats(0, 1), min_size=5, max_size=5), min_size=1, max_size=8),
    steps=st.lists(st.integers(1, 10_000), min_size=2, max_size=6),
    late_ns=st.integers(0, 5_000),
)
def test_h50_the_rate_of_emission_is_never_expected_to_be_lower_than_without(
    lines: list[list[float]], steps: list[int], late_ns: int
) -> None:
    times = StepTimes(tuple(range(1, 1 + 3 * len(steps), 3)), tuple(steps), late_ns)
    chances = np.cumprod(np.array(lines), axis=1)
    taken = worthwhile(chances, len(lines), len(lines), LateScale(times))
    if taken.any():
        emitted = len(lines) + sum(float(row[:count].sum()) for row, count in zip(chances, taken, strict=True))
        with_drafts = emitted / (step_ns(times, len(lines) + int(taken.sum())) + late_ns)
        without = len(lines) / step_ns(times, len(lines))
        assert with_drafts >= (GAIN_MIN - 1e-9) * without


def twin(chances: np.ndarray, lines: int, tokens: int, late: LateScale, *, begins: bool) -> list[int]:
    """What `worthwhile` says, in numpy: of each number of drafts, likeliest first, how long a line waits."""
    order = np.argsort(-chances, axis=None, kind="stable")[: np.count_nonzero(chances)]
    shares = 1 / (1 + np.cumsum(chances, axis=1))
    saved = -np.diff(shares, axis=1, prepend=1.0).ravel()[order]
    steps = np.array([step_ns(late.times, tokens + number + 1) for number in range(len(order))])
    waits = (1 - np.cumsum(saved) / lines) * (steps + (1 + begins) * late.ns(lines))
    gain_min = SHARED_GAIN_MIN if begins and lines > 1 else GAIN_MIN
    worth = waits.argmin() + 1 if len(order) and waits.min() * gain_min <= plain_ns(late.times, tokens) else 0
    return np.bincount(order[:worth] // chances.shape[1], minlength=len(chances)).tolist()


CHANCES = st.lists(st.sampled_from((0.0, 0.3, 0.5, 0.8, 1.0)), min_size=5, max_size=5)


@given(
    lines=st.lists(CHANCES, min_size=1, max_size=9),
    others=st.integers(0, 3),
    steps=st.lists(st.integers(1, 10_000), min_size=2, max_size=6),
    late_ns=st.integers(0, 2_000),
    begins=st.booleans(),
)
def test_compiled_code_weighs_drafts_as_numpy_does(
    lines: list[list[float]], others: int, steps: list[int], late_ns: int, begins: bool
) -> None:
    late = LateScale(StepTimes(tuple(range(1, 1 + 3 * len(steps), 3)), tuple(steps), late_ns))
    chances, served = np.cumprod(np.array(lines), axis=1), len(lines) + others
    found = worthwhile(chances, served, served, late, begins=begins).tolist()
    assert found == twin(chances, served, served, late, begins=begins)


def test_a_step_that_was_measured_faster_than_a_smaller_one_is_taken_to_be_as_slow() -> None:
    times = StepTimes((1, 2, 3), (100, 300, 200))
    assert [step_ns(times, tokens) for tokens in (1, 2, 3)] == [100, 300, 300]


def test_beyond_the_table_time_grows_as_at_its_end() -> None:
    assert [step_ns(LINEAR, tokens) for tokens in (1, 2, 5)] == [1e6, 2e6, 5e6]


def test_an_accepted_draft_makes_the_next_one_likelier() -> None:
    chances = chances_of(Acceptance(), match=2, drafts=8)
    each = np.divide(chances[1:], chances[:-1])
    assert sorted(each) == each.tolist()


def test_h50_a_line_whose_drafts_fail_is_expected_to_fail() -> None:
    line = Acceptance()
    before = chances_of(line, match=3)[0]
    for _ in range(20):
        line.judge(3, False)
    assert chances_of(line, match=3)[0] < before / 4


def test_failures_behind_short_matches_say_nothing_of_long_ones() -> None:
    line = Acceptance()
    before = chances_of(line, match=20)
    for _ in range(20):
        line.judge(1, False)
    assert chances_of(line, match=20) == before


def test_a_line_that_rested_is_tried_again() -> None:
    line = Acceptance()
    before = chances_of(line, match=3)[0]
    for _ in range(20):
        line.judge(3, False)
    for _ in range(300):
        rest(line)
    assert chances_of(line, match=3)[0] > 0.9 * before


def test_what_was_judged_long_ago_fades() -> None:
    line = Acceptance()
    for _ in range(1000):
        line.judge(3, False)
    for _ in range(2 * int(JUDGED_MAX)):
        line.judge(3, True)
    assert chances_of(line, match=3)[0] > 0.7


@pytest.mark.parametrize(
    ("tokens", "times_ns"), [((1,), (1,)), ((2, 1), (1, 1)), ((1, 2), (0, 1)), ((1, 2), (1, 2, 3))]
)
def test_a_table_that_is_none_is_refused(tokens: tuple[int, ...], times_ns: tuple[int, ...]) -> None:
    with pytest.raises(AssertionError):
        StepTimes(tokens, times_ns)


def test_a_line_is_offered_no_more_than_it_allows_and_rests_where_it_is_offered_nothing() -> None:
    lines = [Acceptance(), Acceptance(), Acceptance()]
    for line in lines:
        line.judge(9, is_accepted=True)
    assert affords(lines, [9, 9, 0], [2, 5, 5], LateScale(FREE)) == [2, 5, 0]
    assert [line.rests for line in lines] == [0, 0, 1]


def test_what_a_line_learned_fades_as_much_before_it_is_judged_again_as_behind_it() -> None:
    line, other = Acceptance(), Acceptance()
    for _ in range(5):
        line.judge(9, is_accepted=True)
        other.judge(9, is_accepted=True)
    for _ in range(40):
        rest(line)
    before = chances_of(line, match=9)[0]
    assert chances_of(Acceptance(), match=9)[0] < before < chances_of(other, match=9)[0]
    line.judge(1, is_accepted=False)  # of another class: of this one nothing is learned
    assert line.rests == 0
    assert chances_of(line, match=9)[0] == pytest.approx(before, abs=1e-12)


LATE = StepTimes((1, 1000), (1_000_000, 1_000_001), late_ns=400_000, late_line_ns=100_000)


def test_h50_steps_that_come_later_than_assumed_are_charged_as_they_come() -> None:
    late = LateScale(LATE)
    chances = np.array([[0.9, 0.4]])
    assert late.ns(1) == 500_000 and late.ns(11) == 1_500_000
    assert worthwhile(chances, 1, 1, late).tolist() == [2]
    for _ in range(100):
        late.observe(1, 2 * 750_000)
    assert late.ns(1) == pytest.approx(1_500_000, rel=0.01)
    assert late.ns(11) == pytest.approx(4_500_000, rel=0.01)
    assert worthwhile(chances, 1, 1, late).tolist() == [0]


def test_one_step_that_was_disturbed_says_little_of_the_next() -> None:
    late = LateScale(LATE)
    late.observe(1, 10**9)
    assert late.factor < 1.2
    for _ in range(200):
        late.observe(1, 10**9)
    assert late.factor == pytest.approx(LATE_SCALE_MAX, rel=0.001)


def test_h50_a_machine_that_was_busy_is_tried_again_after_some_hundred_steps_without_drafts() -> None:
    late = LateScale(LATE)
    for _ in range(100):
        late.observe(1, 2_000_000)
    assert affords([Acceptance()], [20], [2], late) == [0]
    steps = 0
    while not affords([Acceptance()], [20], [2], late, begins=False)[0]:
        steps += 1
    assert 50 < steps < 1000


@pytest.mark.parametrize(("drafting", "is_worth_it"), [(1, False), (2, False), (3, True), (4, True)])
def test_h50_a_few_lines_do_not_double_their_pace_at_the_price_of_all_others(drafting: int, is_worth_it: bool) -> None:
    """Of four, and the step takes 1.6 times as long: if two get three tokens of it, it brings twice as many in all."""
    times = LateScale(StepTimes((1, 4, 5, 1000), (1_000, 1_000, 1_600, 1_601)))
    assert worthwhile(np.array([[1.0, 1.0]] * drafting), 4, 4, times).any() == is_worth_it

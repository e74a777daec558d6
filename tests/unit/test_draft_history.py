"""History: what is remembered is found again, by its tenant alone, within its bytes."""

import time
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pytest

from sessile.contract.drafting import DraftWish
from sessile.draft.drafter import LookupDrafter
from sessile.draft.history import SEGMENTS_MAX, History, HistoryLimits
from sessile.draft.lookup import KIND
from sessile.draft.pace import StepTimes
from sessile.draft.shelf import Shelf

Ints = npt.NDArray[np.int32]
SMALL = HistoryLimits(tenant_bytes=32 << 10, total_bytes=64 << 10)


@pytest.fixture
def history() -> Iterator[History]:
    made = History(SMALL)
    yield made
    made.close()


def text(number: int, tokens: int = 40) -> Ints:
    """A text that shares no token with any other."""
    return np.arange(1000 * number, 1000 * number + tokens, dtype=np.int32)


def drafts(history: History, tenant: str, context: Ints, drafts_max: int = 4) -> list[int]:
    drafter = LookupDrafter(Shelf(), StepTimes((1, 2), (1, 1)), history=history)
    index = drafter.new_index()
    index.extend(context.tobytes())
    line = drafter.start(index, DraftWish(tenant, (), drafts_max))
    return [int(token) for token in drafter.draft([line], [drafts_max])[0]]


def test_what_was_remembered_is_drafted(history: History) -> None:
    history.remember("x", text(1))
    assert drafts(history, "x", text(1)[:6]) == text(1)[6:10].tolist()


def test_h51_nothing_that_a_tenant_said_is_drafted_for_another(history: History) -> None:
    history.remember("x", text(1))
    for tenant in ("y", ""):
        assert drafts(history, tenant, text(1)[:6]) == []


def test_a_draft_does_not_run_from_one_text_into_the_next(history: History) -> None:
    history.remember("x", text(1))
    history.remember("x", text(2))
    assert drafts(history, "x", text(1)[:38], drafts_max=8) == text(1)[38:].tolist()


def test_texts_are_found_while_their_tail_is_sealed_and_afterwards(history: History) -> None:
    per_tail = SMALL.tail_tokens // 41
    for number in range(3 * per_tail):
        history.remember("x", text(number))
    for number in range(3 * per_tail):
        assert drafts(history, "x", text(number)[:6]) == text(number)[6:10].tolist()


def test_the_oldest_texts_go_first_and_bytes_stay_within_the_tenants(history: History) -> None:
    kept = 0
    for number in range(SEGMENTS_MAX * 4 * SMALL.tail_tokens // 41):
        history.remember("x", text(number))
        assert history.resident_bytes <= SMALL.tenant_bytes
        kept = number
    assert drafts(history, "x", text(0)[:6]) == []
    assert drafts(history, "x", text(kept)[:6]) == text(kept)[6:10].tolist()


def test_all_tenants_together_stay_within_their_bytes_and_the_newest_is_kept(history: History) -> None:
    for number in range(600):
        history.remember(f"tenant-{number % 7}", text(number))
        assert history.resident_bytes <= SMALL.total_bytes
    assert drafts(history, f"tenant-{599 % 7}", text(599)[:6]) == text(599)[6:10].tolist()


def test_of_a_text_that_is_longer_than_a_tail_the_end_is_kept(history: History) -> None:
    long = np.arange(3 * SMALL.tail_tokens, dtype=np.int32)
    history.remember("x", long)
    assert drafts(history, "x", long[-10:-4]) == long[-4:].tolist()
    assert drafts(history, "x", long[:6]) == []
    assert history.resident_bytes <= SMALL.tenant_bytes


def test_h45_when_a_segment_takes_over_does_not_depend_on_how_fast_it_was_sorted() -> None:
    patient, hasty = History(SMALL), History(SMALL)
    for number in range(8 * SMALL.tail_tokens // 41):
        patient.remember("x", text(number))
        time.sleep(0.001)
        hasty.remember("x", text(number))
        kinds = [[int(part[KIND]) for part in each.parts("x")] for each in (patient, hasty)]
        assert kinds[0] == kinds[1]
    patient.close()
    hasty.close()


def test_the_same_line_finds_what_was_remembered_after_it_began(history: History) -> None:
    drafter = LookupDrafter(Shelf(), StepTimes((1, 2), (1, 1)), history=history)
    index = drafter.new_index()
    index.extend(text(700)[:6].tobytes())
    line = drafter.start(index, DraftWish("x", (), 4))
    assert list(drafter.draft([line], [4])[0]) == []
    for number in range(690, 740):
        history.remember("x", text(number))
        found = list(drafter.draft([line], [4])[0])
        assert found == (text(700)[6:10].tolist() if number >= 700 else [])


def test_a_budget_without_room_for_anything_is_refused() -> None:
    with pytest.raises(AssertionError, match="too few"):
        HistoryLimits(tenant_bytes=100)

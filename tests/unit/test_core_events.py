"""What a machine tells of its last events when something is wrong: new steps in full, older ones by their size."""

import pytest

from sessile.contract.messages import Cancel
from sessile.core import events
from tests.unit.stage import Stage


def test_the_newest_steps_are_told_in_full_and_older_ones_by_their_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "STEPS_IN_FULL", 2)
    stage = Stage()
    stage.submit(1, [1, 2, 3], max_new_tokens=6)
    stage.submit(2, [4, 5], max_new_tokens=6)
    stage.step(5)
    told = [line for line in stage.machine.event_lines() if line.startswith(("planned", "settled"))]
    assert told[:6] == [f"{verb} {step}: 2 rows" for step in (1, 2, 3) for verb in ("planned", "settled")]
    assert told[6].startswith("planned 4: row ")
    assert told[7] == "settled 4: emitted [1, 1]"
    assert [line.split(":")[0] for line in told[6:]] == ["planned 4", "settled 4", "planned 5", "settled 5"]


def test_what_came_in_and_who_ended_is_told_in_its_place() -> None:
    stage = Stage()
    stage.submit(7, [1, 2, 3], max_new_tokens=1)
    stage.run()
    stage.send(Cancel(99))
    submitted, planned, *others = stage.machine.event_lines()
    assert submitted == "received Submit 7: 3 tokens, at most 1 new"
    assert planned == "planned 1: row 0 samples 3 at 0; binds [0]; runs [(0, 0, 1)] of pages [1]"
    assert others[:2] == ["settled 1: emitted [1]", "ended 7: length after 1 tokens"]
    assert others[2].startswith("received Cancel(key=99")

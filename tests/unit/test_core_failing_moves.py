"""Whatever single move of pages finds the books wrong, in whatever call: it costs whom it concerns, and nobody else.

One fixed scene is played again and again; each time another move of the ledger fails, before anything has moved, as it
does when a page is not whose it should be.
"""

from typing import Any

import pytest

from sessile.contract.messages import Cancel, Flush, ForkSession, RewindSession
from sessile.contract.model import ModelFacts
from sessile.core.ledger import PageLedger
from sessile.core.marks import Mark
from sessile.errors import OwnershipError
from tests.unit.drafters import ToldDrafter
from tests.unit.stage import VOCABULARY, Stage, expected

NS = 1_000_000_000
FACTS = ModelFacts(vocab_size=VOCABULARY, context_tokens=60, eos_ids=())


class Failing:
    """Counts the moves of a ledger; the one with this number fails."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, number: int | None) -> None:
        self.moves = 0
        self.where = ""
        real = PageLedger._post

        def post(ledger: PageLedger, *arguments: Any) -> None:
            self.moves += 1
            if self.moves == number:
                raise OwnershipError("planted")
            real(ledger, *arguments)

        monkeypatch.setattr(PageLedger, "_post", post)


def scene(**limits: Any) -> tuple[Stage, dict[int, list[int]]]:
    """Sessions that talk, fork, rewind, keep reserves, branch, expire and close, beside plain requests, in a pool that
    is too small for all; returns the stage and the context of every request that was sent without an error before."""
    drafter = ToldDrafter(lambda text, count: [text[-1]] * count, limit=2)
    stage = Stage(
        pages=22, rows=3, chunk=16, facts=FACTS, drafter=drafter, drafts_max=2, contain_violations=True,
        output_estimate_tokens=1, **({"audit_level": 1} | limits),
    )  # fmt: skip
    machine = stage.machine
    contexts: dict[int, list[int]] = {}

    def submit(key: int, tokens: list[int], session: str | None = None, **settings: Any) -> None:
        if session and ("", session) not in machine._books.sessions:
            return  # Its fork was refused: the parent's turn had been rolled back.
        contexts[key] = (stage.history(session) if session else []) + tokens
        stage.submit(key, tokens, session=session, **settings)

    for name in ("a", "b", "c"):
        assert stage.open(name).error is None
    assert stage.open("kept", reserve_tokens=12).error is None
    assert stage.open("idle", idle_timeout_s=5.0).error is None
    for key, name in enumerate(("a", "b", "kept", "idle"), 1):
        submit(key, [key] * 7, name)
        stage.run()
    submit(10, [7] * 9, max_new_tokens=24)
    submit(11, [7] * 9, max_new_tokens=12)
    submit(12, [8] * 5, "c", max_new_tokens=12)
    stage.step(3)
    stage.ask(ForkSession, session="a", child="a2", at_tokens=None)
    stage.ask(ForkSession, session="b", child="b2", at_tokens=6)
    stage.ask(RewindSession, session="b", to_tokens=5)
    submit(13, [9] * 3, "a2")
    submit(14, [9] * 2, "b2")
    stage.launch()
    stage.send(Cancel(11))
    stage.run()
    stage.close("a")
    if ("", "b2") in machine._books.sessions:
        machine.demote("", "b2")
    submit(15, [6] * 16, max_new_tokens=40)
    submit(16, [5] * 16, max_new_tokens=40)
    submit(17, [4] * 4, "kept")
    stage.launch()
    machine.tick(60 * NS)
    stage.run()
    submit(18, [3] * 3, "b")
    stage.run()
    return stage, contexts


def assert_all_is_well(stage: Stage, contexts: dict[int, list[int]]) -> list[int]:
    """Everybody was answered, rightly or with the error; all comes back. Returns whom it cost something."""
    ended = []
    for key, context in contexts.items():
        done = stage.done[key]
        if done.reason == "error":
            assert done.status == 500 and "try again" in done.message
            ended.append(key)
        said = stage.output[key]
        assert said == expected(context, len(said)), f"request {key}"
    stage.machine.audit()
    for _, session in list(stage.machine._books.sessions):
        stage.close(session)
    stage.run()
    stage.ask(Flush)
    stage.launch()  # Whoever plans proves that what is in quarantine is free.
    stats = stage.stats()
    assert (stats.pages_free, stats.pages_quarantine) == (stats.pages_total - 1, 0)
    assert (stats.rows_held, stats.sessions_open) == (0, 0)
    return ended


def moves_of_the_scene() -> range:
    with pytest.MonkeyPatch.context() as monkeypatch:
        counted = Failing(monkeypatch, None)
        stage, contexts = scene()
        moves = counted.moves
        assert not assert_all_is_well(stage, contexts)
        stats = stage.stats()
        assert stats.preemptions_total and stats.evicted_pages_total and stats.demoted_pages_total
        assert stage.machine.marks[Mark.COPIED]
    # The first one makes the scratch page.
    return range(2, moves + 1)


@pytest.mark.parametrize("level", [0, 1, 2])
@pytest.mark.parametrize("number", moves_of_the_scene())
def test_h07_a_move_that_fails_costs_whom_it_concerns(number: int, level: int, monkeypatch: pytest.MonkeyPatch) -> None:
    failing = Failing(monkeypatch, number)
    stage, contexts = scene(audit_level=level)
    assert failing.moves >= number, "the scene is not the same every time"
    assert len(assert_all_is_well(stage, contexts)) <= 2
    assert sum(stage.stats().audit_violations_total.values()) > 0

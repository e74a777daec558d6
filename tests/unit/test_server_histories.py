"""What the server holds of sessions is what their engine had: turn by turn, through forks, rewinds and lost replies."""

import asyncio
import dataclasses
import itertools
from typing import Any

import pytest
from msgspec import structs

from sessile.contract.messages import (
    Batch,
    Branch,
    Cancel,
    CloseSession,
    Done,
    DropTurn,
    ForkSession,
    Grammar,
    OpenSession,
    Reply,
    RestoreSession,
    RewindSession,
    Sampling,
    SessionGone,
    SessionTokens,
    Submit,
    ToEngine,
    pack_tokens,
    unpack_tokens,
)
from sessile.errors import NotReady, TooLong, UserError
from sessile.server.histories import SESSION_BYTES, Histories
from sessile.server.link import refusal_error
from tests.unit.stage import FACTS, Stage, deltas_of

BOS = 1


class Watched:
    """An engine on a stage, and histories that see what passes between it and a client."""

    def __init__(self, bytes_max: int = 1 << 20) -> None:
        self.stage = Stage(facts=dataclasses.replace(FACTS, bos_id=BOS))
        self.histories = Histories(bytes_max, bos_id=BOS)
        self._numbers = itertools.count(1)
        self._take_effects = self.stage.machine.take_effects
        self.stage.machine.take_effects = self._watched_effects  # type: ignore[method-assign]

    def ask(self, kind: type, **fields: Any) -> None:
        self._send(kind(op=next(self._numbers), **fields))

    def turn(self, session: str, tokens: list[int], *, cancel: bool = False, **fields: Any) -> None:
        key = self.begin(session, tokens, **fields)
        if cancel:
            self.stage.step()
            self._send(Cancel(key))
        self.stage.run()

    def begin(self, session: str, tokens: list[int], **fields: Any) -> int:
        """Submit a turn; its key."""
        message = self.message(session, tokens, **fields)
        self._send(message)
        return message.key

    def message(self, session: str, tokens: list[int], **fields: Any) -> Submit:
        sampling = Sampling(seed=0, temperature=0.0, max_new_tokens=fields.pop("new_tokens", 4))
        key = next(self._numbers)
        return Submit(key=key, tokens=pack_tokens(tokens), sampling=sampling, session=session, **fields)

    def delayed(self, session: str, tokens: list[int], **fields: Any) -> Submit:
        """A turn that was sent, and waits in the engine for its grammar: what the core will get of it."""
        message = self.message(session, tokens, grammar=Grammar("regex", "a*"), **fields)
        self.histories.note_sent(message)
        return structs.replace(message, grammar=None)

    def _send(self, message: ToEngine) -> None:
        self.histories.note_sent(message)
        self.stage.send(message)

    def _watched_effects(self) -> Batch | None:
        batch = self._take_effects()
        if batch is not None:
            for key, tokens in deltas_of(batch):
                if key in self.histories.collecting:
                    self.histories.collecting[key].output += pack_tokens(tokens)
            self.histories.note_batch(batch)
        return batch

    def restored(self) -> dict[str, list[int]]:
        """What another engine would be given, by session."""
        asked: list[RestoreSession] = []

        async def ask(make: Any) -> None:
            asked.append(make(0))

        self.histories.note_engine_gone()
        asyncio.run(self.histories.restore(ask))
        return {each.opening.session: unpack_tokens(each.tokens).tolist() for each in asked}

    def truth(self, *sessions: str) -> dict[str, list[int]]:
        """What the engine itself says."""
        return {session: self.stage.history(session) for session in sessions}


def opened(*sessions: str, **settings: Any) -> Watched:
    watched = Watched(**settings)
    for session in sessions or ("s",):
        watched.ask(OpenSession, session=session)
    return watched


def test_committed_turns_are_held_and_aborted_ones_are_not() -> None:
    watched = opened()
    watched.turn("s", [3, 1, 4])
    watched.turn("s", [9, 9], cancel=True)
    watched.turn("s", [5, 9])
    assert watched.restored() == watched.truth("s")


def test_a_beginning_of_sequence_that_the_engine_left_out_is_left_out() -> None:
    watched = opened()
    watched.turn("s", [3, 1, 4])
    watched.turn("s", [BOS, 5])
    assert watched.restored() == watched.truth("s")


def test_forks_and_rewinds_are_followed() -> None:
    watched = opened()
    watched.turn("s", [3, 1, 4])
    watched.turn("s", [5])
    watched.ask(ForkSession, session="s", child="f", at_tokens=9)
    watched.ask(RewindSession, session="s", to_turn=1)
    watched.turn("s", [2])
    watched.turn("f", [8])
    assert watched.restored() == watched.truth("s", "f")


def test_h59_a_reply_that_is_said_again_is_not_a_turn() -> None:
    watched = opened()
    watched.turn("s", [3, 1], rid="one")
    for _ in range(2):
        watched.turn("s", [3, 1], rid="one")
    watched.turn("s", [], rid="empty", new_tokens=0)
    assert watched.restored() == watched.truth("s")


def test_closed_and_expired_sessions_are_forgotten() -> None:
    watched = opened("a", "b", "c")
    watched.ask(CloseSession, session="a")
    watched.histories.note_batch(Batch(step=0, gone=[SessionGone("b", "expired")]))
    assert list(watched.restored()) == ["c"]


def test_memory_is_bounded_and_the_longest_unused_is_let_go_of() -> None:
    watched = opened("a", "b", bytes_max=2 * SESSION_BYTES + 60)
    watched.turn("a", [1] * 8)
    watched.turn("b", [1] * 8)
    assert watched.histories.bytes <= 2 * SESSION_BYTES + 60 and watched.histories.held == 1
    assert list(watched.restored()) == ["b"]
    assert watched.histories.lost_total == 1


def test_output_is_collected_for_sessions_that_are_held_alone() -> None:
    watched = opened(bytes_max=0)
    assert watched.begin("s", [1, 2], new_tokens=9) not in watched.histories.collecting
    other = opened("a", "b", bytes_max=2 * SESSION_BYTES + 60)
    other.turn("a", [1] * 8)
    key = other.begin("a", [1], new_tokens=60)
    other.stage.step(3)
    output = other.histories.collecting[key].output
    assert output
    other.begin("b", [1] * 8)
    other.stage.step(8)
    assert other.histories.held == 1 and not output and not other.histories.collecting
    assert list(other.restored()) == ["b"]


def test_a_lost_session_is_refused_until_it_is_opened_again() -> None:
    watched = opened(bytes_max=0)
    watched.restored()
    question = SessionTokens(1, "s")
    refusal = watched.histories.refusal(question)
    assert refusal is not None and refusal.status == 410
    assert watched.histories.refusal(SessionTokens(1, "s", "another tenant")) is None
    watched.histories.note_sent(OpenSession(op=5, session="s"))
    assert watched.histories.refusal(question) is None


def test_a_history_that_differs_from_what_the_engine_says_is_not_gone_on_from() -> None:
    watched = opened()
    watched.histories.note_sent(Submit(key=7, tokens=pack_tokens([1, 2]), sampling=Sampling(seed=0), session="s"))
    watched.histories.note_batch(Batch(step=0, done=[Done(key=7, reason="stop", prompt_tokens=9, session_tokens=9)]))
    assert watched.restored() == {}


def test_sessions_that_the_next_engine_refuses_are_lost_and_those_that_it_dies_of_are_not() -> None:
    watched = opened("a")

    def fail(error: UserError) -> None:
        async def ask(make: Any) -> Reply:
            raise error

        asyncio.run(watched.histories.restore(ask))

    with pytest.raises(NotReady):
        fail(NotReady("gone"))
    assert watched.histories.held == 1
    fail(TooLong("does not fit"))
    assert (watched.histories.held, watched.histories.lost_total) == (0, 1)


# -- branching sessions -------------------------------------------------------------------------------------------


def branched(**opening: Any) -> Watched:
    """A branching session with a root, two children of it, and a child of one of these."""
    watched = Watched()
    watched.ask(OpenSession, session="b", branching=True, **opening)
    for rid, parent in (("root", None), ("left", "root"), ("right", "root"), ("leaf", "left")):
        branch(watched, rid, parent)
    return watched


def branch(watched: Watched, rid: str, parent: str | None, tokens: tuple[int, ...] = (7, 8), **where: Any) -> None:
    watched.turn("b", list(tokens), rid=rid, branch=Branch(parent=parent, **where))


def given_to(stage: Stage, histories: Histories) -> None:
    """Restore what is held in another engine."""

    async def ask(make: Any) -> None:
        error = stage.ask(lambda op: make(op)).error  # type: ignore[arg-type]
        if error is not None:
            raise refusal_error(error.status, error.code, error.message)

    histories.note_engine_gone()
    asyncio.run(histories.restore(ask))


def twin_of(watched: Watched) -> Stage:
    """Another engine that was given what is held."""
    stage = Stage(facts=dataclasses.replace(FACTS, bos_id=BOS))
    given_to(stage, watched.histories)
    return stage


def nodes(stage: Stage) -> dict[str, tuple[list[int], list[int], int, str | None]]:
    """Every turn of session "b": its history, where turns end in it, where its output begins, its parent."""
    session = stage.machine._books.sessions["", "b"]
    return {
        rid: (
            unpack_tokens(node.history.slice(0, len(node.history))).tolist(),
            list(node.turn_ends),
            node.input_end,
            node.parent.rid if node.parent else None,
        )
        for rid, node in session.nodes.items()
    }


@pytest.mark.parametrize(
    "where",
    [{}, {"offset": 3}, {"offset": -2}, {"drop_previous_output": True}, {"replace": True},
     {"drop_previous_output": True, "offset": -1, "replace": True}],
)  # fmt: skip
def test_the_turns_of_a_branching_session_are_held_wherever_they_go_on(where: dict[str, Any]) -> None:
    watched = branched()
    branch(watched, "more", "left", **where)
    branch(watched, "begun anew", "left", (BOS, 5), **where)
    assert "begun anew" in nodes(watched.stage) and nodes(twin_of(watched)) == nodes(watched.stage)


def test_a_replaced_turn_that_runs_is_held_with_what_it_said() -> None:
    watched = branched()
    key = watched.begin("b", [9], rid="running", branch=Branch(parent="root"), new_tokens=40)
    watched.stage.step(3)
    branch(watched, "instead", "running", replace=True)
    assert key in watched.stage.done and nodes(twin_of(watched)) == nodes(watched.stage)


def test_a_refused_replacement_drops_nothing() -> None:
    watched = branched()
    branch(watched, "refused", "root", (99,), replace=True)
    assert "leaf" in nodes(watched.stage) and nodes(twin_of(watched)) == nodes(watched.stage)


def test_an_aborted_branch_is_no_node_but_has_replaced_what_it_replaced() -> None:
    watched = branched()
    watched.turn("b", [9], rid="aborted", branch=Branch(parent="left", replace=True), cancel=True, new_tokens=40)
    assert set(nodes(watched.stage)) == {"root", "left", "right"}
    assert nodes(twin_of(watched)) == nodes(watched.stage)


def test_restored_turns_are_gone_on_from_and_answered_again() -> None:
    watched = branched()
    twin = twin_of(watched)
    for stage in (watched.stage, twin):
        stage.submit(900, [4], session="b", rid="new", branch=Branch(parent="leaf"))
        stage.submit(901, [7, 8], session="b", rid="right", branch=Branch(parent="root"))
        stage.run()
    assert [twin.output[key] for key in (900, 901)] == [watched.stage.output[key] for key in (900, 901)]
    assert twin.stats().turns_replayed_total == 1


def test_a_restored_branching_session_counts_against_the_limit_of_sessions() -> None:
    watched, stage = branched(), Stage(sessions_max=3)
    given_to(stage, watched.histories)
    assert stage.stats().sessions_open == 0 and watched.histories.lost_total == 1


def test_a_replacement_that_waited_for_its_grammar_while_others_ended_is_not_gone_on_from() -> None:
    watched = branched()
    replacement = watched.delayed("b", [9], rid="instead", branch=Branch(parent="root", replace=True))
    branch(watched, "later", "root")
    watched.stage.send(replacement)
    watched.stage.run()
    assert set(nodes(watched.stage)) == {"root", "instead"}
    assert watched.restored() == {} and watched.histories.lost_total == 1


def test_a_replacement_whose_grammar_was_ready_is_held_whatever_ends_beside_it() -> None:
    watched = branched()
    watched.stage.send(watched.delayed("b", [9], rid="instead", branch=Branch(parent="root", replace=True)))
    watched.stage.step(2)
    branch(watched, "later", "root")
    assert {"instead", "later"} <= set(nodes(watched.stage)) and nodes(twin_of(watched)) == nodes(watched.stage)


def test_a_replacement_that_never_came_in_has_replaced_nothing() -> None:
    watched = branched()
    waiting = watched.delayed("b", [9], rid="instead", branch=Branch(parent="root", replace=True))
    watched.histories.note_batch(Batch(step=0, done=[Done(key=waiting.key, reason="abort", message="cancelled")]))
    assert "leaf" in nodes(watched.stage) and nodes(twin_of(watched)) == nodes(watched.stage)


def test_a_replacement_whose_grammar_failed_under_way_has_replaced_what_it_replaced() -> None:
    watched = branched()
    key = watched.begin("b", [9], rid="instead", branch=Branch(parent="root", replace=True), new_tokens=40)
    watched.stage.step(2)
    done = Done(key=key, reason="error", status=400, prompt_tokens=10, completion_tokens=1)
    watched.histories.note_batch(Batch(step=0, done=[done]))
    watched.stage.send(Cancel(key))
    assert set(nodes(watched.stage)) == {"root"} and nodes(twin_of(watched)) == nodes(watched.stage)


def test_turns_and_sessions_that_were_to_go_when_the_engine_went_do_not_come_back() -> None:
    watched = branched()
    watched.ask(OpenSession, session="s")
    watched.histories.note_sent(DropTurn(800, "b", "left"))
    watched.histories.note_sent(CloseSession(801, "s"))
    assert set(nodes(twin_of(watched))) == {"root", "right", "leaf"}
    assert watched.histories.held == 1


# -- all at once --------------------------------------------------------------------------------------------------


def test_a_turn_that_was_sent_before_its_session_was_known_to_be_open_is_held() -> None:
    watched = Watched()
    wish = Sampling(seed=0, temperature=0.0, max_new_tokens=0)
    for message in (
        OpenSession(op=1, session="s"),
        CloseSession(3, "s"),
        OpenSession(op=4, session="s"),
        Submit(key=5, tokens=pack_tokens([5, 9]), sampling=wish, session="s"),
    ):
        watched.histories.note_sent(message)
        watched.stage.machine.receive(message)
    watched.stage.run()
    assert watched.restored() == watched.truth("s")

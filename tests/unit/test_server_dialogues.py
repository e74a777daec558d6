"""Dialogues over the real core: what goes on where, whatever is dropped, refused, closed or lost meanwhile."""

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from sessile.contract.messages import Branch, DropTurn, GetSession, ListSessions, Sampling
from sessile.errors import InvalidRequest, UserError
from sessile.server import dialogues as module
from sessile.server.calls import Call, Order, Service
from sessile.server.config import ServerOptions
from sessile.server.dialogues import Dialogue, Dialogues, Place, Turn
from sessile.server.histories import Histories
from sessile.server.link import EngineLink
from sessile.text.template import Message
from tests.http.fake_engine import MARKED, byte_tokenizer
from tests.http.toy_engine import ToyEngine

HELLO = Message(role="user", content="Hello")
ANSWER = Message(role="assistant", content="Yes")
"""What clients are told whatever was said: only agreement counts here."""
MORE = [HELLO, ANSWER, Message(role="user", content="More")]
WHOLE = list(b"user:Hello;assistant:Yes;user:More;assistant:")


class Front:
    """A service in front of one engine after another, as in a server but for HTTP."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._engines = 0
        self.link = EngineLink(self._address, histories=Histories(1 << 20))
        self.service = Service(self.link, byte_tokenizer(MARKED), ServerOptions(), {})
        self.engine = self._started()

    @property
    def _address(self) -> str:
        return f"ipc://{self._folder}/{self._engines}"

    def _started(self) -> ToyEngine:
        engine = ToyEngine(self._address, drafts_max=2)
        engine.start()
        return engine

    async def lose_engine(self) -> None:
        self.link.fail("the engine was killed")
        await asyncio.to_thread(self.engine.stop)

    async def next_engine(self) -> None:
        self._engines += 1
        await self.link.reopen(self._address)
        self.engine = self._started()
        await self.link.wait_ready()

    @property
    def dialogues(self) -> Dialogues:
        return self.service.dialogues

    async def opened(self, session: str = "s") -> tuple[Dialogue, Turn]:
        """A dialogue with one turn."""
        dialogue = await self.dialogues.named("", session)
        turn = await self.say(dialogue, [HELLO], rid=f"{session}-first")
        assert turn is not None
        return dialogue, turn

    def call(self, place: Place, rid: str | None = None, *, new_tokens: int = 3, **fields: Any) -> Call:
        """A call at a place, which tells the dialogues of its end."""
        order = Order(
            tokens=place.tokens, sampling=Sampling(seed=0, temperature=0.0, max_new_tokens=new_tokens), tenant="",
            rid=rid, session=place.dialogue.session if place.dialogue else None, branch=place.branch, **fields,
        )  # fmt: skip
        call = Call(self.service, order, whole=True)
        call.at_end = lambda: self._note_end(place, call)
        return call

    def _note_end(self, place: Place, call: Call) -> None:
        self.turn = self.dialogues.end(place, call, ANSWER, keep=True)

    async def say(self, dialogue: Dialogue, messages: Sequence[Message], **fields: Any) -> Turn | None:
        """Send messages, and wait for the answer; its turn. Raises UserError if it was refused."""
        with self.call(await self.dialogues.place(dialogue, messages), **fields) as call:
            done = (await call.next()).done
        assert done is not None
        if done.reason == "error":
            raise UserError(done.message, param=done.param)
        return self.turn

    async def turns(self, session: str = "s") -> int:
        """How many turns the engine has of a session."""
        view = await self.link.ask(lambda op: GetSession(op, session))
        return int(view.turns)

    async def sessions(self) -> set[str]:
        page = await self.link.ask(ListSessions)
        return {view.id for view in page.sessions}


Scenario = Callable[[Front], Awaitable[None]]


@asynccontextmanager
async def front_in(folder: Path) -> AsyncIterator[Front]:
    front = Front(folder)
    front.link.start()
    await front.link.wait_ready()
    try:
        yield front
    finally:
        await asyncio.to_thread(front.engine.stop)
        await front.link.close()


def run(folder: Path, scenario: Scenario) -> None:
    async def main() -> None:
        async with front_in(folder) as front:
            await asyncio.wait_for(scenario(front), 60)

    asyncio.run(main())


class Held:
    """A render that stands still until it is let go."""

    def __init__(self, front: Front) -> None:
        self._front = front
        self._entered, self._may_go = threading.Event(), threading.Event()

    def __call__(self, messages: Sequence[Message], asks: bool) -> str:
        self._entered.set()
        assert self._may_go.wait(30)
        return self._front.dialogues._render(messages, asks)

    @contextlib.asynccontextmanager
    async def placing(self, dialogue: Dialogue) -> AsyncIterator["asyncio.Task[Place]"]:
        """A place that is being looked for; on leaving it is there."""
        placing = asyncio.create_task(self._front.dialogues.place(dialogue, MORE, self))
        await asyncio.to_thread(self._entered.wait)
        yield placing
        self._may_go.set()
        await asyncio.wait({placing})


# -- an engine that is gone, and the next one ----------------------------------------------------------------------


def test_a_turn_that_ended_with_its_engine_does_the_next_one_no_harm(tmp_path: Path) -> None:
    async def scenario(front: Front) -> None:
        dialogue, turn = await front.opened()
        front.engine.device.step_s = 0.01
        with front.call(await front.dialogues.place(dialogue, MORE), new_tokens=300) as call:
            await front.lose_engine()
            assert (await call.next()).done is not None
        await front.next_engine()
        front.dialogues.drop(dialogue, turn)
        front.dialogues.close(dialogue)
        assert await front.sessions() == set()
        assert front.link.failure is None and not front.link.histories._sessions

    run(tmp_path, scenario)


def test_what_was_let_go_of_while_no_engine_was_there_does_not_come_back(tmp_path: Path) -> None:
    async def scenario(front: Front) -> None:
        dialogue, first = await front.opened()
        second = await front.say(dialogue, MORE, rid="second")
        closed, _ = await front.opened("closed")
        assert second is not None
        await front.lose_engine()
        front.dialogues.drop(dialogue, first)
        front.dialogues.close(closed)
        await front.next_engine()
        assert await front.sessions() == {"s"} and await front.turns() == 1
        last = [*MORE, ANSWER, HELLO]
        place = await front.dialogues.place(dialogue, last)
        assert place.branch == Branch(parent="second")

    run(tmp_path, scenario)


def test_what_an_engine_did_not_live_to_let_go_of_does_not_come_back(tmp_path: Path) -> None:
    async def scenario(front: Front) -> None:
        dialogue, turn = await front.opened()
        kept, _ = await front.opened("kept")
        front.dialogues.drop(dialogue, turn)
        await front.lose_engine()
        await front.next_engine()
        assert (await front.turns(), await front.turns("kept")) == (0, 1) and kept.is_open

    run(tmp_path, scenario)


# -- names and refusals --------------------------------------------------------------------------------------------


def test_a_call_whose_name_is_in_flight_leaves_the_turn_of_that_name(tmp_path: Path) -> None:
    async def scenario(front: Front) -> None:
        dialogue, turn = await front.opened()
        front.engine.device.step_s = 0.01
        plain = await front.dialogues.place(None, [HELLO])
        with front.call(plain, turn.rid, new_tokens=300), pytest.raises(InvalidRequest, match="in flight"):
            await front.say(dialogue, [HELLO], rid=turn.rid)
        assert await front.turns() == 1 and dialogue.turns == {turn.rid: turn} and not dialogue.places

    run(tmp_path, scenario)


def test_a_name_that_is_refused_leaves_the_turn_of_that_name(tmp_path: Path) -> None:
    async def scenario(front: Front) -> None:
        dialogue, turn = await front.opened()
        with pytest.raises(UserError, match="another input"):
            await front.say(dialogue, MORE, rid=turn.rid)
        place = await front.dialogues.place(dialogue, MORE)
        assert await front.turns() == 1 and place.branch == Branch(parent=turn.rid)

    run(tmp_path, scenario)


def test_h59_a_turn_that_is_said_again_to_a_client_that_left_stays(tmp_path: Path) -> None:
    async def scenario(front: Front) -> None:
        dialogue, turn = await front.opened()
        with front.call(await front.dialogues.place(dialogue, [HELLO]), turn.rid):
            pass
        assert await front.turns() == 1 and dialogue.turns == {turn.rid: turn}

    run(tmp_path, scenario)


def test_h59_a_turn_that_is_said_again_is_the_turn_that_it_was(tmp_path: Path) -> None:
    async def scenario(front: Front) -> None:
        dialogue, turn = await front.opened()
        assert await front.say(dialogue, [HELLO], rid=turn.rid) == turn
        assert await front.turns() == 1 and list(dialogue.turns) == [turn.rid]

    run(tmp_path, scenario)


def test_a_turn_behind_other_messages_does_not_take_an_earlier_ones_name(tmp_path: Path) -> None:
    async def scenario(front: Front) -> None:
        dialogue, first = await front.opened()
        other = [Message(role="user", content="Other")]
        assert await front.say(dialogue, other, rid="other") is not None
        end = Message(role="user", content="End")
        assert await front.say(dialogue, [HELLO, ANSWER, end], rid="end") is not None
        # Behind another turn the same new tokens: the engine takes them for the turn of that name, sent again.
        with contextlib.suppress(UserError):
            await front.say(dialogue, [*other, ANSWER, end], rid="end")
        place = await front.dialogues.place(dialogue, [*other, ANSWER, end, ANSWER, HELLO])
        assert place.branch == Branch(parent="other") and first.rid in dialogue.turns

    run(tmp_path, scenario)


def test_a_turn_that_the_engine_lacks_is_gone_on_from_once_at_most(tmp_path: Path) -> None:
    async def scenario(front: Front) -> None:
        dialogue, turn = await front.opened()
        await front.link.ask(lambda op: DropTurn(op, "s", turn.rid))
        with pytest.raises(UserError, match="has no turn"):
            await front.say(dialogue, MORE)
        assert await front.say(dialogue, MORE) is not None

    run(tmp_path, scenario)


def test_a_corpus_that_is_not_there_costs_no_dialogue(tmp_path: Path) -> None:
    async def scenario(front: Front) -> None:
        dialogue, turn = await front.opened()
        with pytest.raises(UserError, match="nowhere"):
            await front.say(dialogue, MORE, corpora=("nowhere",), speculate=True)
        assert dialogue.is_open and dialogue.turns == {turn.rid: turn}

    run(tmp_path, scenario)


# -- what changes while a place is looked for ----------------------------------------------------------------------


def test_a_turn_that_is_dropped_while_messages_are_rendered_is_not_gone_on_from(tmp_path: Path) -> None:
    async def scenario(front: Front) -> None:
        dialogue, turn = await front.opened()
        async with Held(front).placing(dialogue) as placing:
            front.dialogues.drop(dialogue, turn)
        place = placing.result()
        assert (place.tokens, place.branch, place.dialogue) == (WHOLE, Branch(), dialogue)

    run(tmp_path, scenario)


@pytest.mark.parametrize("what", ["turn", "dialogue"])
def test_what_is_gone_once_the_text_is_encoded_has_all_messages_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    async def scenario(front: Front) -> None:
        dialogue, turn = await front.opened()
        encode = module.encode_text

        async def encode_late(*arguments: Any, **named: Any) -> list[int]:
            tokens = await encode(*arguments, **named)
            if what == "turn":
                front.dialogues.drop(dialogue, turn)
            else:
                front.dialogues.close(dialogue)
            return tokens

        monkeypatch.setattr(module, "encode_text", encode_late)
        place = await front.dialogues.place(dialogue, MORE)
        assert place.tokens == WHOLE
        assert place.dialogue is (dialogue if what == "turn" else None)
        assert dialogue.places == (what == "turn")

    run(tmp_path, scenario)


def test_a_dialogue_is_not_closed_for_being_empty_while_a_turn_is_on_its_way(tmp_path: Path) -> None:
    async def scenario(front: Front) -> None:
        dialogue = await front.dialogues.fresh("", "ours")
        assert dialogue is not None
        async with Held(front).placing(dialogue) as placing:
            front.dialogues.close_if_empty(dialogue)
        assert placing.result().dialogue is dialogue and await front.sessions() == {"ours"}
        front.dialogues.give_back(placing.result())
        assert await front.sessions() == set()

    run(tmp_path, scenario)


def test_a_place_that_is_not_found_leaves_nothing(tmp_path: Path) -> None:
    def refuse(messages: Sequence[Message], asks: bool) -> str:
        raise InvalidRequest("no")

    async def scenario(front: Front) -> None:
        dialogue = await front.dialogues.fresh("", "ours")
        with pytest.raises(InvalidRequest):
            await front.dialogues.place(dialogue, MORE, refuse)
        assert await front.sessions() == set()

    run(tmp_path, scenario)

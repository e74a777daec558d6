"""Dialogues: lists of messages that go on from turns which a branching session of the engine has KV of.

Messages are compared by what they say, never by tokens: each turn is known by a digest of all messages up to its
answer. What is sent to the engine is what the template writes for all messages less what it writes for those of the
turn; a list that agrees with no turn is sent whole, as a new root. Nothing depends on what is remembered here but how
much is computed.
"""

import asyncio
import hashlib
import json
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import orjson

from sessile.contract.messages import Branch, CloseSession, Done, DropTurn, GetSession, OpenSession, SessionGone
from sessile.errors import DuplicateSession, InvalidRequest, NotFound, UserError
from sessile.server.encoding import RENDER_TIMEOUT_S, encode_text
from sessile.server.link import EngineLink
from sessile.text.seams import Render, closing_of
from sessile.text.template import Message
from sessile.text.tokenizer import Tokenizer

TURNS_KEPT_MAX = 64
"""Most turns of one dialogue that can be gone on from; beyond, those used least recently are dropped."""
SESSION_PARAM, PARENT_PARAM = "session_params.id", "session_params.rid"
"""What the engine names when it refuses a turn: there is no such session; there is no such turn to go on from."""


@dataclass(slots=True)
class Turn:
    """A finished turn: its name in the session, and the text of the token that ended it ("" if it was cut)."""

    rid: str
    digest: bytes
    ended_by: str


@dataclass(slots=True, eq=False)
class Dialogue:
    """The finished turns of one branching session, those used least recently first."""

    tenant: str
    session: str
    is_ours: bool
    """Whether it was opened here, and so is closed with its last turn."""
    turns: "OrderedDict[str, Turn]" = field(default_factory=OrderedDict)
    by_digest: dict[bytes, Turn] = field(default_factory=dict)
    places: int = 0
    """Turns on their way."""
    is_open: bool = True

    def deepest(self, digests: Sequence[bytes]) -> tuple[Turn, int] | None:
        """The turn that agrees with most messages, and how many they are; digests[k]: of the first k + 1 messages."""
        for count in range(len(digests), 0, -1):
            turn = self.by_digest.get(digests[count - 1])
            if turn is not None:
                return turn, count
        return None


@dataclass(frozen=True, slots=True)
class Place:
    """Where a list of messages goes on. dialogue: None for a plain request of all tokens. digest: of all messages."""

    tokens: list[int]
    dialogue: Dialogue | None
    branch: Branch | None
    digest: bytes


class Ended(Protocol):
    """A call that was left: its name, its end if somebody waited for that, and whether the engine ever got it."""

    rid: str
    done: Done | None

    @property
    def was_sent(self) -> bool: ...


class Dialogues:
    """All dialogues of a server, by tenant and session."""

    def __init__(self, link: EngineLink, tokenizer: Tokenizer, *, idle_timeout_s: float) -> None:
        self._link = link
        self._tokenizer = tokenizer
        self._idle_timeout_s = idle_timeout_s
        self._dialogues: dict[tuple[str, str], Dialogue] = {}
        self._closing = None if tokenizer.template is None else closing_of(self._render)
        link.gone_listeners.append(self._note_gone)

    @property
    def keeps_kv(self) -> bool:
        """Whether turns can be gone on from; else every list of messages is a plain request."""
        return self._closing is not None

    async def named(self, tenant: str, session: str) -> Dialogue:
        """The dialogue in a tenant's session of this name, which is opened if there is none. Raises UserError."""
        known = self._dialogues.get((tenant, session))
        if known is not None:
            return known
        try:
            await self._open(tenant, session)
        except UserError as error:
            if error.code != DuplicateSession.code:
                raise
            view = await self._link.ask(lambda op: GetSession(op, session, tenant))
            if not view.branching:
                raise InvalidRequest(
                    f"session_id: session {session!r} is a streaming session; open one with branching: true, or give "
                    "a name that is free",
                    param="session_id",
                ) from None
        return self._dialogues.setdefault((tenant, session), Dialogue(tenant, session, is_ours=False))

    async def fresh(self, tenant: str, session: str) -> Dialogue | None:
        """A new dialogue that is closed with its last turn; None where turns cannot be gone on from."""
        if not self.keeps_kv:
            return None
        await self._open(tenant, session)
        dialogue = self._dialogues[tenant, session] = Dialogue(tenant, session, is_ours=True)
        return dialogue

    async def _open(self, tenant: str, session: str) -> None:
        idle_s = self._idle_timeout_s
        await self._link.ask(
            lambda op: OpenSession(op=op, session=session, tenant=tenant, branching=True, idle_timeout_s=idle_s)
        )

    async def place(
        self,
        dialogue: Dialogue | None,
        messages: Sequence[Message],
        render: Render | None = None,
        *,
        beside: object = None,
        at: Turn | None = None,
    ) -> Place:
        """Where checked messages go on in a dialogue. Raises InvalidRequest if the template refuses them.

        render: writes them; the template without variables if None. beside: what the prompt depends on beside the
        messages. at: the turn to go on from if it agrees, though others may too. The place is its caller's, who ends
        it, or gives it back.
        """
        digests = digests_of(messages, beside)
        if dialogue is None or not self.keeps_kv or not dialogue.is_open:
            whole, _ = await _rendered(render or self._render, messages, 0)
            return Place(await self._encoded(whole), None, None, digests[-1])
        dialogue.places += 1  # before anything is waited for: while somebody comes, it is not closed for being empty
        place: Place | None = None
        try:
            place = await self._place_in(dialogue, messages, render or self._render, digests, at)
            return place
        finally:
            if place is None or place.dialogue is None:
                self._leave(dialogue)

    async def _place_in(
        self, dialogue: Dialogue, messages: Sequence[Message], render: Render, digests: list[bytes], at: Turn | None
    ) -> Place:
        """The same in one that is open; whatever was waited for, its turn may be gone then, and it may be closed."""
        found = dialogue.deepest(digests)
        if at is not None and at.rid in dialogue.turns and at.digest in digests:
            found = at, digests.index(at.digest) + 1
        whole, before = await _rendered(render, messages, found[1] if found else 0)
        if found is not None and whole.startswith(before):
            turn = found[0]
            tokens = await self._encoded(self._behind(turn) + whole[len(before) :])
            if dialogue.turns.get(turn.rid) is turn:
                dialogue.turns.move_to_end(turn.rid)
                return Place(tokens, dialogue, Branch(parent=turn.rid), digests[-1])
        tokens = await self._encoded(whole)
        if not dialogue.is_open:
            return Place(tokens, None, None, digests[-1])
        return Place(tokens, dialogue, Branch(), digests[-1])

    def give_back(self, place: Place) -> None:
        """A place is not taken after all."""
        if place.dialogue is not None:
            self._leave(place.dialogue)

    def _leave(self, dialogue: Dialogue) -> None:
        dialogue.places -= 1
        self.close_if_empty(dialogue)

    def end(self, place: Place, call: Ended, answer: Message, *, keep: bool) -> Turn | None:
        """The call at a place was left: remember its turn if it was committed, to be gone on from; else leave nothing.

        answer: as the client was sent it, and will send it back.
        """
        dialogue = place.dialogue
        if dialogue is None:
            return None
        turn = self._ended(dialogue, place, call, answer, keep=keep) if dialogue.is_open else None
        self._leave(dialogue)
        return turn

    def _ended(self, dialogue: Dialogue, place: Place, call: Ended, answer: Message, *, keep: bool) -> Turn | None:
        done = call.done
        if done is not None and done.reason in ("stop", "length") and keep:
            return self._remember(dialogue, call.rid, done, _chained(place.digest, answer))
        if done is not None and done.reason == "error":
            self._note_refusal(dialogue, place, done)
        elif call.was_sent and call.rid not in dialogue.turns:
            # It may have finished though nobody read that: then its turn is there, and nobody knows it.
            self._tell_drop(dialogue, call.rid)
        return None

    def _remember(self, dialogue: Dialogue, rid: str, done: Done, digest: bytes) -> Turn | None:
        """A committed turn; None if a turn behind other messages had its name: which one it is now, nobody knows."""
        known = dialogue.turns.get(rid)
        if known is not None:
            if known.digest == digest:
                return known  # its reply was said again
            _forget_turn(dialogue, known)
            return None
        ended_by = ""
        if isinstance(done.matched, int):
            ended_by = self._tokenizer.decode([done.matched], skip_special_tokens=False)
        turn = dialogue.turns[rid] = dialogue.by_digest[digest] = Turn(rid, digest, ended_by)
        while len(dialogue.turns) > TURNS_KEPT_MAX:
            self.drop(dialogue, next(iter(dialogue.turns.values())))
        return turn

    def _note_refusal(self, dialogue: Dialogue, place: Place, done: Done) -> None:
        """A turn was refused, or failed: the engine has none of that name from it. What it lacks is forgotten here."""
        if done.param == SESSION_PARAM and done.status == NotFound.status:
            self.forget(dialogue.tenant, dialogue.session)
        elif done.param == PARENT_PARAM and place.branch is not None and place.branch.parent is not None:
            parent = dialogue.turns.get(place.branch.parent)
            if parent is not None:
                _forget_turn(dialogue, parent)

    def drop(self, dialogue: Dialogue, turn: Turn) -> None:
        """Forget a turn, here and in the engine; what went on from it stays."""
        if dialogue.turns.get(turn.rid) is not turn:
            return
        _forget_turn(dialogue, turn)
        self._tell_drop(dialogue, turn.rid)
        self.close_if_empty(dialogue)

    def _tell_drop(self, dialogue: Dialogue, rid: str) -> None:
        self._link.tell(lambda op: DropTurn(op, dialogue.session, rid, dialogue.tenant))

    def close(self, dialogue: Dialogue) -> None:
        """Close the session of a dialogue, with all its turns."""
        if dialogue.is_open:
            self._link.tell(lambda op: CloseSession(op, dialogue.session, dialogue.tenant))
            self.forget(dialogue.tenant, dialogue.session)

    def forget(self, tenant: str, session: str) -> None:
        """A session was closed: nothing can be gone on from there. Other sessions are none of our affair."""
        dialogue = self._dialogues.pop((tenant, session), None)
        if dialogue is not None:
            dialogue.is_open = False
            dialogue.turns.clear()
            dialogue.by_digest.clear()

    def close_if_empty(self, dialogue: Dialogue) -> None:
        """Close a dialogue of ours that has no turn, neither finished nor on its way."""
        if dialogue.is_open and dialogue.is_ours and not dialogue.turns and not dialogue.places:
            self.close(dialogue)

    async def _encoded(self, text: str) -> list[int]:
        return await encode_text(self._tokenizer, text, add_special_tokens=False)

    def _note_gone(self, gone: SessionGone) -> None:
        self.forget(gone.tenant, gone.session)

    def _behind(self, turn: Turn) -> str:
        """What has to follow the turn's last token before the next message: the end marker, unless it was said."""
        assert self._closing is not None
        if turn.ended_by and turn.ended_by in self._closing:
            return self._closing.partition(turn.ended_by)[2]
        return self._closing

    def _render(self, messages: Sequence[Message], asks: bool) -> str:
        return self._tokenizer.render_chat(messages, add_generation_prompt=asks)


def _forget_turn(dialogue: Dialogue, turn: Turn) -> None:
    del dialogue.turns[turn.rid]
    if dialogue.by_digest.get(turn.digest) is turn:
        del dialogue.by_digest[turn.digest]


def digests_of(messages: Sequence[Message], beside: object = None) -> list[bytes]:
    """Digests of the first message, the first two, and so on."""
    digest = hashlib.blake2b(_written(beside), digest_size=16).digest()
    digests = []
    for message in messages:
        digest = _chained(digest, message)
        digests.append(digest)
    return digests


def _chained(before: bytes, message: Message) -> bytes:
    # Clients need not send reasoning back, and whether they do changes nothing of what was said.
    told = {name: value for name, value in message.items() if name != "reasoning_content"}
    return hashlib.blake2b(before + _written(told), digest_size=16).digest()


def _written(content: object) -> bytes:
    """The same bytes for the same content. Beyond what orjson writes, arguments may be deep, or numbers long."""
    try:
        return orjson.dumps(content, option=orjson.OPT_SORT_KEYS)
    except TypeError:
        return json.dumps(content, sort_keys=True).encode()


async def _rendered(render: Render, messages: Sequence[Message], agreed: int) -> tuple[str, str]:
    """The prompt for all messages, and what the template writes for those that agree with a turn. In a thread (H57)."""

    def both() -> tuple[str, str]:
        return render(messages, True), render(messages[:agreed], False) if agreed else ""

    try:
        return await asyncio.wait_for(asyncio.to_thread(both), RENDER_TIMEOUT_S)
    except TimeoutError:
        message = f"the chat template took longer than {RENDER_TIMEOUT_S:g} s over the messages"
        raise InvalidRequest(message, param="messages") from None

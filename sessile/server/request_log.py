"""What was asked of the engine and when, one JSON object a line, for `python -m sessile.sim replay FILE`.

No text, no token and no name of a client is written. Tenants, sessions and turns are numbers; of a prompt there is its
length and, every 64 tokens, a number for all up to there: two prompts with the same numbers begin alike, and that is
all that can be told of them.
"""

import hashlib
import time
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import orjson

from sessile.contract.messages import (
    Batch,
    Cancel,
    CancelAll,
    CloseSession,
    Done,
    DropTurn,
    EngineReady,
    Flush,
    ForkSession,
    OpenSession,
    RestoreSession,
    RewindSession,
    Submit,
    ToEngine,
)
from sessile.errors import StartupError
from sessile.server.logs import LineWriter

CHUNK_BYTES = 64 * 4
"""Tokens between two numbers, packed."""
NUMBERS_MAX = 1_000_000
"""Most numbers that are remembered of each kind; the oldest are forgotten, and what they stood for gets another."""


class Numbers:
    """A number for each thing, in the order of first appearance."""

    def __init__(self) -> None:
        self._known: dict[Hashable, int] = {}
        self._next = 1

    def of(self, thing: Hashable) -> int:
        """The number of a thing."""
        number = self._known.get(thing)
        if number is None:
            number = self._known[thing] = self._next
            self._next += 1
            if len(self._known) > NUMBERS_MAX:
                del self._known[next(iter(self._known))]
        return number


class RequestLog:
    """Writes lines to a file of its own, without ever holding anybody up. Its only user is the event loop."""

    def __init__(self, path: Path) -> None:
        """Raises StartupError if the file cannot be opened for appending."""
        try:
            self._file = path.open("a", encoding="utf-8")
        except OSError as error:
            raise StartupError(f"cannot write --request-log {path}: {error.strerror}") from error
        self._writer = LineWriter(self._file)
        self._started_s = time.monotonic()
        self._tenants, self._sessions, self._turns, self._prefixes = Numbers(), Numbers(), Numbers(), Numbers()

    @property
    def dropped(self) -> int:
        """Lines that could not be written."""
        return self._writer.dropped

    def close(self) -> None:
        """Write what waits, and close the file."""
        self._writer.flush()
        self._file.close()

    def note_ready(self, ready: EngineReady) -> None:
        """An engine is there."""
        self._write(
            "engine",
            page_size=ready.page_size,
            pages_total=ready.pages_total,
            rows_max=ready.rows_max,
            context_tokens=ready.context_tokens,
            chunk_tokens=ready.chunk_tokens,
            drafts_max=ready.drafts_max,
            queue_max=ready.queue_max,
        )

    def note_sent(self, message: ToEngine) -> None:
        """A message is on its way to the engine; those that only look are left out."""
        match message:
            case Submit():
                self._note_submit(message)
            case Cancel():
                self._write("cancel", key=message.key, if_waiting=message.if_waiting)
            case OpenSession():
                self._write("open", **self._opening(message))
            case RestoreSession():
                self._note_restore(message)
            case CloseSession():
                self._write("close", **self._place(message.tenant, message.session))
            case ForkSession():
                child = self._sessions.of((message.tenant, message.child))
                place = self._place(message.tenant, message.session)
                self._write("fork", **place, child=child, at_tokens=message.at_tokens, at_turn=message.at_turn)
            case RewindSession():
                place = self._place(message.tenant, message.session)
                self._write("rewind", **place, to_tokens=message.to_tokens, to_turn=message.to_turn)
            case DropTurn():
                place = self._place(message.tenant, message.session)
                self._write("drop", **place, turn=self._turn(message.tenant, message.session, message.rid))
            case Flush():
                self._write("flush")
            case CancelAll():
                self._write("cancel all")

    def note_batch(self, batch: Batch) -> None:
        """Requests ended: how, and how long they became."""
        for done in batch.done:
            self._note_done(done)

    def _note_done(self, done: Done) -> None:
        self._write(
            "done",
            key=done.key,
            reason=done.reason,
            status=done.status,
            prompt_tokens=done.prompt_tokens,
            cached_tokens=done.cached_tokens,
            completion_tokens=done.completion_tokens,
        )

    def _note_submit(self, message: Submit) -> None:
        branch = message.branch
        place = {"tenant": self._tenants.of(message.tenant), "session": None}
        if message.session is not None:
            place = self._place(message.tenant, message.session)
        self._write(
            "submit",
            **place,
            key=message.key,
            tokens=len(message.tokens) // 4,
            prefixes=self._prefixes_of(message.tokens),
            max_new_tokens=message.sampling.max_new_tokens,
            priority=message.priority,
            group=message.group,
            turn=self._turn(message.tenant, message.session, message.rid),
            expects=message.expect_tokens,
            branch=None
            if branch is None
            else {
                "parent": self._turn(message.tenant, message.session, branch.parent),
                "offset": branch.offset,
                "replace": branch.replace,
                "drop_previous_output": branch.drop_previous_output,
            },
        )

    def _note_restore(self, message: RestoreSession) -> None:
        opening = message.opening
        turns = [
            {
                "turn": self._turn(opening.tenant, opening.session, node.rid),
                "parent": self._turn(opening.tenant, opening.session, node.parent),
                "base_tokens": node.base_tokens,
                "tokens": len(node.tokens) // 4,
            }
            for node in message.nodes
        ]
        self._write("restore", **self._opening(opening), tokens=len(message.tokens) // 4, turns=turns)

    def _turn(self, tenant: str, session: str | None, rid: str | None) -> int | None:
        return self._turns.of((tenant, session, rid)) if rid else None

    def _prefixes_of(self, packed: bytes) -> list[int]:
        """A number for the tokens up to each 64th, and up to the end."""
        digest = hashlib.blake2b(digest_size=16)
        numbers: list[int] = []
        for start in range(0, len(packed), CHUNK_BYTES):
            digest.update(packed[start : start + CHUNK_BYTES])
            numbers.append(self._prefixes.of(digest.digest()))
        return numbers

    def _place(self, tenant: str, session: str) -> dict[str, Any]:
        return {"tenant": self._tenants.of(tenant), "session": self._sessions.of((tenant, session))}

    def _opening(self, message: OpenSession) -> dict[str, Any]:
        return {
            **self._place(message.tenant, message.session),
            "branching": message.branching,
            "reserve_tokens": message.reserve_tokens,
            "idle_timeout_s": message.idle_timeout_s,
            "tokens_max": message.tokens_max,
        }

    def _write(self, kind: str, **fields: Any) -> None:
        at_s = round(time.monotonic() - self._started_s, 4)
        self._writer.put(orjson.dumps({"at_s": at_s, "kind": kind, **fields}).decode())

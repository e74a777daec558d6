"""The lines of a request log as its reader takes them: what sessile/server/request_log.py writes, checked.

A log is a file that somebody hands in: a line that says something impossible is refused with its number.
"""

from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from sessile.errors import StartupError

Count = Annotated[int, Meta(ge=0, lt=1 << 31)]
Key = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
Size = Annotated[int, Meta(ge=1, lt=1 << 26)]
"""Of a pool, a step, a context."""
Seconds = Annotated[float, Meta(ge=0, le=1e10)]


class Line(msgspec.Struct, frozen=True, tag_field="kind", kw_only=True):
    """What every line has: seconds since the log was begun."""

    at_s: Seconds


class EngineLine(Line, tag="engine", frozen=True):
    """An engine is there: the first one, or one in place of another."""

    page_size: Size
    pages_total: Annotated[int, Meta(ge=3, lt=1 << 26)]
    rows_max: Annotated[int, Meta(ge=1, le=4096)]
    context_tokens: Annotated[int, Meta(ge=2, lt=1 << 26)]
    chunk_tokens: Size
    queue_max: Count


class BranchOf(msgspec.Struct, frozen=True, kw_only=True):
    """Where a turn of a branching session goes on; `parent` by number."""

    parent: Count | None
    offset: int
    replace: bool
    drop_previous_output: bool


class SubmitLine(Line, tag="submit", frozen=True):
    """A request. prefixes: a number for its tokens up to each 64th, and up to the end."""

    tenant: Count
    session: Count | None
    key: Key
    tokens: Count
    prefixes: list[Count]
    max_new_tokens: Count | None
    priority: int
    group: Annotated[int, Meta(ge=-1, le=(1 << 63) - 1)]
    turn: Count | None
    branch: BranchOf | None


class CancelLine(Line, tag="cancel", frozen=True):
    """A request is to end, or only if it has not begun."""

    key: Key
    if_waiting: bool


class DoneLine(Line, tag="done", frozen=True):
    """A request has ended."""

    key: Key
    reason: str
    status: Count
    completion_tokens: Count


class SessionLine(Line, frozen=True):
    """What concerns one session."""

    tenant: Count
    session: Count


class OpenLine(SessionLine, tag="open", frozen=True):
    """A session is opened."""

    branching: bool
    reserve_tokens: Count
    idle_timeout_s: Annotated[float, Meta(ge=0, le=1e10)] | None
    tokens_max: Annotated[int, Meta(ge=1)] | None


class RestoreLine(OpenLine, tag="restore", frozen=True):
    """A session is opened again in an engine that has not seen it. Its turns are not replayed."""

    tokens: Count


class CloseLine(SessionLine, tag="close", frozen=True):
    """A session is closed."""


class ForkLine(SessionLine, tag="fork", frozen=True):
    """A session begins as another one is."""

    child: Count
    at_tokens: Count | None
    at_turn: Count | None


class RewindLine(SessionLine, tag="rewind", frozen=True):
    """A session's history is cut."""

    to_tokens: Count | None
    to_turn: Count | None


class DropLine(SessionLine, tag="drop", frozen=True):
    """A turn of a branching session is forgotten."""

    turn: Count | None


class FlushLine(Line, tag="flush", frozen=True):
    """All KV is dropped."""


class CancelAllLine(Line, tag="cancel all", frozen=True):
    """Every request is to end."""


AnyLine = (
    EngineLine | SubmitLine | CancelLine | DoneLine | OpenLine | RestoreLine | CloseLine | ForkLine | RewindLine
    | DropLine | FlushLine | CancelAllLine
)  # fmt: skip


def read_log(path: Path) -> list[AnyLine]:
    """The lines of a log; one that was cut off in the middle, as by a full disk, is left out. Raises StartupError."""
    decoder: msgspec.json.Decoder[AnyLine] = msgspec.json.Decoder(AnyLine)
    lines: list[AnyLine] = []
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise StartupError(f"cannot read {path}: {error.strerror}") from error
    for number, text in enumerate(raw.splitlines(), 1):
        try:
            lines.append(decoder.decode(text))
        except msgspec.ValidationError as error:
            raise StartupError(f"{path} is no request log: line {number}: {error!s:.200}") from error
        except (ValueError, RecursionError):
            continue
    if not any(isinstance(line, EngineLine) for line in lines):
        raise StartupError(f"{path} is no request log: no line says what the engine was")
    return lines

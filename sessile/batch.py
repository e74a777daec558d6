"""`sessile run-batch`: requests from a file of lines, in OpenAI's batch format, to a file of answers.

A line of the input is {"custom_id", "method": "POST", "url": "/v1/chat/completions", "body"}. Each becomes one line of
the output, {"id", "custom_id", "response": {"status_code", "request_id", "body"}, "error"}, in the order in which they
end; `custom_id` says which is which. What the server refuses is a response with its status and body; a line that cannot
be sent has an error with a code and a message, and no response.

Output is only ever appended to, a whole line at a time. Run again after whatever ended it, a batch does the rows that
have no answer yet; a last line that was torn is taken off first.
"""

import asyncio
import errno
import fcntl
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, TextIO

import orjson
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from sessile.client.async_client import AsyncClient
from sessile.errors import NotReady, StartupError, UserError

ROUTES = ("/v1/chat/completions", "/v1/completions", "/v1/responses")
FIELDS = {"custom_id", "method", "url", "body"}
TAIL_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the input that can be sent."""

    number: int
    custom_id: str
    url: str
    body: dict[str, Any]


@dataclass(frozen=True, slots=True)
class BadLine:
    """A line of the input that cannot be sent, and why."""

    number: int
    custom_id: str | None
    code: str
    message: str


@dataclass(frozen=True, slots=True)
class Tally:
    """What a run has come to, in rows."""

    total: int
    done_before: int
    answered: int
    refused: int
    bad: int

    @property
    def summary(self) -> str:
        """The run in one line."""
        parts = [f"{self.answered:,} answered", f"{self.refused:,} refused", f"{self.bad:,} bad lines"]
        before = [f"{self.done_before:,} were done before"] if self.done_before else []
        return f"{self.total:,} rows: {', '.join(before + parts)}"


class AnswerFile:
    """The output: which rows it has, and where their answers are appended. Owns the file until `close`."""

    def __init__(self, path: Path) -> None:
        """Open or create it, and take a torn last line off. Raises StartupError if it cannot be, or is in use."""
        self._path = path
        try:
            self._file = FileIO(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644), "rb+")
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StartupError(f"another batch writes to {path}; wait for it, or name another file") from error
        except OSError as error:
            raise StartupError(f"cannot write {path}: {error.strerror}. Give another path.") from error
        self._repair()

    def ids(self) -> set[str]:
        """The `id` of every row that is there. Raises StartupError for a line that is not of such a file."""
        found: set[str] = set()
        with self._path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    found.add(key_of(orjson.loads(line)))
                except (orjson.JSONDecodeError, KeyError, TypeError) as error:
                    raise StartupError(
                        f"{self._path}, line {number}, is no answer of a batch: move the file away, or name another"
                    ) from error
        return found

    def append(self, answer: dict[str, Any]) -> None:
        """Write one answer, as a whole line: a batch that is killed tears the last one at most."""
        line = orjson.dumps(answer) + b"\n"
        end = self._file.seek(0, os.SEEK_END)
        try:
            written = self._file.write(line)
            if written != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            self._file.truncate(end)  # No torn line stands in the middle of the file.
            raise StartupError(f"cannot write {self._path}: {error.strerror}. Make room, and run again.") from error

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _repair(self) -> None:
        """Cut the file behind its last line end: what comes after was being written when a batch was killed."""
        end = self._file.seek(0, os.SEEK_END)
        start = end
        while start:
            size = min(TAIL_BYTES, start)
            start -= size
            self._file.seek(start)
            last_line_end = self._file.read(size).rfind(b"\n")
            if last_line_end >= 0:
                self._file.truncate(start + last_line_end + 1)
                return
        self._file.truncate(0)


def key_of(answer: dict[str, Any]) -> str:
    """What tells rows apart: the custom_id, or for a line without one its number."""
    custom_id = answer["custom_id"]
    return f"custom_id {custom_id}" if custom_id is not None else str(answer["id"])


def read_rows(path: Path) -> Iterator[Row | BadLine]:
    """The lines of the input, empty ones left out. Raises StartupError if it cannot be read."""
    seen: dict[str, int] = {}
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield _row_of(number, line, seen)
    except OSError as error:
        raise StartupError(f"cannot read {path}: {error.strerror}. Give another path.") from error


def _row_of(number: int, line: bytes, seen: dict[str, int]) -> Row | BadLine:
    """One line, checked. seen: custom_ids so far and their lines; this one's is added."""
    try:
        row = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        return BadLine(number, None, "invalid_json", f"line {number} is not valid JSON: {error}")
    custom_id = row.get("custom_id") if isinstance(row, dict) else None
    if not isinstance(custom_id, str):
        return BadLine(number, None, "invalid_line", f"line {number} must be an object with a string custom_id")
    if custom_id in seen:
        message = f"line {number} has the custom_id of line {seen[custom_id]}: give it another"
        return BadLine(number, None, "duplicate_custom_id", message)
    seen[custom_id] = number
    fault = _fault_in(row)
    if fault:
        return BadLine(number, custom_id, "invalid_line", f"line {number}: {fault}")
    return Row(number, custom_id, row["url"], row["body"])


def _fault_in(row: dict[str, Any]) -> str:
    """What is wrong with an object that has a custom_id, or nothing."""
    if unknown := sorted(row.keys() - FIELDS):
        return f"{unknown[0]}: unknown field"
    if row.get("method") != "POST":
        return f'method: must be "POST", got {row.get("method")!r}'
    if row.get("url") not in ROUTES:
        return f"url: must be one of {', '.join(ROUTES)}, got {row.get('url')!r}"
    if not isinstance(row.get("body"), dict):
        return "body: must be an object"
    if row["body"].get("stream"):
        return "body.stream: a batch has whole answers only"
    return ""


async def run_batch(
    client: AsyncClient,
    source: Path,
    target: AnswerFile,
    *,
    concurrency: int,
    report: Callable[[int, int], None],
) -> Tally:
    """Do every row of the source that has no answer in the target. report: gets rows done, and all rows, now and then.

    Raises StartupError if the target belongs to another source; NotReady if the server is lost, with all answers that
    there are written.
    """
    done = target.ids()
    keys = [_key_of_row(row) for row in read_rows(source)]
    if strangers := done - set(keys):
        raise StartupError(f"the output has answers to rows that the input has not, such as {min(strangers)!r}")
    waiting = (row for row in read_rows(source) if _key_of_row(row) not in done)
    counts: Counter[str] = Counter()

    async def work() -> None:
        for row in waiting:
            if isinstance(row, BadLine):
                error = {"code": row.code, "message": row.message}
                target.append(_answer(row.number, row.custom_id, None, error))
                counts["bad"] += 1
            else:
                response = await _ask(client, row)
                target.append(_answer(row.number, row.custom_id, response, None))
                counts["answered" if response["status_code"] == 200 else "refused"] += 1
            report(len(done) + counts.total(), len(keys))

    report(len(done), len(keys))
    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(concurrency):
                group.create_task(work())
    except* (UserError, StartupError) as failures:
        first = failures.exceptions[0]
        raise (first if isinstance(first, StartupError) else NotReady(str(first))) from failures
    return Tally(len(keys), len(done), counts["answered"], counts["refused"], counts["bad"])


async def _ask(client: AsyncClient, row: Row) -> dict[str, Any]:
    """The server's answer to a row, whatever it is. Raises NotReady if it is lost."""
    reply = await client.exchange("POST", row.url, json=row.body)
    try:
        body = orjson.loads(reply.content)
    except orjson.JSONDecodeError:
        body = reply.text
    request_id = body.get("id") if isinstance(body, dict) else None
    return {"status_code": reply.status_code, "request_id": request_id or f"row-{row.number}", "body": body}


def _answer(
    number: int, custom_id: str | None, response: dict[str, Any] | None, error: dict[str, str] | None
) -> dict[str, Any]:
    return {"id": f"batch_req_{number}", "custom_id": custom_id, "response": response, "error": error}


def _key_of_row(row: Row | BadLine) -> str:
    return key_of({"id": f"batch_req_{row.number}", "custom_id": row.custom_id})


@contextmanager
def answer_file(path: Path) -> Iterator[AnswerFile]:
    """An AnswerFile that is closed on leaving."""
    file = AnswerFile(path)
    try:
        yield file
    finally:
        file.close()


@contextmanager
def shown_progress(stream: TextIO) -> Iterator[Callable[[int, int], None]]:
    """A progress bar where somebody watches, nothing elsewhere; what is given is called with rows done and all rows."""
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("rows"), TimeRemainingColumn())
    console = Console(file=stream)
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("rows", total=None)
        yield lambda done, total: progress.update(bar, completed=done, total=total)

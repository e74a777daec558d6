"""Corpora of a running server from a terminal, over HTTP: `sessile corpus add | list | remove`."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from time import sleep
from typing import Any

import httpx
import orjson

from sessile.contract.corpora import INDEX_SUFFIX
from sessile.errors import StartupError
from sessile.text.documents import source_of

POLL_S = 0.2
READ_BYTES = 1 << 16
TIMEOUT_S = 60.0

Report = Callable[[str], None]


class CorpusClient:
    """Talks to one server. A context manager; every failure is a StartupError in one line."""

    def __init__(self, url: str, api_key: str | None) -> None:
        headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        self._http = httpx.Client(base_url=url, headers=headers, timeout=TIMEOUT_S, trust_env=False)

    def __enter__(self) -> "CorpusClient":
        return self

    def __exit__(self, *exception: object) -> None:
        self._http.close()

    def add_files(self, paths: Sequence[Path], fields: dict[str, Any], report: Report) -> dict[str, Any]:
        """Upload files of texts as one corpus, and wait until it is ready. fields: id, replace, shared."""
        query = {name: str(value).lower() if isinstance(value, bool) else value for name, value in fields.items()}
        total = sum(path.stat().st_size for path in paths)
        return self._wait(
            self._ask(
                "POST",
                "/v1/corpora",
                params=query,
                content=upload_of(paths, total, report),
                headers={"content-type": "application/jsonl"},
            ),
            report,
        )

    def add_path(self, path: str, fields: dict[str, Any], report: Report) -> dict[str, Any]:
        """Have the server read a path below its own directory, and wait until the corpus is ready."""
        return self._wait(self._ask("POST", "/v1/corpora", json={"path": path, **fields}), report)

    def list(self) -> dict[str, Any]:
        """All corpora that the key may see, and what is left to it."""
        return self._ask("GET", "/v1/corpora")

    def remove(self, corpus: str) -> None:
        """Remove a corpus, or give up its load."""
        self._ask("DELETE", f"/v1/corpora/{corpus}")

    def _wait(self, corpus: dict[str, Any], report: Report) -> dict[str, Any]:
        while progress := corpus["progress"]:
            report(f"{corpus['id']}: {progress['stage']}, {progress['share']:.0%}")
            sleep(POLL_S)
            corpus = self._ask("GET", f"/v1/corpora/{corpus['id']}")
        if corpus["reason"]:
            raise StartupError(f"{corpus['id']} was not loaded: {corpus['reason']}")
        return corpus

    def _ask(self, method: str, path: str, **how: Any) -> dict[str, Any]:
        try:
            reply = self._http.request(method, path, **how)
        except httpx.TransportError as error:
            url = str(self._http.base_url).rstrip("/")
            raise StartupError(f"no answer from {url}: {error}. Is a server there? See --url.") from error
        try:
            content: dict[str, Any] = reply.json()
        except ValueError:
            content = {}
        if reply.is_error:
            message = content.get("error", {}).get("message", f"status {reply.status_code}")
            hint = " (the key is taken from SESSILE_API_KEY)" if reply.status_code == 401 else ""
            raise StartupError(message + hint)
        return content


def upload_of(paths: Sequence[Path], total_bytes: int, report: Report) -> Iterator[bytes]:
    """The files as lines of JSON: those of a .jsonl file as they are, any other file as one. Raises StartupError."""
    sent = 0
    for path in paths:
        if source_of(path).kind == "jsonl":
            with path.open("rb") as file:
                while chunk := file.read(READ_BYTES):
                    sent += len(chunk)
                    report(f"sending, {sent / max(total_bytes, 1):.0%}")
                    yield chunk
            yield b"\n"
            continue
        try:
            text = path.read_text("utf-8")
        except UnicodeDecodeError as error:
            raise StartupError(f"{path}: not UTF-8 at byte {error.start}") from None
        if not text:
            continue  # of many files some are empty
        line = orjson.dumps(text) + b"\n"
        sent += path.stat().st_size
        report(f"sending, {sent / max(total_bytes, 1):.0%}")
        yield line


def texts_in(places: Sequence[Path]) -> list[Path]:
    """The files that were named, and all files below the folders that were. Raises StartupError."""
    found: list[Path] = []
    for place in places:
        if place.is_dir():
            found += sorted(path for path in place.rglob("*") if path.is_file())
        elif place.is_file():
            found.append(place)
        else:
            raise StartupError(f"there is no {place}")
    if not found:
        raise StartupError("there are no files in what was named")
    indexes = [path for path in found if source_of(path).kind == "index"]
    if indexes:
        raise StartupError(
            f"{indexes[0]} is an index ({INDEX_SUFFIX}): put it into the server's --corpora-dir and add it with --path"
        )
    return found


def table_of(listing: dict[str, Any]) -> str:
    """What `sessile corpus list` shows."""
    rows = [("id", "state", "tokens", "documents", "bytes", "accepted / offered", "")]
    for corpus in listing["data"]:
        progress = corpus["progress"]
        note = f"{progress['stage']}, {progress['share']:.0%}" if progress else corpus["reason"] or ""
        drafts = f"{corpus['drafts_accepted']} / {corpus['drafts_offered']}"
        counts = (f"{corpus[name]:,}" for name in ("tokens", "documents", "bytes"))
        rows.append((corpus["id"], corpus["state"], *counts, drafts, note))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    left = listing["budget"]["left"]
    return "\n".join([*lines, f"room for {left['tokens']:,} more tokens, {left['bytes']:,} bytes"])

"""What the tests of corpora share: servers on the real core with a real builder process, and how to wait for it."""

import contextlib
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

from sessile.draft.shelf import Entry
from tests.http.conftest import PATIENCE_S, Running

LINES = {"content-type": "application/jsonl"}


def add(client: httpx.Client, name: str, *documents: str, **fields: Any) -> httpx.Response:
    body = {"id": name, "documents": list(documents) or ["what is here is here to stay"], **fields}
    return client.post("/v1/corpora", json=body)


def upload(client: httpx.Client, name: str, lines: Any, **query: Any) -> httpx.Response:
    return client.post("/v1/corpora", params={"id": name, **query}, content=lines, headers=LINES)


def added(client: httpx.Client, name: str, *documents: str, **fields: Any) -> dict[str, Any]:
    """Add a corpus and wait until it is ready."""
    reply = add(client, name, *documents, **fields)
    assert reply.status_code in (200, 202), reply.text
    return when_settled(client, name)


def when_settled(client: httpx.Client, name: str) -> dict[str, Any]:
    """The corpus once nothing of it is loading any more."""
    deadline_s = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline_s:
        corpus = client.get(f"/v1/corpora/{name}").json()
        if corpus["progress"] is None:
            return corpus
        time.sleep(0.01)
    raise AssertionError(f"still loading: {corpus}")


def listed(client: httpx.Client) -> dict[str, str]:
    return {corpus["id"]: corpus["state"] for corpus in client.get("/v1/corpora").json()["data"]}


def client_of(running: Running) -> httpx.Client:
    """Another client than the server's own, for another thread."""
    return httpx.Client(base_url=running.url, timeout=PATIENCE_S)


def listing_of(running: Running) -> dict[str, str]:
    with client_of(running) as client:
        return listed(client)


def received(client: httpx.Client, name: str) -> int:
    """Bytes of an upload that is on its way."""
    progress = client.get(f"/v1/corpora/{name}").json().get("progress")
    return progress["received_bytes"] if progress else 0


def shelf(running: Running) -> tuple[Entry, ...]:
    return running.engine.shelf.snapshot.entries


def tokens_on_shelf(running: Running) -> dict[tuple[str, str], int]:
    return {(entry.tenant, entry.corpus_id): entry.index.tokens for entry in shelf(running)}


def builder_pid(running: Running) -> int:
    """Of the builder; there is one after the first add."""
    assert running.service.corpora is not None
    pid = running.service.corpora.builder.pid
    assert pid is not None
    return pid


@contextlib.contextmanager
def stopped_builder(running: Running) -> Iterator[int]:
    """The builder stands still inside, so that whatever is being loaded stays so. It may be killed meanwhile."""
    pid = builder_pid(running)
    os.kill(pid, signal.SIGSTOP)
    try:
        yield pid
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def remove_all(running: Running) -> None:
    """Leave nothing behind; what a test left loading is given up."""
    for client in clients_of(running):
        with client:
            for corpus in client.get("/v1/corpora").json()["data"]:
                client.delete(f"/v1/corpora/{corpus['id']}")
    assert shelf(running) == ()


def clients_of(running: Running) -> list[httpx.Client]:
    ring = running.service.key_ring
    if ring is None:
        return [client_of(running)]
    return [running.as_tenant(tenant) for tenant in ring.tenants]


def files_of(running: Running) -> dict[str, list[str]]:
    """What lies in the state folder: indexes and uploads."""
    assert running.service.corpora is not None
    folder = running.service.corpora.folder.index("x").parent.parent
    return {name: sorted(os.listdir(folder / name)) for name in ("indexes", "uploads")}


def jsonl(*documents: Any) -> bytes:
    return b"".join(json.dumps(document).encode() + b"\n" for document in documents)


def figures(running: Running) -> dict[str, float]:
    """What /metrics says of corpora, by the rest of the name (and state)."""
    shown = {}
    for line in running.client.get("/metrics").text.splitlines():
        if line.startswith("sessile_corpora"):
            name, _, value = line.rpartition(" ")
            label = name.partition('state="')[2].partition('"')[0]
            shown[label or name.partition("{")[0].removeprefix("sessile_corpora_")] = float(value)
    return shown


def tree_of(folder: Path, **files: str) -> Path:
    """The folder with these files in it; a name's double underscores are slashes."""
    for name, text in files.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")
    return folder

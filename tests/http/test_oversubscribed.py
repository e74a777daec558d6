"""Twenty sessions whose KV together is ten times the pool, on a real server: all end well, and every token is right."""

import asyncio
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sessile import LLM
from sessile.bench.client import NativeServer, connected, side_by_side
from tests.http.serving import Deployment, free_port, wait_until_healthy
from tests.parity.tiny_models import VOCAB, make_tiny
from tests.unit.tiny_folder import write_tiny_model

pytestmark = pytest.mark.long

ROOT = Path(__file__).resolve().parents[2]
SESSIONS, TURNS, NEW_TOKENS = 20, 10, 8
ADDED_TOKENS = 45
CONTEXT_TOKENS, POOL_PAGES, PAGE_BYTES = 532, 65, 24_576


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model whose output hangs on all of its context, with a tokenizer."""
    folder = write_tiny_model(tmp_path_factory.mktemp("model"))
    make_tiny("qwen3", folder)
    return folder


@pytest.fixture(scope="module")
def deployment(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """A server for it with room for two whole sessions, audited after every step."""
    port = free_port()
    log = tmp_path_factory.mktemp("server") / "log"
    settings = {
        "port": port, "model": folder, "dtype": "float32", "context-tokens": CONTEXT_TOKENS, "audit-level": 2,
        "kv-memory": POOL_PAGES * PAGE_BYTES, "threads": 1,
    }  # fmt: skip
    flags = [f"--{name}={value}" for name, value in settings.items()]
    with log.open("w") as sink:
        process = subprocess.Popen([sys.executable, "-m", "sessile", "serve", *flags], stderr=sink, cwd=ROOT, text=True)
    deployment = Deployment(process, f"http://127.0.0.1:{port}", log)
    try:
        wait_until_healthy(deployment)
        yield deployment
    finally:
        process.terminate()
        process.wait(30)


class Conversation:
    """One session as its client remembers it."""

    def __init__(self, index: int) -> None:
        self.history: list[int] = []
        self.turns: list[tuple[int, list[int]]] = []
        """Length of the context and output of each turn."""
        self._dice = random.Random(index)

    async def run(self, server: NativeServer) -> None:
        session = await server.open_session()
        for _ in range(TURNS):
            added = [self._dice.randrange(3, VOCAB) for _ in range(ADDED_TOKENS)]
            answer = await server.generate(added, NEW_TOKENS, session, expect_tokens=len(self.history))
            self.history += added
            self.turns.append((len(self.history), answer.tokens))
            self.history += answer.tokens
        assert await server.session_tokens(session) == self.history


async def converse(url: str, conversations: list[Conversation]) -> tuple[int, dict[str, float]]:
    """Run all side by side; tokens that the pool holds, and the server's totals."""
    async with connected(url) as server:
        await side_by_side([conversation.run(server) for conversation in conversations])
        pool = await server.pool()
        return (pool["pages"]["total"] - pool["pages"]["scratch"]) * pool["page_tokens"], await server.totals()


def test_h35_sessions_of_ten_pools_all_end_and_say_what_fresh_prompts_say(deployment: Deployment, folder: Path) -> None:
    conversations = [Conversation(index) for index in range(SESSIONS)]
    pool_tokens, totals = asyncio.run(converse(deployment.url, conversations))
    assert sum(len(conversation.history) for conversation in conversations) >= 10 * pool_tokens
    assert totals["sessile_turns_committed_total"] == SESSIONS * TURNS
    assert totals["sessile_demoted_pages_total"] > 0
    assert totals["sessile_audit_checks_total"] > 0 and totals["sessile_audit_failures_total"] == 0
    with LLM(str(folder), dtype="float32", context_tokens=CONTEXT_TOKENS, kv_memory="32M", threads=1) as roomy:
        for turn in reversed(range(TURNS)):  # The longest first: the others find it in the prefix tree.
            prompts = [conversation.history[: conversation.turns[turn][0]] for conversation in conversations]
            fresh = roomy.generate(prompts, max_new_tokens=NEW_TOKENS, temperature=0, ignore_eos=True)
            said = [conversation.turns[turn][1] for conversation in conversations]
            assert [completion.tokens for completion in fresh] == said, f"turn {turn}"

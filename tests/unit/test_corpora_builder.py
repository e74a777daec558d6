"""The builder process and the server's link to it: builds side by side, cancels, an idle end."""

import asyncio
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from sessile.contract.corpora import Source
from sessile.draft.corpus_index import CorpusIndex
from sessile.errors import InvalidRequest, LimitReached, UserError
from sessile.server.corpora.builder import BuilderLink, BuildError
from tests.http.fake_engine import byte_tokenizer

CHILD = [sys.executable, "-m", "tests.http.builder_child"]


def with_link(work: Callable[[BuilderLink], Awaitable[None]], *, argv: list[str] = CHILD, idle_s: float = 60.0) -> None:
    async def run() -> None:
        link = BuilderLink(argv, "{}", idle_s=idle_s)
        try:
            await asyncio.wait_for(work(link), 120)
        finally:
            await link.close()

    asyncio.run(run())


def text(folder: Path, name: str, content: str) -> Source:
    path = folder / name
    path.write_text(content, "utf-8")
    return Source(str(path), "jsonl" if name.endswith(".jsonl") else "text")


def test_a_build_is_counted_then_built_and_says_how_far_it_is(tmp_path: Path) -> None:
    target = tmp_path / "t.corpus"

    async def work(link: BuilderLink) -> None:
        sources = [text(tmp_path, "a.jsonl", '"one"\n{"text": "two"}\n'), text(tmp_path, "b.txt", "three")]
        run = await link.begin(sources, str(target), tokens_max=11)
        counted = await run.counted
        assert (counted.tokens, counted.documents) == (11, 3)
        assert not target.exists(), "nothing is built before there is room for it"
        run.proceed()
        checksum = await run.built
        index = CorpusIndex.load(target)
        assert (index.tokens, index.documents, index.resident_bytes) == (11, 3, counted.bytes)
        assert target.read_bytes()[64:96].hex() == checksum
        assert index.label.hex() == run.tokenizer == byte_tokenizer().fingerprint()
        assert (run.stage, run.share) == ("indexing", 1.0)

    with_link(work)


@pytest.mark.parametrize(
    ("content", "tokens_max", "error", "says"),
    [
        ("x" * 12, 11, LimitReached, "more than 11 tokens"),
        ("", 11, InvalidRequest, "the documents are empty"),
    ],
)
def test_what_cannot_be_built_is_said_in_the_users_terms(
    tmp_path: Path, content: str, tokens_max: int, error: type[UserError], says: str
) -> None:
    async def work(link: BuilderLink) -> None:
        run = await link.begin([text(tmp_path, "a.txt", content)], str(tmp_path / "t.corpus"), tokens_max)
        with pytest.raises(error, match=says):
            await run.counted
        with pytest.raises(error, match=says):
            await run.built
        assert list(tmp_path.glob("*corpus*")) == []

    with_link(work)


def test_a_target_that_cannot_be_written_fails_its_build_alone(tmp_path: Path) -> None:
    async def work(link: BuilderLink) -> None:
        sources = [text(tmp_path, "a.txt", "abc")]
        bad = await link.begin(sources, str(tmp_path / "none" / "t.corpus"), 10)
        good = await link.begin(sources, str(tmp_path / "t.corpus"), 10)
        for run in (bad, good):
            await run.counted
            run.proceed()
        with pytest.raises(BuildError, match="FileNotFoundError"):
            await bad.built
        assert await good.built

    with_link(work)


def test_more_builds_than_run_at_once_wait_for_their_turn(tmp_path: Path) -> None:
    async def work(link: BuilderLink) -> None:
        sources = [text(tmp_path, "a.txt", "abc")]
        runs = [await link.begin(sources, str(tmp_path / f"{number}.corpus"), 10) for number in range(6)]
        for run in runs[:2]:
            await run.counted
        assert [run.stage for run in runs[2:]] == ["waiting"] * 4
        runs[5].cancel()
        for run in runs[:5]:
            await run.counted
            run.proceed()
        assert len([await run.built for run in runs[:5]]) == 5
        with pytest.raises(UserError, match="removed"):
            await runs[5].built

    with_link(work)


def test_an_idle_builder_ends_and_the_next_build_starts_another(tmp_path: Path) -> None:
    async def work(link: BuilderLink) -> None:
        pids = []
        for number in range(2):
            run = await link.begin([text(tmp_path, "a.txt", "abc")], str(tmp_path / f"{number}.corpus"), 10)
            pids.append(link.pid)
            await run.counted
            await asyncio.sleep(0.3)
            assert link.pid is not None, "a build that waits is none of idleness"
            run.proceed()
            await run.built
            while link.pid is not None:
                await asyncio.sleep(0.01)
        assert pids[0] != pids[1]

    with_link(work, idle_s=0.05)


def test_a_builder_that_cannot_be_started_or_dies_at_once_fails_the_build(tmp_path: Path) -> None:
    async def cannot(link: BuilderLink) -> None:
        with pytest.raises(BuildError, match="cannot be started"):
            await link.begin([], str(tmp_path / "t.corpus"), 10)

    async def dies(link: BuilderLink) -> None:
        run = await link.begin([], str(tmp_path / "t.corpus"), 10)
        with pytest.raises(BuildError, match="exited with status 3"):
            await run.built

    with_link(cannot, argv=[str(tmp_path / "no-such-program")])
    with_link(dies, argv=[sys.executable, "-c", "raise SystemExit(3)"])

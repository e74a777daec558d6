"""The matrix: on a real server, concurrent sessions say what their histories say when they are sent again.

Server and engine are processes of their own, as `sessile serve` starts them, with a full audit after every step. The
model is tiny, random and in fp32, so that greedy tokens are exact, and every answer is compared twice: with the same
tokens sent as a plain prompt to the same server, whose cache was flushed before; and with transformers, which shares
no code and no state with it. One class is one way to run the server; each can be run alone.
"""

import asyncio
import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import httpx
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sessile.commands import free_port
from tests.http.storm import LONG, Answer, Client, Conversation, Journal, rage
from tests.parity.tiny_models import Tiny, save_tiny
from tests.unit.tiny_folder import EOS_ID, write_tiny_model

ROOT = Path(__file__).resolve().parents[2]
CONTEXT_TOKENS = 2048
ROWS = 8
"""Fewer than there are clients, so that turns wait, and are ended while they wait."""
KV_MEMORY = "32M"
"""Room for all that is ever warm: then nobody's KV is given up, and it is known what a turn must find."""
START_S = 240
"""The first start of all compiles kernels."""
ALONE = "alone"
"""Who asks the same thing twice after the storm, with the server to itself: the second answer is that of the first."""
DOUBLE_COUNT = "double count at the borrow"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """A random Llama with a byte for a token, and its twin in transformers."""
    folder = write_tiny_model(tmp_path_factory.mktemp("llama"))
    torch.manual_seed(3)
    shape = LlamaConfig(
        vocab_size=EOS_ID + 4, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=CONTEXT_TOKENS, initializer_range=0.15, bos_token_id=None,
        eos_token_id=EOS_ID, pad_token_id=None, tie_word_embeddings=False,
    )  # fmt: skip
    return save_tiny(LlamaForCausalLM(shape), folder)


@contextlib.contextmanager
def serving(model: Path, log: Path, program: Sequence[str], flags: Sequence[str]) -> Iterator[str]:
    """The URL of a server that this program is. What it says goes to the log."""
    port = free_port("127.0.0.1")
    url = f"http://127.0.0.1:{port}"
    fixed = (
        f"--port={port}", f"--model={model}", "--dtype=float32", f"--kv-memory={KV_MEMORY}", f"--rows-max={ROWS}",
        "--threads=1", "--audit-level=2", "--log-level=warning",
    )  # fmt: skip
    with log.open("w") as sink:
        process = subprocess.Popen([sys.executable, *program, *fixed, *flags], cwd=ROOT, stderr=sink)
    try:
        deadline_s = time.monotonic() + START_S
        while not _is_healthy(url):
            assert process.poll() is None and time.monotonic() < deadline_s, log.read_text()
            time.sleep(0.05)
        yield url
    finally:
        process.kill()  # Its engine notices that its standard input has ended, and is gone as well.
        process.wait()


def _is_healthy(url: str) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(f"{url}/health", timeout=5).status_code == 200
    return False


@dataclass
class Storm:
    """All that was seen of one server. calm, flushed, last: its figures after the storm, after a flush, at the end."""

    journal: Journal = field(default_factory=Journal)
    calm: dict[str, Any] = field(default_factory=dict)
    flushed: dict[str, Any] = field(default_factory=dict)
    last: dict[str, Any] = field(default_factory=dict)
    resent: list[Answer] = field(default_factory=list)
    """For each answer of the journal, what the server said to its prompt when all KV had been dropped."""


def storm_over(matrix: "type[Matrix]", model: Path, log: Path, fault: str | None) -> Storm:
    """Start a server of the matrix, with a fault if one is named, and let a storm over it. Fails if it is cut short."""
    try:
        program = matrix.program if fault is None else ("-m", "tests.http.planted", fault)
        with serving(model, log, program, matrix.flags) as url:
            return asyncio.run(_storm(url, matrix))
    except Exception as error:
        raise AssertionError(f"the storm was cut short: {error!r}\nThe server said: {log.read_text()}") from error


async def _storm(url: str, matrix: "type[Matrix]") -> Storm:
    """Let all clients loose, send everything again, continue every session without its KV, close and flush."""
    storm = Storm()
    async with httpx.AsyncClient(base_url=url, timeout=60, limits=httpx.Limits(max_connections=None)) as http:
        client = Client(http, storm.journal, matrix.page_size)
        conversations = await rage(client)
        for conversation in conversations:
            await conversation.check_history()
        storm.calm = await client.figures()
        await client.post("/flush_cache", {})
        storm.flushed = await client.figures()
        await asyncio.gather(*(_continue(conversation) for conversation in conversations))
        for _ in range(2):
            await client.ask(ALONE, [7, 8, 9], LONG, stream=False, **matrix.alone)
        await client.post("/flush_cache", {})
        storm.resent = await _send_again(client, storm.journal.answers)
        for conversation in conversations:
            await conversation.close()
        await client.post("/flush_cache", {})
        storm.last = await client.figures()
    return storm


async def _continue(conversation: Conversation) -> None:
    """Two more turns of a session whose KV is gone: the first computes it again, the second finds it."""
    conversation.warm_tokens = None
    await conversation.turn(9)
    await conversation.turn(2, stream=True)


async def _send_again(client: Client, answers: list[Answer]) -> list[Answer]:
    """Each prompt as a plain request, on a page of the journal of its own."""
    again = Client(client.http, Journal(statuses=client.journal.statuses), client.page_size)
    busy = asyncio.Semaphore(2 * ROWS)

    async def send(number: int, answer: Answer) -> None:
        async with busy:
            await again.ask(str(number), answer.prompt, len(answer.output), stream=number % 2 == 0)

    await asyncio.gather(*(send(number, answer) for number, answer in enumerate(answers)))
    return sorted(again.journal.answers, key=lambda answer: int(answer.client))


class Matrix:
    """What must hold on every server of the matrix. program, flags: how it is started."""

    program: ClassVar[Sequence[str]] = ("-m", "sessile", "serve")
    flags: ClassVar[Sequence[str]] = ()
    page_size: ClassVar[int] = 16
    alone: ClassVar[dict[str, Any]] = {}
    """Fields of the requests of ALONE, besides."""

    @pytest.fixture(scope="class")
    @classmethod
    def storm(cls, request: pytest.FixtureRequest, tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Storm:
        log = tmp_path_factory.mktemp("server") / "server.log"
        return storm_over(cls, tiny.folder, log, request.config.getoption("plant"))

    def test_every_answer_is_that_of_its_tokens_sent_again(self, storm: Storm) -> None:
        assert len(storm.resent) == len(storm.journal.answers) > 120
        for answer, again in zip(storm.journal.answers, storm.resent, strict=True):
            assert (again.prompt, again.output) == (answer.prompt, answer.output), answer.client

    def test_every_answer_is_that_of_transformers(self, storm: Storm, tiny: Tiny) -> None:
        for answer in storm.journal.answers:
            likeliest = tiny.logits(answer.prompt + answer.output[:-1]).argmax(-1).tolist()
            assert answer.output == likeliest[len(answer.prompt) - 1 :], answer.client

    def test_h65_a_warm_turn_reuses_all_of_its_history_but_the_last_token(self, storm: Storm) -> None:
        assert storm.calm["demoted_pages_total"] == 0, "KV was reclaimed: it is not known what a turn had to find"
        warm = [answer for answer in storm.journal.answers if answer.warm_tokens is not None]
        assert len(warm) > 60
        for answer in warm:
            assert answer.cached_tokens == answer.warm_tokens, answer.client

    def test_h18_h25_h27_what_was_torn_or_refused_left_no_trace(self, storm: Storm) -> None:
        assert storm.journal.torn == 12 and storm.journal.refused >= 16 and storm.journal.deferred == 2
        assert storm.calm["turns_rolled_back_total"] >= storm.journal.torn

    def test_h07_every_step_was_audited_and_no_audit_failed(self, storm: Storm) -> None:
        assert storm.last["audit_checks_total"] >= storm.last["settled_steps_total"] * 9 // 10 > 100
        assert storm.last["audit_failures_total"] == 0

    def test_no_reply_was_the_servers_fault(self, storm: Storm) -> None:
        assert storm.journal.statuses <= {200, 400, 409, 422}

    def test_when_all_is_closed_and_flushed_every_page_and_row_is_free(self, storm: Storm) -> None:
        for figures in (storm.flushed, storm.last):
            assert figures["pages_free"] + figures["pages_scratch"] == figures["pages_total"]
            assert figures["rows_held"] == figures["pages_sessions"] == figures["pages_tree"] == 0
        assert storm.flushed["sessions_open"] > storm.last["sessions_open"] == 0


class Retracting(Matrix):
    """Servers that preempt the newest running request every few steps."""

    def test_h26_h66_requests_were_retracted(self, storm: Storm) -> None:
        assert storm.last["preemptions_total"] > 30


class TestBase(Matrix):
    """As it is started by default."""


class TestMixedChunk(Matrix):
    """Prompts are cut into chunks, which share steps with decoding rows."""

    flags = ("--chunk-tokens=16",)


class TestRetract(Retracting):
    flags = ("--retract-every=4",)


@pytest.mark.long
class TestRetractMixedChunk(Retracting):
    flags = ("--retract-every=4", "--chunk-tokens=16")


class TestNoOverlap(Matrix):
    flags = ("--overlap=off",)


class Speculating(Matrix):
    """Servers that draft whenever anything matches."""

    program = ("-m", "tests.http.eager")
    alone: ClassVar[dict[str, Any]] = {"remember": True}

    def test_h49_drafts_were_verified_and_what_was_said_before_is_drafted(self, storm: Storm) -> None:
        """How many come in the storm depends on its timing; what is asked again alone is drafted whole, every time."""
        assert storm.calm["drafts_offered_total"] > 0
        _, again = (answer for answer in storm.journal.answers if answer.client == ALONE)
        offered, accepted = again.drafts
        assert offered >= accepted > LONG // 2

    def test_every_answer_says_how_its_drafts_did(self, storm: Storm) -> None:
        said = [answer.drafts for answer in storm.journal.answers]
        assert all(0 <= accepted <= offered for offered, accepted in said)
        assert any(accepted for _, accepted in said)


@pytest.mark.long
class TestThriftySpeculation(Matrix):
    """As `--speculate on` is: drafts only where the step times say that they pay."""

    flags = ("--speculate=on",)


class TestSpeculation(Speculating):
    flags = ("--speculate=on",)


class TestSpeculationRetract(Retracting, Speculating):
    flags = ("--speculate=on", "--retract-every=4")


@pytest.mark.long
class TestSpeculationMixedChunk(Speculating):
    flags = ("--speculate=on", "--chunk-tokens=16")


@pytest.mark.long
class TestSpeculationNoOverlap(Speculating):
    flags = ("--speculate=on", "--overlap=off")


class TestPage1(Matrix):
    flags = ("--page-size=1",)
    page_size = 1


class TestPage256(Matrix):
    flags = ("--page-size=256",)
    page_size = 256


MATRIX = (
    TestBase, TestMixedChunk, TestRetract, TestRetractMixedChunk, TestNoOverlap, TestPage1, TestPage256,
    TestThriftySpeculation, TestSpeculation, TestSpeculationRetract, TestSpeculationMixedChunk,
    TestSpeculationNoOverlap,
)  # fmt: skip


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One class shows that the matrix is awake; with --whole-grid all of them do."""
    if "watched" in metafunc.fixturenames:
        whole = metafunc.config.getoption("whole_grid")
        metafunc.parametrize("watched", MATRIX if whole else MATRIX[:1], ids=lambda matrix: matrix.__name__)


def test_h01_a_page_that_is_counted_twice_fails_the_class(watched: type[Matrix], tiny: Tiny, tmp_path: Path) -> None:
    log = tmp_path / "server.log"
    with pytest.raises(AssertionError):
        Matrix().test_h07_every_step_was_audited_and_no_audit_failed(
            storm_over(watched, tiny.folder, log, DOUBLE_COUNT)
        )
    assert "pages, the running counter says" in log.read_text()

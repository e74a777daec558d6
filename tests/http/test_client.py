"""Client and AsyncClient against a served core: what they say, what they raise, and what they send again."""

import asyncio
import time
from collections.abc import Iterator
from functools import partial

import pytest

from sessile import AsyncClient, Client, SamplingParams
from sessile.contract.messages import Done
from sessile.errors import (
    AnswerChanged,
    DuplicateSession,
    HistoryMismatch,
    InvalidRequest,
    LimitReached,
    NotFound,
    NotReady,
    SessionBusy,
    StartupError,
    Unauthenticated,
)
from tests.http.broken_wire import BrokenWire
from tests.http.conftest import Running, ring_of, running_server
from tests.http.toy_engine import ToyEngine


@pytest.fixture(scope="module")
def toy() -> Iterator[Running]:
    with running_server(partial(ToyEngine, pages=600)) as running:
        yield running


@pytest.fixture
def client(toy: Running) -> Iterator[Client]:
    with Client(toy.url) as client:
        yield client


@pytest.fixture
def wire(toy: Running) -> Iterator[BrokenWire]:
    with BrokenWire(toy.url) as wire:
        yield wire


@pytest.fixture
def slow(toy: Running) -> Iterator[None]:
    """Steps of 5 ms."""
    toy.engine.device.step_s = 0.005
    yield
    toy.engine.device.step_s = 0.0


def test_text_and_token_ids_give_the_same(client: Client) -> None:
    text = client.generate("hi", max_new_tokens=4, seed=1)
    assert text.tokens == client.generate([104, 105], max_new_tokens=4, seed=1).tokens


def test_a_stream_joined_is_the_completion(client: Client) -> None:
    pieces = list(client.stream("hi", max_new_tokens=100, seed=3))
    completion = pieces[-1].completion
    assert completion is not None and len(pieces) > 3
    assert completion.tokens == client.generate("hi", max_new_tokens=100, seed=3).tokens
    assert "".join(piece.text for piece in pieces) == completion.text
    assert [token for piece in pieces for token in piece.tokens] == completion.tokens


def test_logprobs_cross_the_wire(client: Client) -> None:
    said = client.generate("hi", max_new_tokens=3, return_logprob=True, top_logprobs_num=2)
    assert said.logprobs is not None
    assert [each.token for each in said.logprobs] == said.tokens
    assert all(len(each.top) == 2 and each.top[0][1] >= each.top[1][1] for each in said.logprobs)


def test_sampling_params_cross_the_wire(server: Running) -> None:
    with Client(server.url) as client:
        client.generate("hi", SamplingParams(top_k=5, logit_bias={65: 2.0}, stop=["x"]), max_new_tokens=None, seed=9)
    sampling = server.engine.submits()[0].sampling
    assert (sampling.top_k, sampling.logit_bias, sampling.stop) == (5, ((65, 2.0),), (b"x",))
    assert (sampling.max_new_tokens, sampling.seed) == (None, 9)


def test_a_session_takes_turns_forks_and_goes_back(client: Client) -> None:
    with client.session() as session:
        session.generate("one", max_new_tokens=4)
        assert session.append("two") == 10
        assert session.generate(max_new_tokens=4).cached_tokens == 9
        with session.fork(at_tokens=3) as fork:
            assert fork.tokens() == list(b"one")
            assert fork.id in {state.id for state in client.sessions()}
        assert session.rewind(to_turn=1) == 7
        assert session.state().tokens == 7
        assert client.resume(session.id).generate("x", max_new_tokens=1).prompt_tokens == 8
    with pytest.raises(NotFound):
        client.resume(session.id)


def test_errors_are_of_the_kind_that_the_server_means(client: Client) -> None:
    with pytest.raises(InvalidRequest, match="temperature"):
        client.generate("x", temperature=-1)
    with pytest.raises(InvalidRequest, match="prompt: must be text"):
        client.generate([None])  # type: ignore[list-item]
    with client.session("taken") as session:
        with pytest.raises(DuplicateSession):
            client.session("taken")
        with pytest.raises(InvalidRequest) as refusal:
            session.rewind(to_tokens=99)
        assert (refusal.value.status, refusal.value.param) == (422, "to_tokens")


def test_a_history_that_somebody_else_changed_is_noticed(client: Client) -> None:
    with client.session() as session:
        session.append("one")
        client.resume(session.id).append("two")
        with pytest.raises(HistoryMismatch, match="6 tokens, not 3"):
            session.append("three")
        session.state()
        assert session.append("three") == 11


@pytest.mark.usefixtures("slow")
def test_a_turn_beside_another_is_busy(client: Client) -> None:
    with client.session() as session:
        turn = session.stream("one", max_new_tokens=300)
        next(turn)
        with pytest.raises(SessionBusy):
            client.resume(session.id).generate("two")
        turn.close()  # type: ignore[attr-defined]


@pytest.mark.usefixtures("slow")
def test_a_stream_that_is_closed_rolls_its_turn_back_and_the_next_one_waits_for_that(client: Client) -> None:
    with client.session() as session:
        session.append("one")
        turn = session.stream("two", max_new_tokens=300)
        next(turn)
        turn.close()  # type: ignore[attr-defined]
        assert session.generate("three", max_new_tokens=1).prompt_tokens == len("onethree")


@pytest.mark.usefixtures("slow")
def test_an_interrupted_turn_ends_as_an_abort_with_what_was_said(client: Client) -> None:
    with client.session() as session:
        turn = session.stream("one", max_new_tokens=300)
        next(turn)
        session.interrupt()
        completion = list(turn)[-1].completion
        assert completion is not None
        assert completion.finish_reason == "abort" and 0 < len(completion.tokens) < 300
        assert session.append("two") == 3


def test_h59_a_turn_whose_reply_was_lost_is_taken_once(toy: Running, wire: BrokenWire) -> None:
    with Client(wire.url) as client, client.session() as session:
        wire.breaks = ["lost"]
        said = session.generate("one", max_new_tokens=4)
        assert len(said.tokens) == 4 and said.prompt_tokens == 3
        wire.breaks = ["lost", "lost"]
        assert session.append("two") == 10
        assert (session.state().turns, session.tokens()[:3]) == (2, list(b"one"))


@pytest.mark.parametrize("passed_bytes", [0, 60, 400, 1200, 2400])
def test_a_stream_that_breaks_anywhere_goes_on_and_says_nothing_twice(
    toy: Running, wire: BrokenWire, passed_bytes: int
) -> None:
    with Client(wire.url) as client, client.session() as session:
        session.append("one")
        wire.breaks = [passed_bytes, passed_bytes // 2, passed_bytes]
        pieces = list(session.stream("two", max_new_tokens=40, seed=7))
        completion = pieces[-1].completion
        assert completion is not None
        assert wire.requests >= 3  # how many bytes a stream has depends on how its events are sent together
        assert [token for piece in pieces for token in piece.tokens] == completion.tokens
        assert "".join(piece.text for piece in pieces) == completion.text
        assert session.tokens() == [*b"onetwo", *completion.tokens]


def test_an_answer_that_was_made_again_otherwise_ends_the_stream(server: Running) -> None:
    """What is not the same after a break, on a GPU for example, is not joined to what had come."""
    # Slow: where many tokens come in one piece, all of them come before the break.
    server.engine.script, server.engine.token_interval_s = [*b"first answer"], 0.05
    with BrokenWire(server.url) as wire, Client(wire.url) as client:
        wire.breaks = [900]
        stream = client.stream("x", max_new_tokens=12)
        assert "first answer".startswith(next(stream).text)  # One token, or two where the machine is busy.
        server.engine.script = [*b"other answer"]
        with pytest.raises(AnswerChanged):
            list(stream)


def test_a_lost_fork_or_open_is_made_once(toy: Running, wire: BrokenWire) -> None:
    with Client(wire.url) as client:
        before = {state.id for state in client.sessions()}
        wire.breaks = ["lost"]
        session = client.session()
        session.append("one")
        wire.breaks = ["lost"]
        fork = session.fork()
        assert {state.id for state in client.sessions()} - before == {session.id, fork.id}
        assert fork.append("two") == 6
        wire.breaks = ["lost"]
        fork.close()


def test_a_request_that_did_not_arrive_is_sent_again(toy: Running, wire: BrokenWire) -> None:
    with Client(wire.url) as client:
        wire.breaks = ["refused", "refused"]
        assert client.model()["model_path"] == "toy"


def test_without_patience_nothing_is_sent_again(toy: Running, wire: BrokenWire) -> None:
    with Client(wire.url, patience_s=0) as client:
        wire.breaks = ["refused"]
        with pytest.raises(NotReady, match="cannot be reached or is gone"):
            client.model()
        assert wire.requests == 1


def test_no_server_is_told_with_its_address() -> None:
    with Client("http://127.0.0.1:9", patience_s=0.2) as client, pytest.raises(NotReady, match="http://127.0.0.1:9"):
        client.generate("x")


@pytest.mark.parametrize("url", ["127.0.0.1:30000", "ftp://x", "http://", "http://x:port", ""])
def test_what_is_no_address_is_refused_at_once(url: str) -> None:
    with pytest.raises(StartupError, match="is not the address of a server"):
        Client(url)


def busy(status: int) -> Done:
    return Done(key=0, reason="error", status=status, code="limit_reached", message="the queue is full")


def test_retry_after_is_honoured(server: Running) -> None:
    """The fake engine refuses once; the server tells when to come back."""
    with Client(server.url) as client:
        wait_s = server.service.retry_after_s
        server.engine.refusals.append(busy(429))
        started_s = time.monotonic()
        reply = client.exchange("POST", "/generate", json={"text": "x"})
        assert reply.status_code == 200
        assert time.monotonic() - started_s >= wait_s


def test_a_limit_is_raised_when_patience_ends_and_says_when_to_come_back(server: Running) -> None:
    with Client(server.url, patience_s=0) as client:
        server.engine.refusals.append(busy(429))
        with pytest.raises(LimitReached) as refusal:
            client.exchange("POST", "/generate", json={"text": "x"})
        assert refusal.value.retry_after_s == server.service.retry_after_s
        server.engine.refusals.append(busy(429))
        with pytest.raises(LimitReached):
            client.generate("x")


def test_a_key_is_sent_and_a_wrong_one_is_told() -> None:
    with running_server(key_ring=ring_of(acme="user")) as server:
        with Client(server.url, "acme-key") as client:
            assert client.generate("hi", max_new_tokens=1).tokens
        with Client(server.url, "wrong") as client, pytest.raises(Unauthenticated):
            client.generate("hi")


def test_the_same_in_asyncio(toy: Running, wire: BrokenWire) -> None:
    async def main() -> None:
        async with asyncio.timeout(60), AsyncClient(wire.url) as client:
            many = await asyncio.gather(*(client.generate("hi", max_new_tokens=4, seed=1) for _ in range(20)))
            assert all(each.tokens == many[0].tokens for each in many)
            async with await client.session() as session:
                wire.breaks = ["lost"]
                first = await session.generate("one", max_new_tokens=4)
                pieces = [piece async for piece in session.generate("two", max_new_tokens=4)]
                assert pieces[-1].completion is not None and pieces[-1].completion.cached_tokens == 6
                fork = await session.fork(at_turn=1)
                assert await fork.tokens() == [*b"one", *first.tokens]
                assert await session.rewind(to_tokens=3) == 3
                assert await session.append("x") == 4
                assert fork.id in {state.id async for state in client.sessions()}
                assert (await (await client.resume(fork.id)).state()).turns == 1
                await fork.close()
            with pytest.raises(InvalidRequest, match="temperature"):
                await client.generate("x", temperature=-1)
            assert (await client.model())["model_path"] == "toy"

    asyncio.run(main())


@pytest.mark.usefixtures("slow")
def test_a_generation_that_is_left_in_asyncio_rolls_its_turn_back(toy: Running) -> None:
    async def main() -> None:
        async with asyncio.timeout(60), AsyncClient(toy.url) as client, await client.session() as session:
            turn = session.generate("one", max_new_tokens=300)
            async for _ in turn:
                break
            await turn.aclose()
            assert (await session.generate("two", max_new_tokens=1)).prompt_tokens == 3

    asyncio.run(main())

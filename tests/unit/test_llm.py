"""LLM and its sessions, on the toy device: lists, streams, turns as transactions, and what an end does to callers."""

import gc
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from sessile import LLM, SamplingParams
from sessile.errors import InvalidRequest, LimitReached, NotFound, NotReady, SessionBusy, TooLong
from tests.unit.toy_llm import CONTEXT_TOKENS, ToyEngineDevice, toys

SHORT = SamplingParams(max_new_tokens=4, seed=1)
LONG = SamplingParams(max_new_tokens=300)


@pytest.fixture(scope="module")
def device_and_llm() -> Iterator[tuple[ToyEngineDevice, LLM]]:
    with toys() as (device, make, _), make() as llm:
        yield device, llm


@pytest.fixture
def llm(device_and_llm: tuple[ToyEngineDevice, LLM]) -> LLM:
    return device_and_llm[1]


@pytest.fixture
def slow(device_and_llm: tuple[ToyEngineDevice, LLM]) -> Iterator[LLM]:
    """The same, with steps of 10 ms."""
    device, llm = device_and_llm
    device.step_s = 0.01
    yield llm
    device.step_s = 0.0


def test_a_list_of_prompts_gives_a_list_in_its_order(llm: LLM) -> None:
    prompts = [f"prompt {number}" for number in range(100)]
    together = llm.generate(prompts, SHORT)
    assert [each.tokens for each in together] == [llm.generate(each, SHORT).tokens for each in prompts]


def test_lists_may_be_of_token_ids_and_of_nothing(llm: LLM) -> None:
    (said,) = llm.generate([[104, 105]], SHORT)
    assert said.tokens == llm.generate("hi", SHORT).tokens == llm.generate([104, 105], SHORT).tokens
    assert llm.generate([]) == []


def test_a_keyword_wins_over_sampling_params(llm: LLM) -> None:
    assert len(llm.generate("hi", SamplingParams(max_new_tokens=9), max_new_tokens=2).tokens) == 2


def test_without_a_limit_the_output_is_that_of_http(llm: LLM) -> None:
    assert len(llm.generate("hi").tokens) == 128
    assert len(llm.generate("hi", max_new_tokens=None).tokens) == CONTEXT_TOKENS - 2


def test_logprobs_come_with_each_token_and_its_rivals(llm: LLM) -> None:
    said = llm.generate("hi", max_new_tokens=5, temperature=0, return_logprob=True, top_logprobs_num=2)
    assert said.logprobs is not None
    assert [each.token for each in said.logprobs] == said.tokens
    assert all(len(each.top) == 2 and each.top[0][1] >= each.top[1][1] for each in said.logprobs)
    assert llm.generate("hi", max_new_tokens=1).logprobs is None


def test_more_prompts_than_the_queue_takes_are_done_all_the_same() -> None:
    with toys(queue_max=3) as (_, make, _), make() as llm:
        assert len(llm.generate(["x"] * 60, max_new_tokens=2)) == 60


def test_the_first_refusal_of_a_list_is_raised_when_the_others_have_ended(llm: LLM) -> None:
    with pytest.raises(TooLong):
        llm.generate(["fine", "x" * CONTEXT_TOKENS, "fine too"], max_new_tokens=2)
    assert llm.generate("and on", max_new_tokens=2).finish_reason == "length"


def test_a_stream_joined_is_the_completion(llm: LLM) -> None:
    pieces = list(llm.stream("hi", max_new_tokens=20, seed=3))
    completion = pieces[-1].completion
    assert completion is not None and len(pieces) > 3
    assert completion.tokens == llm.generate("hi", max_new_tokens=20, seed=3).tokens
    assert "".join(piece.text for piece in pieces) == completion.text
    assert [token for piece in pieces for token in piece.tokens] == completion.tokens


def test_a_chat_is_the_rendered_prompt(llm: LLM) -> None:
    asked = {"role": "user", "content": "hi"}
    assert llm.chat([asked], max_new_tokens=3, seed=1).text == llm.generate("user:hi\n", max_new_tokens=3, seed=1).text
    assert len(llm.chat([[asked], [asked]], max_new_tokens=3)) == 2
    with pytest.raises(InvalidRequest, match=r"messages\[0\].role"):
        llm.chat([{"role": "judge", "content": "hi"}])


def test_a_turn_computes_its_new_tokens_only(llm: LLM) -> None:
    with llm.session() as session:
        session.generate("one", max_new_tokens=4)
        assert session.generate("two", max_new_tokens=4).cached_tokens == 6
        assert session.state().tokens == len(session.tokens()) == 14


def test_a_fork_goes_its_own_way_and_a_rewind_goes_back(llm: LLM) -> None:
    with llm.session() as session:
        session.generate("one", max_new_tokens=4)
        with session.fork() as fork, session.fork(at_tokens=3) as early:
            said = fork.generate("two", max_new_tokens=4, seed=1)
            assert early.tokens() == session.tokens()[:3] == list(b"one")
            assert session.generate("two", max_new_tokens=4, seed=1).tokens == said.tokens
        assert session.rewind(to_turn=1) == 7
        assert session.rewind(to_tokens=2) == 2
        with pytest.raises(InvalidRequest):
            session.rewind(to_tokens=99)


def test_what_is_appended_is_there_and_an_empty_turn_goes_on_from_it(llm: LLM) -> None:
    with llm.session() as session:
        assert session.append("one") == 3
        assert session.append("two") == 6
        assert session.generate((), SHORT).tokens == llm.generate("onetwo", SHORT).tokens
        assert session.tokens()[:6] == list(b"onetwo")


def test_a_stream_that_is_closed_rolls_its_turn_back(slow: LLM) -> None:
    with slow.session() as session:
        session.append("one")
        turn = session.stream("two", LONG)
        next(turn)
        turn.close()  # type: ignore[attr-defined]
        assert session.generate("three", max_new_tokens=1).prompt_tokens == len("onethree")


def test_a_second_turn_beside_the_first_is_refused(slow: LLM) -> None:
    with slow.session() as session:
        turn = session.stream("one", LONG)
        next(turn)
        with pytest.raises(SessionBusy):
            session.generate("two")
        turn.close()  # type: ignore[attr-defined]


@contextmanager
def heard_control_c() -> Iterator[int]:
    """Python's own way of taking SIGINT, which a shell may have switched off; the main thread's number."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    main = threading.main_thread().ident
    assert main is not None
    yield main
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("listed", [False, True], ids=["turn", "list"])
def test_control_c_in_a_call_ends_its_requests_and_nothing_else(slow: LLM, listed: bool) -> None:
    with slow.session() as session, heard_control_c() as main:
        control_c = threading.Timer(0.2, signal.pthread_kill, (main, signal.SIGINT))
        control_c.start()
        with pytest.raises(KeyboardInterrupt):
            slow.generate(["one"] * 20, LONG) if listed else session.generate("one", LONG)
        assert session.generate("two", max_new_tokens=1).prompt_tokens == 3


def test_a_closed_session_is_gone_and_closing_it_again_is_fine(llm: LLM) -> None:
    session = llm.session()
    session.close()
    session.close()
    with pytest.raises(NotFound):
        session.generate("x")
    with pytest.raises(NotFound):
        session.tokens()


def test_threads_share_the_engine(llm: LLM) -> None:
    said: dict[int, list[int]] = {}

    def run(number: int) -> None:
        said[number] = llm.generate(f"thread {number}", SHORT).tokens

    threads = [threading.Thread(target=run, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert said == {number: llm.generate(f"thread {number}", SHORT).tokens for number in range(8)}


def test_a_session_expires_though_nobody_calls() -> None:
    with toys() as (_, make, _), make() as llm:
        session = llm.session(idle_timeout_s=0.05)
        deadline_s = time.monotonic() + 60
        while time.monotonic() < deadline_s:
            try:
                session.state()
            except NotFound:
                return
            time.sleep(0.01)
        pytest.fail("it did not expire")


def test_closing_ends_what_runs_and_refuses_what_comes() -> None:
    with toys() as (device, make, _):
        device.step_s = 0.01
        llm = make()
        ends: list[str] = []
        thread = threading.Thread(target=lambda: ends.append(llm.generate("x", LONG).finish_reason))
        thread.start()
        next(iter(llm.stream("y", LONG)))
        llm.close()
        llm.close()
        thread.join(60)
        assert (ends, device.closed) == (["abort"], 1)
        with pytest.raises(NotReady, match="closed"):
            llm.generate("z")


def test_an_llm_that_nobody_closed_gives_its_device_back_when_it_is_collected() -> None:
    with toys() as (device, make, _):
        llm = make()
        thread = llm._driver._thread
        del llm
        gc.collect()
        thread.join(60)
        assert device.closed == 1


def test_an_engine_that_fails_is_told_to_everybody() -> None:
    with toys() as (device, make, _), make() as llm:
        session = llm.session()
        device.failure = RuntimeError("out of memory")
        with pytest.raises(NotReady, match="RuntimeError: out of memory"):
            session.generate("x")
        with pytest.raises(NotReady, match="out of memory"):
            session.tokens()


def test_a_limit_that_no_waiting_helps_against_is_raised() -> None:
    with toys(sessions_max=1) as (_, make, _), make() as llm, llm.session(), pytest.raises(LimitReached):
        llm.session()


@pytest.mark.parametrize("prompt", [[-1], [256], [1.5], [[1], ["a"]], [True, "x"]])
def test_a_prompt_that_is_none_is_refused_before_anything_runs(llm: LLM, prompt: list[object]) -> None:
    with pytest.raises(InvalidRequest, match="prompt: "):
        llm.generate(prompt)  # type: ignore[call-overload]

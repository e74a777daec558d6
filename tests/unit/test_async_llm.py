"""AsyncLLM on the toy device: many at a time, pieces, and what leaving one early does."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from sessile import AsyncLLM, SamplingParams
from sessile.errors import InvalidRequest, NotReady, StartupError, TooLong
from tests.unit.toy_llm import CONTEXT_TOKENS, ToyEngineDevice, toys

LONG = SamplingParams(max_new_tokens=300)


def run(test: Callable[[AsyncLLM, ToyEngineDevice], Awaitable[None]], **limits: int) -> None:
    """Run a coroutine with an AsyncLLM, within a minute."""

    async def main() -> None:
        async with asyncio.timeout(60), make() as llm:
            await test(llm, device)

    with toys(**limits) as (device, _, make):
        asyncio.run(main())


def test_many_run_side_by_side_and_each_says_what_it_says_alone() -> None:
    async def test(llm: AsyncLLM, device: ToyEngineDevice) -> None:
        together = await asyncio.gather(*(whole(llm, f"prompt {number}") for number in range(50)))
        assert together == [await whole(llm, f"prompt {number}") for number in range(50)]

    async def whole(llm: AsyncLLM, prompt: str) -> list[int]:
        return (await llm.generate(prompt, max_new_tokens=4, seed=1)).tokens

    run(test)


def test_pieces_joined_are_the_whole() -> None:
    async def test(llm: AsyncLLM, device: ToyEngineDevice) -> None:
        pieces = [piece async for piece in llm.generate("hi", max_new_tokens=20, seed=3)]
        assert len(pieces) > 3 and pieces[0].completion is None and pieces[-1].completion is not None
        assert pieces[-1].completion.tokens == (await llm.generate("hi", max_new_tokens=20, seed=3)).tokens

    run(test)


def test_a_chat_is_the_rendered_prompt() -> None:
    async def test(llm: AsyncLLM, device: ToyEngineDevice) -> None:
        said = await llm.chat([{"role": "user", "content": "hi"}], max_new_tokens=3, seed=1)
        assert said.tokens == (await llm.generate("user:hi\n", max_new_tokens=3, seed=1)).tokens

    run(test)


def test_closing_the_generator_rolls_the_turn_back() -> None:
    async def test(llm: AsyncLLM, device: ToyEngineDevice) -> None:
        device.step_s = 0.01
        async with await llm.session() as session:
            await session.append("one")
            turn = session.generate("two", LONG)
            async for _ in turn:
                break
            await turn.aclose()
            assert (await session.generate("three", max_new_tokens=1)).prompt_tokens == len("onethree")

    run(test)


def test_a_cancelled_task_rolls_its_turn_back() -> None:
    async def test(llm: AsyncLLM, device: ToyEngineDevice) -> None:
        device.step_s = 0.01
        async with await llm.session() as session:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(session.generate("one", LONG), 0.1)
            assert (await session.state()).tokens == 0
            assert (await session.generate("two", max_new_tokens=1)).prompt_tokens == 3

    run(test)


def test_a_request_that_is_left_makes_room_for_others() -> None:
    async def test(llm: AsyncLLM, device: ToyEngineDevice) -> None:
        device.step_s = 0.005
        left = [asyncio.ensure_future(llm.generate("x", LONG)) for _ in range(8)]
        await asyncio.sleep(0.05)
        for task in left:
            task.cancel()
        assert len((await llm.generate("y", max_new_tokens=2)).tokens) == 2

    run(test, rows_max=8)


def test_sessions_fork_and_rewind() -> None:
    async def test(llm: AsyncLLM, device: ToyEngineDevice) -> None:
        session = await llm.session()
        await session.generate("one", max_new_tokens=4)
        fork = await session.fork(at_turn=1)
        assert await fork.tokens() == await session.tokens()
        assert await session.rewind(to_tokens=3) == 3
        assert (await session.state()).tokens == 3 and (await fork.state()).tokens == 7
        await session.close()
        await session.close()

    run(test)


def test_refusals_are_raised_where_the_output_is_read() -> None:
    async def test(llm: AsyncLLM, device: ToyEngineDevice) -> None:
        with pytest.raises(TooLong):
            await llm.generate("x" * CONTEXT_TOKENS)
        with pytest.raises(InvalidRequest, match="temperature"):
            await llm.generate("x", temperature=-1)

    run(test)


def test_closing_ends_what_runs() -> None:
    async def test(llm: AsyncLLM, device: ToyEngineDevice) -> None:
        device.step_s = 0.01
        running = asyncio.ensure_future(llm.generate("x", LONG))
        await asyncio.sleep(0.05)
        await llm.close()
        assert (await running).finish_reason == "abort"
        with pytest.raises(NotReady, match="closed"):
            await llm.generate("y")

    run(test)


def test_a_failed_engine_is_told() -> None:
    async def test(llm: AsyncLLM, device: ToyEngineDevice) -> None:
        device.failure = RuntimeError("out of memory")
        with pytest.raises(NotReady, match="out of memory"):
            await llm.generate("x")

    run(test)


def test_before_its_start_it_says_what_is_missing() -> None:
    async def main() -> None:
        await AsyncLLM().generate("x")

    with pytest.raises(NotReady, match="not started"):
        asyncio.run(main())


def test_a_wrong_setting_is_told_before_anything_is_loaded() -> None:
    with pytest.raises(StartupError, match="did you mean page_size"):
        AsyncLLM(pagesize=4)

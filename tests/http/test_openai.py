"""The OpenAI-compatible surface, through OpenAI's own client."""

from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.http.conftest import Running

HI = [{"role": "user", "content": "hi"}]
ANSWER = "user:hi\n"
"""What the echo engine answers to HI: the prompt that the template makes of it."""


@pytest.fixture
def client(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_models_lists_the_one_that_is_served(client: openai.OpenAI) -> None:
    (model,) = client.models.list()
    assert (model.id, model.max_model_len) == ("echo", 512)
    assert client.models.retrieve("echo").id == "echo"


@pytest.mark.parametrize("name", ["echo", "default", "/models/echo"])
def test_a_model_may_be_called_by_each_of_its_names(client: openai.OpenAI, name: str) -> None:
    assert client.completions.create(model=name, prompt="hello").model == "echo"


def test_another_model_is_not_found(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as refusal:
        client.chat.completions.create(model="gpt-5", messages=HI)
    assert (refusal.value.code, refusal.value.param) == ("model_not_found", "model")


def test_a_completion_has_text_reason_and_usage(client: openai.OpenAI) -> None:
    reply = client.completions.create(model="default", prompt="hello")
    assert reply.choices[0].text == "hello"
    assert reply.choices[0].finish_reason == "stop"
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens, reply.usage.total_tokens) == (5, 6, 11)
    assert reply.usage.prompt_tokens_details.cached_tokens == 0


def test_a_completion_is_16_tokens_long_by_default(client: openai.OpenAI) -> None:
    reply = client.completions.create(model="default", prompt="x" * 20)
    assert (reply.choices[0].finish_reason, reply.usage.completion_tokens) == ("length", 16)


@pytest.mark.parametrize("prompt", [["ab", "cde"], [[97, 98], [99, 100, 101]]])
def test_several_prompts_are_several_choices(client: openai.OpenAI, prompt: Any) -> None:
    reply = client.completions.create(model="default", prompt=prompt)
    assert [(choice.index, choice.text) for choice in reply.choices] == [(0, "ab"), (1, "cde")]
    assert reply.usage.prompt_tokens == 5


def test_several_prompts_stream_side_by_side(server: Running, client: openai.OpenAI) -> None:
    server.engine.token_interval_s = 0.02
    texts = {0: "", 1: ""}
    for chunk in client.completions.create(model="default", prompt=["abab", "cdecde"], stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == {0: "abab", 1: "cdecde"}


def test_echo_repeats_the_prompt_with_its_logprobs(client: openai.OpenAI) -> None:
    reply = client.completions.create(model="default", prompt="abc", echo=True, logprobs=1, max_tokens=1)
    choice = reply.choices[0]
    assert choice.text == "abca"
    assert choice.logprobs.tokens == ["a", "b", "c", "a"]
    assert choice.logprobs.token_logprobs == [None, -1.5, -1.5, -0.5]
    assert choice.logprobs.text_offset == [0, 1, 2, 3]


@pytest.mark.parametrize("stream", [False, True])
def test_the_token_that_ended_a_completion_has_its_logprob_though_it_is_no_text(
    client: openai.OpenAI, stream: bool
) -> None:
    """Clients that score prompts count on as many as were generated: lm-eval leaves the last out, whatever it is."""
    reply = client.completions.create(model="default", prompt="abc", echo=True, logprobs=1, stream=stream)
    choices = [chunk.choices[0] for chunk in reply] if stream else reply.choices
    tokens = [token for choice in choices for token in choice.logprobs.tokens]
    assert "".join(choice.text for choice in choices) == "abcabc"
    assert tokens == ["a", "b", "c", "a", "b", "c", "<eos>"]


def test_prompts_can_be_scored_without_generating(client: openai.OpenAI) -> None:
    reply = client.completions.create(model="default", prompt="abc", echo=True, logprobs=0, max_tokens=0)
    assert reply.choices[0].logprobs.token_logprobs == [None, -1.5, -1.5]
    assert reply.usage.completion_tokens == 0


def test_a_chat_is_rendered_with_the_models_template(server: Running, client: openai.OpenAI) -> None:
    messages = [{"role": "system", "content": "be brief"}, *HI]
    reply = client.chat.completions.create(model="default", messages=messages)
    assert reply.choices[0].message.content == "system:be brief\nuser:hi\n"
    assert reply.choices[0].message.role == "assistant"
    assert server.engine.submits()[0].sampling.max_new_tokens is None


def test_text_parts_are_text(client: openai.OpenAI) -> None:
    parts = [{"type": "text", "text": "hi"}]
    reply = client.chat.completions.create(model="default", messages=[{"role": "user", "content": parts}])
    assert reply.choices[0].message.content == ANSWER


def test_a_streamed_chat_adds_up_and_ends_with_its_reason(server: Running, client: openai.OpenAI) -> None:
    server.engine.token_interval_s = 0.02
    chunks = list(client.chat.completions.create(model="default", messages=HI, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == ANSWER
    assert [chunk.choices[0].finish_reason for chunk in chunks[-2:]] == [None, "stop"]
    assert len({chunk.id for chunk in chunks}) == 1


def test_usage_comes_last_in_a_stream_if_asked_for(client: openai.OpenAI) -> None:
    for options, expected in (({"include_usage": True}, True), (openai.omit, False)):
        *_, last = client.chat.completions.create(
            model="default", messages=HI, stream=True, stream_options=options
        )
        assert (last.usage is not None and not last.choices) == expected
    assert last.usage is None


def test_usage_so_far_comes_with_every_chunk_if_asked_for(server: Running, client: openai.OpenAI) -> None:
    server.engine.token_interval_s = 0.02
    options = {"include_usage": True, "continuous_usage_stats": True}
    *chunks, last = client.chat.completions.create(model="default", messages=HI, stream=True, stream_options=options)
    counts = [chunk.usage.completion_tokens for chunk in chunks]
    assert counts == sorted(counts) and counts[-1] == len(ANSWER) + 1
    assert {chunk.usage.prompt_tokens for chunk in chunks} == {len(ANSWER)} == {last.usage.prompt_tokens}
    assert all(chunk.usage.total_tokens == len(ANSWER) + count for chunk, count in zip(chunks, counts, strict=True))


@pytest.mark.parametrize("fields", [{}, {"include_usage": False}])
def test_usage_so_far_is_no_use_without_usage(client: openai.OpenAI, fields: dict[str, Any]) -> None:
    options = {**fields, "continuous_usage_stats": True}
    with pytest.raises(openai.BadRequestError, match="needs include_usage") as refusal:
        client.completions.create(model="default", prompt="a", stream=True, stream_options=options)
    assert refusal.value.param == "stream_options.continuous_usage_stats"


def test_the_usage_so_far_of_a_sessions_turn_is_not_known(client: openai.OpenAI) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    with pytest.raises(openai.BadRequestError, match="told at the end"):
        client.chat.completions.create(
            model="default", messages=HI, stream=True, stream_options=options, extra_body={"session_id": "s"}
        )


def test_the_stop_that_matched_is_shown(client: openai.OpenAI) -> None:
    choice = client.chat.completions.create(model="default", messages=HI, stop=["hi", "zz"]).choices[0]
    assert (choice.message.content, choice.finish_reason, choice.matched_stop) == ("user:", "stop", "hi")


def test_chat_logprobs_cover_the_text_and_nothing_else(client: openai.OpenAI) -> None:
    choice = client.chat.completions.create(model="default", messages=HI, logprobs=True, top_logprobs=2).choices[0]
    assert "".join(entry.token for entry in choice.logprobs.content) == choice.message.content
    assert choice.logprobs.content[0].bytes == [ord("u")]
    assert [top.logprob for top in choice.logprobs.content[0].top_logprobs] == [-0.5, -1.5]


def test_streamed_logprobs_come_once_each(server: Running, client: openai.OpenAI) -> None:
    server.engine.token_interval_s = 0.02
    tokens = ""
    for chunk in client.chat.completions.create(model="default", messages=HI, stream=True, logprobs=True):
        if chunk.choices[0].logprobs is not None:
            tokens += "".join(entry.token for entry in chunk.choices[0].logprobs.content)
    assert tokens == ANSWER


def test_fields_that_mean_nothing_here_are_accepted(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(
        model="default", messages=HI, user="u", metadata={"a": "b"}, store=True, service_tier="auto", n=1,
        response_format={"type": "text"}, parallel_tool_calls=True, prompt_cache_key="k", safety_identifier="s",
    )  # fmt: skip
    assert reply.choices[0].message.content == ANSWER


def test_sampling_fields_of_other_servers_work_too(server: Running, client: openai.OpenAI) -> None:
    extra = {"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.2, "min_tokens": 1, "ignore_eos": True}
    client.completions.create(model="default", prompt="a", max_tokens=2, seed=7, extra_body=extra)
    sampling = server.engine.submits()[0].sampling
    assert (sampling.top_k, sampling.min_p, sampling.min_new_tokens, sampling.seed) == (5, 0.1, 1, 7)


@pytest.mark.parametrize(
    "fields",
    [
        {"n": 0}, {"n": 129}, {"best_of": 3, "n": 2}, {"stop_regex": "a("}, {"session_id": "a b"},
        {"tool_choice": "required"}, {"audio": {}}, {"prediction": {}},
        {"modalities": ["audio"]}, {"reasoning_effort": "high"},
        {"temperature": -1}, {"top_logprobs": 2}, {"logit_bias": {"999": 1}}, {"max_completion_tokens": -1},
        {"stream_options": {}},
    ],
)  # fmt: skip
def test_what_is_not_built_or_out_of_range_is_400_with_its_param(
    server: Running, client: openai.OpenAI, fields: dict[str, Any]
) -> None:
    with pytest.raises(openai.BadRequestError) as refusal:
        client.chat.completions.create(model="default", messages=HI, extra_body=fields)
    assert refusal.value.param == next(iter(fields))
    assert refusal.value.type == "invalid_request_error"
    assert server.engine.submits() == []


def test_two_limits_of_a_chats_tokens_must_be_the_same(server: Running, client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="differs from max_tokens: send one of them") as refusal:
        client.chat.completions.create(model="default", messages=HI, max_tokens=1, max_completion_tokens=5)
    assert refusal.value.param == "max_completion_tokens"
    assert server.engine.submits() == []
    client.chat.completions.create(model="default", messages=HI, max_tokens=2, max_completion_tokens=2)
    assert server.engine.submits()[0].sampling.max_new_tokens == 2


@pytest.mark.parametrize("name", ["structural_tag", "stop_rgx"])
def test_further_fields_are_refused_by_name(client: openai.OpenAI, name: str) -> None:
    with pytest.raises(openai.BadRequestError) as refusal:
        client.chat.completions.create(model="default", messages=HI, extra_body={name: "x"})
    assert refusal.value.param == name


@pytest.mark.parametrize("messages", [[], "hi", [{"role": "robot", "content": "x"}], [{"role": "user", "content": 3}]])
def test_messages_that_make_no_sense_are_refused(client: openai.OpenAI, messages: Any) -> None:
    with pytest.raises(openai.BadRequestError) as refusal:
        client.chat.completions.create(model="default", messages=messages)
    assert refusal.value.param.startswith("messages")


@pytest.mark.parametrize("prompt", ["", [], [""], [[]], [[1], "a", 2], {"a": 1}, [1, 999], ["a"] * 129])
def test_prompts_that_make_no_sense_are_refused(client: openai.OpenAI, prompt: Any) -> None:
    with pytest.raises(openai.BadRequestError) as refusal:
        client.completions.create(model="default", prompt=prompt)
    assert refusal.value.param == "prompt"


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_over_the_context_is_a_400_even_for_a_stream(client: openai.OpenAI, stream: bool) -> None:
    with pytest.raises(openai.BadRequestError, match="context length") as refusal:
        client.completions.create(model="default", prompt="x" * 600, stream=stream)
    assert refusal.value.code == "context_length_exceeded"


def test_one_bad_prompt_of_several_ends_the_others(server: Running, client: openai.OpenAI) -> None:
    server.engine.pause()
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model="default", prompt=["x" * 600, "fine"])
    server.wait_until(lambda: server.engine.running == 0)


def test_a_client_that_closes_its_stream_ends_the_request(server: Running, client: openai.OpenAI) -> None:
    server.engine.token_interval_s = 0.02
    stream = client.completions.create(
        model="default", prompt="x" * 100, max_tokens=400, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    stream.close()
    server.wait_until(lambda: server.engine.running == 0)
    messages = [cancel.message for cancel in server.engine.cancels()]
    assert messages.count("the client disconnected") == 1  # one of the test before may come late

"""Reasoning apart from the answer, over the OpenAI-compatible surface."""

from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.http.conftest import Running, running_server

ASK = [{"role": "user", "content": "Why?"}]
THOUGHT = "<think>\nHm, so.\n</think>"
ANSWER = f"{THOUGHT}\n\nBecause."


@pytest.fixture(scope="module")
def thinking_server() -> Iterator[Running]:
    with running_server(reasoning_format="think") as running:
        yield running


@pytest.fixture
def client(thinking_server: Running) -> Iterator[openai.OpenAI]:
    thinking_server.engine.script = list(ANSWER.encode())
    thinking_server.engine.token_interval_s = 0.002
    with openai.OpenAI(base_url=f"{thinking_server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def ask(client: openai.OpenAI, **fields: Any) -> Any:
    return client.chat.completions.create(model="default", messages=ASK, **fields)


def test_reasoning_is_apart_from_the_content(client: openai.OpenAI) -> None:
    reply = ask(client)
    message = reply.choices[0].message
    assert (message.reasoning_content, message.content) == ("Hm, so.", "Because.")
    assert reply.usage.completion_tokens_details.reasoning_tokens == len(THOUGHT)


def test_reasoning_streams_before_the_content(client: openai.OpenAI, thinking_server: Running) -> None:
    thinking_server.engine.token_interval_s = 0.05  # A busy server sends what comes meanwhile in one piece.
    deltas = [chunk.choices[0].delta for chunk in ask(client, stream=True)]
    reasoning = [getattr(delta, "reasoning_content", None) or "" for delta in deltas]
    assert ("".join(reasoning), "".join(delta.content or "" for delta in deltas)) == ("Hm, so.", "Because.")
    assert len([piece for piece in reasoning if piece]) > 2


def test_reasoning_may_stream_in_one_piece(client: openai.OpenAI) -> None:
    stream = ask(client, stream=True, extra_body={"stream_reasoning": False})
    pieces = [getattr(chunk.choices[0].delta, "reasoning_content", None) for chunk in stream]
    assert [piece for piece in pieces if piece] == ["Hm, so."]


def test_reasoning_may_be_left_in_the_content(client: openai.OpenAI) -> None:
    reply = ask(client, extra_body={"separate_reasoning": False})
    assert reply.choices[0].message.content == ANSWER
    assert reply.choices[0].message.reasoning_content is None
    assert reply.usage.completion_tokens_details.reasoning_tokens == len(THOUGHT)


def test_usage_of_a_stream_counts_reasoning(client: openai.OpenAI) -> None:
    *_, last = ask(client, stream=True, stream_options={"include_usage": True})
    assert last.usage.completion_tokens_details.reasoning_tokens == len(THOUGHT)


def test_reasoning_of_earlier_turns_may_be_sent_back(thinking_server: Running, client: openai.OpenAI) -> None:
    said = ask(client).choices[0].message.model_dump(exclude_none=True)
    reply = client.chat.completions.create(model="default", messages=[*ASK, said, *ASK])
    assert said["reasoning_content"] == "Hm, so." and reply.choices[0].finish_reason == "stop"


def test_a_model_reasons_before_it_answers_in_json(thinking_server: Running, client: openai.OpenAI) -> None:
    message = ask(client, response_format={"type": "json_object"}).choices[0].message
    assert (message.reasoning_content, message.content) == ("Hm, so.", "Because.")
    assert "thought[lazy]" in thinking_server.engine.submits()[-1].grammar.lead


def test_a_grammar_that_binds_all_a_model_says_leaves_it_no_reasoning(client: openai.OpenAI) -> None:
    message = ask(client, extra_body={"regex": "(?s:.*)"}).choices[0].message
    assert (message.content, hasattr(message, "reasoning_content")) == (ANSWER, False)


@pytest.mark.parametrize("field", ["separate_reasoning", "stream_reasoning"])
def test_what_is_no_truth_value_is_refused(client: openai.OpenAI, field: str) -> None:
    with pytest.raises(openai.BadRequestError) as refusal:
        ask(client, extra_body={field: "yes"})
    assert refusal.value.param == field

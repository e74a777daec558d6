"""Chat completions on a session: what its turns have of the messages is not computed again, and never said wrongly."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import openai
import pytest

from sessile.errors import InvalidRequest
from tests.http.conftest import Running, ring_of, running_server
from tests.http.fake_engine import MARKED, byte_tokenizer
from tests.http.toy_engine import ToyEngine

HELLO = {"role": "user", "content": "Hello, how are you?"}
MARKER = ord(";")


@pytest.fixture(scope="module")
def toy() -> Iterator[Running]:
    engine = partial(ToyEngine, pages=900, page_size=16)
    ring = ring_of(acme="user", umbra="user")
    with running_server(engine, tokenizer=byte_tokenizer(MARKED), key_ring=ring) as running:
        yield running


@pytest.fixture
def client(toy: Running, request: pytest.FixtureRequest) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{toy.url}/v1", api_key="acme-key", max_retries=0) as client:
        yield client


class Chat:
    """A client that keeps its messages itself and names a session."""

    def __init__(self, client: openai.OpenAI, session: str, messages: list[dict[str, str]] | None = None) -> None:
        self.messages = list(messages or [])
        self.tokens: list[int] = []
        self._client = client
        self._session = session

    def say(self, text: str = HELLO["content"], **settings: Any) -> Any:
        self.messages.append({"role": "user", "content": text})
        reply = self._client.chat.completions.create(
            model="default", messages=self.messages, temperature=0, logprobs=True,
            **({"max_tokens": 6} | settings), extra_body={"session_id": self._session},
        )  # fmt: skip
        choice = reply.choices[0]
        self.messages.append({"role": "assistant", "content": choice.message.content})
        self.said = [byte for token in choice.logprobs.content for byte in token.bytes]
        return reply

    def copy(self) -> "Chat":
        return Chat(self._client, self._session, self.messages)


def cached(reply: Any) -> int:
    return reply.usage.prompt_tokens_details.cached_tokens


def test_a_second_turn_computes_what_its_messages_add(client: openai.OpenAI) -> None:
    chat = Chat(client, "a")
    first = chat.say()
    second = chat.say("And now?")
    assert cached(second) == first.usage.prompt_tokens + 6 - 1
    # The first answer was cut: the marker that ends it comes with the next turn.
    assert second.usage.prompt_tokens == first.usage.prompt_tokens + 6 + len(";user:And now?;assistant:")
    third = chat.say("Go on")
    assert cached(third) == second.usage.prompt_tokens + 6 - 1


def test_the_session_goes_on_from_the_very_tokens_that_were_said(client: openai.OpenAI) -> None:
    chat = Chat(client, "b")
    chat.say()
    context = [*b"user:" + HELLO["content"].encode() + b";assistant:", *chat.said, *b";user:More;assistant:"]
    chat.say("More")
    alone = client.completions.create(model="default", prompt=context, temperature=0, max_tokens=6)
    assert alone.choices[0].text == chat.messages[-1]["content"]


def test_an_end_marker_that_was_said_is_not_said_again(toy: Running, client: openai.OpenAI) -> None:
    chat = Chat(client, "c")
    first = chat.say()
    stop = {"extra_body": {"session_id": "c", "stop_token_ids": [MARKER]}}
    chat.messages.append({"role": "user", "content": "End"})
    second = client.chat.completions.create(model="default", messages=chat.messages, temperature=0, **stop)
    assert second.choices[0].finish_reason == "stop"
    chat.messages.append({"role": "assistant", "content": second.choices[0].message.content})
    third = chat.say("Next")
    history = second.usage.prompt_tokens + second.usage.completion_tokens
    assert (cached(third), third.usage.prompt_tokens) == (history - 1, history + len("user:Next;assistant:"))
    assert first.usage.prompt_tokens < history


def test_a_history_that_disagrees_is_a_fork_point(client: openai.OpenAI) -> None:
    chat = Chat(client, "d")
    first = chat.say()
    other = chat.copy()
    chat.say("Left")
    right = other.say("Right")
    assert cached(right) == first.usage.prompt_tokens + 6 - 1
    again = chat.say("Left again")
    assert cached(again) > cached(right), "the other branch is what it was"
    rewritten = Chat(client, "d", [{"role": "user", "content": "Hello, how are we?"}, *chat.messages[1:]])
    assert rewritten.say("What?").usage.prompt_tokens > 0


def test_the_same_messages_again_are_another_answer_beside_the_first(client: openai.OpenAI) -> None:
    chat = Chat(client, "e")
    first = chat.say()
    twice = [chat.copy().say("Twice") for _ in range(2)]
    assert twice[0].choices[0].message.content == twice[1].choices[0].message.content
    assert [cached(reply) for reply in twice] == 2 * [first.usage.prompt_tokens + 6 - 1]


def test_a_stream_is_a_turn_too(client: openai.OpenAI) -> None:
    messages = [HELLO]
    text = ""
    settings: dict[str, Any] = {"model": "default", "temperature": 0, "max_tokens": 8}
    for chunk in client.chat.completions.create(
        **settings, messages=messages, stream=True, extra_body={"session_id": "f"}
    ):
        text += chunk.choices[0].delta.content or ""
    messages += [{"role": "assistant", "content": text}, HELLO]
    reply = client.chat.completions.create(**settings, messages=messages, extra_body={"session_id": "f"})
    assert cached(reply) == len("user:;assistant:") + len(HELLO["content"]) + 8 - 1


def test_a_turn_whose_client_left_leaves_nothing(toy: Running, client: openai.OpenAI) -> None:
    chat = Chat(client, "g")
    chat.say()
    toy.engine.device.step_s = 0.01
    stream = client.chat.completions.create(
        model="default", messages=[*chat.messages, HELLO], max_tokens=300, stream=True, extra_body={"session_id": "g"}
    )
    next(iter(stream))
    stream.close()
    toy.wait_until(lambda: toy.service.link.in_flight == 0)
    toy.engine.device.step_s = 0.0
    with toy.as_tenant("acme") as http:
        toy.wait_until(lambda: http.get("/v1/sessions/g").json()["turns"] == 1)


def test_h55_another_tenants_session_of_that_name_is_another(toy: Running, client: openai.OpenAI) -> None:
    Chat(client, "h").say()
    with openai.OpenAI(base_url=f"{toy.url}/v1", api_key="umbra-key", max_retries=0) as other:
        assert cached(Chat(other, "h").say()) == 0


def test_a_session_that_was_closed_begins_anew(toy: Running, client: openai.OpenAI) -> None:
    chat = Chat(client, "i")
    chat.say()
    with toy.as_tenant("acme") as http:
        assert http.delete("/v1/sessions/i").status_code == 200
        reply = chat.say("Still there?")
        assert reply.usage.prompt_tokens > 0
        assert http.get("/v1/sessions/i").json()["turns"] == 1


def test_a_session_that_nobody_uses_is_closed_and_begins_anew() -> None:
    engine = partial(ToyEngine, pages=400, page_size=16)
    with (
        running_server(engine, tokenizer=byte_tokenizer(MARKED), dialogue_idle_timeout_s=1.0) as toy,
        openai.OpenAI(base_url=f"{toy.url}/v1", api_key="none", max_retries=0) as client,
    ):
        chat = Chat(client, "o")
        chat.say()
        toy.wait_until(lambda: toy.client.get("/v1/sessions").json()["total"] == 0)
        text = "".join(f"{message['role']}:{message['content']};" for message in chat.messages)
        assert chat.say("Still there?").usage.prompt_tokens == len(f"{text}user:Still there?;assistant:".encode())
        assert toy.client.get("/v1/sessions/o").json()["turns"] == 1


def test_a_branching_session_that_its_client_opened_is_gone_on_with(toy: Running, client: openai.OpenAI) -> None:
    with toy.as_tenant("acme") as http:
        assert http.post("/v1/sessions", json={"id": "j", "branching": True}).status_code == 200
        assert http.post("/v1/sessions", json={"id": "k"}).status_code == 200
    Chat(client, "j").say()
    with pytest.raises(openai.BadRequestError, match="streaming session") as refusal:
        Chat(client, "k").say()
    assert refusal.value.param == "session_id"


def test_only_so_many_turns_of_a_session_are_kept(toy: Running, client: openai.OpenAI, monkeypatch: Any) -> None:
    monkeypatch.setattr("sessile.server.dialogues.TURNS_KEPT_MAX", 3)
    chat = Chat(client, "l")
    for index in range(6):
        before = len(chat.messages)
        reply = chat.say(str(index), max_tokens=2)
        assert (cached(reply) > 0) == (before > 0)
    with toy.as_tenant("acme") as http:
        assert http.get("/v1/sessions/l").json()["turns"] == 3


def test_whatever_goes_wrong_before_a_turn_is_sent_gives_its_place_back(
    toy: Running, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: Any, **named: Any) -> Any:
        raise InvalidRequest("not this one")

    monkeypatch.setattr("sessile.server.openai._choices", broken)
    with pytest.raises(openai.BadRequestError):
        Chat(client, "p").say()
    dialogue = toy.service.dialogues._dialogues["acme", "p"]
    assert (dialogue.places, dialogue.is_open) == (0, True)


def test_a_turn_of_a_session_has_one_answer(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refusal:
        client.chat.completions.create(model="default", messages=[HELLO], n=2, extra_body={"session_id": "m"})
    assert refusal.value.param == "n"


def test_a_template_that_cannot_be_gone_on_from_has_all_messages_sent_again() -> None:
    with (
        running_server(partial(ToyEngine, pages=400)) as toy,
        openai.OpenAI(base_url=f"{toy.url}/v1", api_key="none", max_retries=0) as client,
    ):
        chat = Chat(client, "n")
        chat.say()
        second = chat.say("More")
        assert second.usage.prompt_tokens == sum(
            len(f"{message['role']}:{message['content']}\n".encode()) for message in chat.messages[:-1]
        )
        assert toy.client.get("/v1/sessions").json()["total"] == 0


@pytest.mark.parametrize("fields", [{}, {"session_id": "long"}, {"stream": True}])
def test_what_is_too_long_is_said_of_the_messages(client: openai.OpenAI, fields: dict[str, Any]) -> None:
    messages = [{"role": "user", "content": "x" * 5000}]
    with pytest.raises(openai.BadRequestError) as refusal:
        client.chat.completions.create(model="default", messages=messages, extra_body=fields)
    assert (refusal.value.code, refusal.value.param) == ("context_length_exceeded", "messages")


def test_what_is_too_long_is_said_of_the_prompt(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refusal:
        client.completions.create(model="default", prompt="x" * 5000)
    assert (refusal.value.code, refusal.value.param) == ("context_length_exceeded", "prompt")

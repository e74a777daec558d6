"""item_reference in /v1/responses and /v1/conversations through OpenAI's own client, on the real core."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import openai
import pytest

from tests.http.conftest import Running, ring_of, running_server
from tests.http.fake_engine import MARKED, byte_tokenizer
from tests.http.test_response_tools import TOOL, ask, output_of
from tests.http.test_tools import CALL, ROOM_TOKENS, says
from tests.http.toy_engine import ToyEngine

HELLO = "Hello!"
SETTINGS: dict[str, Any] = {"model": "default", "temperature": 0, "max_output_tokens": 6}


@pytest.fixture(scope="module")
def toy() -> Iterator[Running]:
    engine = partial(ToyEngine, pages=900, page_size=16)
    with running_server(engine, tokenizer=byte_tokenizer(MARKED), key_ring=ring_of(acme="user", umbra="user")) as toy:
        yield toy


@pytest.fixture
def client(toy: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{toy.url}/v1", api_key="acme-key", max_retries=0) as client:
        yield client


@pytest.fixture
def other(toy: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{toy.url}/v1", api_key="umbra-key", max_retries=0) as client:
        yield client


def ref(item: Any) -> Any:
    return {"type": "item_reference", "id": item if isinstance(item, str) else item.id}


def user(text: str) -> Any:
    return {"role": "user", "content": text}


def respond(client: openai.OpenAI, given: Any, **fields: Any) -> Any:
    return client.responses.create(**{**SETTINGS, "input": given, **fields})


def inputs_of(client: openai.OpenAI, response: Any) -> list[Any]:
    return list(client.responses.input_items.list(response.id, order="asc"))


def prompt_tokens(*messages: str) -> int:
    """Of the toy's prompt; a token is a byte."""
    return len("".join([f"{message};" for message in messages]).encode()) + len("assistant:")


@pytest.mark.parametrize("fields", [{}, {"stream": True}, {"background": True}])
def test_items_that_are_named_are_the_same_prompt_as_items_that_are_sent(
    toy: Running, client: openai.OpenAI, fields: dict[str, Any]
) -> None:
    first = respond(client, HELLO, **fields)
    if fields.get("stream"):
        first = list(first)[-1].response
    toy.wait_until(lambda: client.responses.retrieve(first.id).status == "incomplete")
    first = client.responses.retrieve(first.id)
    (question,) = inputs_of(client, first)
    sent = respond(client, [user(HELLO), *[item.model_dump() for item in first.output], user("And now?")])
    named = respond(client, [ref(question), ref(first.output[0]), user("And now?")])
    assert named.output_text == sent.output_text
    assert named.usage.input_tokens == sent.usage.input_tokens
    assert named.usage.input_tokens == prompt_tokens(f"user:{HELLO}", f"assistant:{first.output_text}", "user:And now?")


def test_an_item_that_was_named_is_listed_as_itself(client: openai.OpenAI) -> None:
    first = respond(client, HELLO)
    second = respond(client, [user("You said:"), ref(first.output[0])])
    listed = inputs_of(client, second)
    assert listed[1].model_dump() == first.output[0].model_dump()
    assert [item.role for item in listed] == ["user", "assistant"]


def test_the_type_of_a_reference_may_be_left_out_as_the_sdk_has_it(client: openai.OpenAI) -> None:
    first = respond(client, HELLO)
    for given in ({"id": first.output[0].id}, {"id": first.output[0].id, "type": None}):
        assert inputs_of(client, respond(client, [given]))[0].id == first.output[0].id


def test_an_item_is_there_as_long_as_something_that_is_kept_has_it(client: openai.OpenAI) -> None:
    first = respond(client, HELLO)
    second = respond(client, [ref(first.output[0]), user("x")])
    client.responses.delete(first.id)
    third = respond(client, [ref(first.output[0]), user("y")])
    client.responses.delete(second.id)
    client.responses.delete(third.id)
    with pytest.raises(openai.NotFoundError, match="send the item itself") as refusal:
        respond(client, [user("z"), ref(first.output[0])])
    assert refusal.value.param == "input[1].id"


def test_what_was_not_stored_cannot_be_named_but_may_name(client: openai.OpenAI) -> None:
    kept = respond(client, HELLO)
    passing = respond(client, [ref(kept.output[0]), user("x")], store=False)
    with pytest.raises(openai.NotFoundError):
        respond(client, [ref(passing.output[0])])
    client.responses.delete(kept.id)
    with pytest.raises(openai.NotFoundError):
        respond(client, [ref(kept.output[0])])


def test_what_is_forgotten_for_others_is_no_longer_there_to_be_named() -> None:
    engine = partial(ToyEngine, pages=900, page_size=16)
    with (
        running_server(engine, tokenizer=byte_tokenizer(MARKED), responses_max=2) as toy,
        openai.OpenAI(base_url=f"{toy.url}/v1", api_key="none", max_retries=0) as client,
    ):
        made = [respond(client, f"Number {index}") for index in range(3)]
        with pytest.raises(openai.NotFoundError):
            respond(client, [ref(made[0].output[0])])
        assert respond(client, [ref(made[2].output[0])]).status == "incomplete"


def test_what_a_cancelled_response_asked_may_be_named_while_it_is_kept(toy: Running, client: openai.OpenAI) -> None:
    toy.engine.device.step_s = 0.01
    running = client.responses.create(model="default", input=HELLO, background=True, max_output_tokens=400)
    (question,) = inputs_of(client, running)
    client.responses.cancel(running.id)
    toy.engine.device.step_s = 0.0
    assert respond(client, [ref(question)]).usage.input_tokens == prompt_tokens(f"user:{HELLO}")
    client.responses.delete(running.id)


def test_h55_another_keys_item_is_not_there(client: openai.OpenAI, other: openai.OpenAI) -> None:
    item = respond(client, HELLO).output[0]
    for attempt in (
        lambda: respond(other, [ref(item)]),
        lambda: other.conversations.create(items=[ref(item)]),
        lambda: other.conversations.items.create(other.conversations.create().id, items=[ref(item)]),
    ):
        with pytest.raises(openai.NotFoundError):
            attempt()


# -- what is there already --------------------------------------------------------------------------------------------


def test_an_item_that_the_response_goes_on_from_is_refused_as_twice_there(client: openai.OpenAI) -> None:
    first = respond(client, HELLO)
    second = respond(client, "And now?", previous_response_id=first.id)
    for item in (*inputs_of(client, first), *first.output, *inputs_of(client, second), *second.output):
        with pytest.raises(openai.BadRequestError, match="already") as refusal:
            respond(client, [user("x"), ref(item)], previous_response_id=second.id)
        assert refusal.value.param == "input[1].id"
    beside = respond(client, [ref(second.output[0]), user("x")], previous_response_id=first.id)
    assert beside.usage.input_tokens_details.cached_tokens == first.usage.total_tokens - 1


def test_an_item_may_be_named_once_in_an_input(client: openai.OpenAI) -> None:
    item = respond(client, HELLO).output[0]
    with pytest.raises(openai.BadRequestError) as refusal:
        respond(client, [ref(item), user("x"), ref(item)])
    assert refusal.value.param == "input[2].id"


def test_an_item_is_put_into_a_conversation_by_its_name_once(client: openai.OpenAI) -> None:
    first = respond(client, HELLO)
    conversation = client.conversations.create(items=[ref(first.output[0])])
    client.responses.delete(first.id)
    client.conversations.items.create(conversation.id, items=[user("So?")])
    asked = list(client.conversations.items.list(conversation.id, order="asc"))
    assert asked[0].id == first.output[0].id
    for attempt in (
        lambda: client.conversations.items.create(conversation.id, items=[ref(asked[1])]),
        lambda: respond(client, [ref(asked[0])], conversation=conversation.id),
    ):
        with pytest.raises(openai.BadRequestError, match="already"):
            attempt()
    elsewhere = respond(client, [ref(asked[0]), ref(asked[1])])
    assert elsewhere.usage.input_tokens == prompt_tokens(f"assistant:{first.output_text}", "user:So?")
    client.responses.delete(elsewhere.id)
    client.conversations.items.delete(asked[0].id, conversation_id=conversation.id)
    with pytest.raises(openai.NotFoundError):
        respond(client, [ref(asked[0])])
    client.conversations.delete(conversation.id)
    with pytest.raises(openai.NotFoundError):
        respond(client, [ref(asked[1])])


def test_an_item_that_comes_into_a_conversation_twice_at_a_time_is_there_once(
    toy: Running, client: openai.OpenAI
) -> None:
    item = respond(client, HELLO).output[0]
    conversation = client.conversations.create()
    toy.engine.device.step_s = 0.01
    running = respond(client, [ref(item), user("x")], conversation=conversation.id, background=True)
    client.conversations.items.create(conversation.id, items=[ref(item)])
    toy.engine.device.step_s = 0.0
    toy.wait_until(lambda: client.responses.retrieve(running.id).status == "incomplete")
    items = list(client.conversations.items.list(conversation.id, order="asc"))
    assert [each.role for each in items] == ["assistant", "user", "assistant"]
    after = respond(client, "y", conversation=conversation.id)
    held = client.responses.retrieve(running.id).usage.total_tokens
    assert after.usage.input_tokens == held + len(";user:y;assistant:")


# -- calls ------------------------------------------------------------------------------------------------------------


def test_the_output_of_a_call_may_follow_the_call_by_its_name(server: Running) -> None:
    server.engine.context_tokens = ROOM_TOKENS
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        says(server, CALL)
        (call,) = ask(client).output
        says(server, "Rain.")
        answer = ask(client, [user("Weather?"), ref(call), output_of(call, "rain")])
        assert [item.type for item in answer.output] == ["message"]
        with pytest.raises(openai.BadRequestError) as refusal:
            ask(client, [output_of(call, "rain"), ref(call)], tools=[TOOL])
        assert refusal.value.param == "input[0].call_id"


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("item", "status", "param"),
    [
        ({"type": "item_reference", "id": "msg_x"}, 404, "id"),
        ({"id": "msg_x"}, 404, "id"),
        ({"type": "item_reference"}, 400, "id"),
        ({"type": "item_reference", "id": 5}, 400, "id"),
        ({"type": "item_reference", "id": ""}, 400, "id"),
        ({"type": "item_reference", "id": "msg_x", "status": "completed"}, 400, "status"),
        ({"type": "item_reference", "id": "msg_x", "content": "x"}, 400, "content"),
        ({"id": "msg_x", "content": "x"}, 400, "role"),
    ],
)
def test_a_reference_that_makes_no_sense_is_refused_by_its_name(
    server: Running, item: dict[str, Any], status: int, param: str
) -> None:
    for path, body, field in (("responses", {"input": [item]}, "input"), ("conversations", {"items": [item]}, "items")):
        reply = server.client.post(f"/v1/{path}", json=body)
        assert (reply.status_code, reply.json()["error"]["param"]) == (status, f"{field}[0].{param}")
    assert server.engine.submits() == []


def test_what_is_named_may_be_no_more_than_could_be_sent() -> None:
    with running_server(body_bytes_max=2048) as server:
        server.engine.context_tokens = ROOM_TOKENS
        http = server.client
        made = [http.post("/v1/responses", json={"input": "x" * 1500}).json() for _ in range(2)]
        ids = [http.get(f"/v1/responses/{each['id']}/input_items").json()["data"][0]["id"] for each in made]
        assert http.post("/v1/responses", json={"input": [{"id": ids[0]}]}).status_code == 200
        reply = http.post("/v1/responses", json={"input": [{"id": each} for each in ids]})
        assert (reply.status_code, reply.json()["error"]["param"]) == (413, "input")

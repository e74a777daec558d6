"""/v1/responses and /v1/conversations through OpenAI's own client, on the real core."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import openai
import pytest

from sessile.core.limits import TenantPolicy
from sessile.errors import InvalidRequest
from tests.http.conftest import Running, ring_of, running_server
from tests.http.fake_engine import MARKED, byte_tokenizer
from tests.http.toy_engine import ToyEngine

HELLO = "Hello, how are you today?"
ANSWER_TOKENS = 6
SETTINGS: dict[str, Any] = {"model": "default", "temperature": 0, "max_output_tokens": ANSWER_TOKENS}


@pytest.fixture(scope="module")
def toy() -> Iterator[Running]:
    engine = partial(ToyEngine, pages=900, page_size=16)
    ring = ring_of(acme="user", umbra="user")
    with running_server(engine, tokenizer=byte_tokenizer(MARKED), key_ring=ring) as running:
        yield running


@pytest.fixture
def client(toy: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{toy.url}/v1", api_key="acme-key", max_retries=0) as client:
        yield client
    toy.engine.device.step_s = 0.0


@pytest.fixture
def other(toy: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{toy.url}/v1", api_key="umbra-key", max_retries=0) as client:
        yield client


def cached(response: Any) -> int:
    return response.usage.input_tokens_details.cached_tokens


def history_tokens(response: Any) -> int:
    return response.usage.input_tokens + response.usage.output_tokens


def sessions(toy: Running) -> dict[str, int]:
    """The tenant's sessions with their finished turns."""
    with toy.as_tenant("acme") as http:
        return {each["id"]: each["turns"] for each in http.get("/v1/sessions?limit=1000").json()["data"]}


def test_a_response_has_what_its_client_reads_of_it(client: openai.OpenAI) -> None:
    response = client.responses.create(**SETTINGS, input=HELLO, metadata={"colour": "blue"}, instructions="Be brief")
    assert response.id.startswith("resp_")
    assert (response.status, response.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert response.output[0].content[0].text == response.output_text != ""
    assert response.usage.input_tokens == len(f"system:Be brief;user:{HELLO};assistant:")
    assert (response.usage.output_tokens, response.usage.total_tokens) == (6, response.usage.input_tokens + 6)
    assert (response.metadata, response.instructions) == ({"colour": "blue"}, "Be brief")


def test_previous_response_id_reuses_all_kv_but_the_last_token(client: openai.OpenAI) -> None:
    first = client.responses.create(**SETTINGS, input=HELLO)
    second = client.responses.create(**SETTINGS, input="And now?", previous_response_id=first.id)
    assert cached(second) == history_tokens(first) - 1
    assert second.usage.input_tokens == history_tokens(first) + len(";user:And now?;assistant:")
    third = client.responses.create(**SETTINGS, input="Go on", previous_response_id=second.id)
    assert cached(third) == history_tokens(second) - 1


def test_a_fork_from_an_earlier_response_leaves_the_other_branch_as_it_was(client: openai.OpenAI) -> None:
    root = client.responses.create(**SETTINGS, input=HELLO)
    left = client.responses.create(**SETTINGS, input="Left", previous_response_id=root.id)
    right = client.responses.create(**SETTINGS, input="Right!", previous_response_id=root.id)
    assert cached(left) == cached(right) == history_tokens(root) - 1
    further = client.responses.create(**SETTINGS, input="On", previous_response_id=left.id)
    assert cached(further) == history_tokens(left) - 1
    # The toy's tokens depend on all KV that was read: without the fork, the branch has to say the same.
    alone = client.responses.create(**SETTINGS, input=HELLO)
    for text, response in (("Left", left), ("On", further)):
        alone = client.responses.create(**SETTINGS, input=text, previous_response_id=alone.id)
        assert alone.output_text == response.output_text


def test_a_stream_has_openais_typed_events_in_their_order(client: openai.OpenAI) -> None:
    with client.responses.stream(**SETTINGS, input=HELLO) as stream:
        events = list(stream)
    final = events[-1].response
    kinds = [event.type for event in events]
    assert kinds[:4] == [
        "response.created", "response.in_progress", "response.output_item.added", "response.content_part.added",
    ]  # fmt: skip
    assert kinds[-4:] == [
        "response.output_text.done", "response.content_part.done", "response.output_item.done", "response.incomplete",
    ]  # fmt: skip
    assert set(kinds[4:-4]) == {"response.output_text.delta"}
    assert [event.sequence_number for event in events] == list(range(len(events)))
    deltas = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert deltas == final.output_text == client.responses.retrieve(final.id).output_text


@pytest.mark.parametrize("options", [{"include_usage": True}, {"include_obfuscation": False}, {}])
def test_a_stream_may_be_asked_for_the_usage_that_it_has_in_any_case(client: openai.OpenAI, options: Any) -> None:
    """Load generators ask for it here as they do in chat."""
    *_, last = client.responses.create(**SETTINGS, input=HELLO, stream=True, extra_body={"stream_options": options})
    assert last.response.usage.output_tokens == ANSWER_TOKENS


def test_a_response_that_came_to_its_end_is_completed(client: openai.OpenAI) -> None:
    settings = {"model": "default", "temperature": 0, "extra_body": {"stop_token_ids": [ord(";"), 7, 77, 177]}}
    with client.responses.stream(**settings, input=HELLO) as stream:
        final = stream.get_final_response()
    assert (final.status, final.incomplete_details, final.output[0].status) == ("completed", None, "completed")
    after = client.responses.create(**SETTINGS, input="More", previous_response_id=final.id)
    assert cached(after) == history_tokens(final) - 1


def test_what_was_streamed_can_be_gone_on_from_at_once(client: openai.OpenAI) -> None:
    previous: Any = None
    for text in ("one", "two", "three"):
        for event in client.responses.create(
            **SETTINGS, input=text, stream=True, previous_response_id=previous.id if previous else None
        ):
            if event.type in ("response.completed", "response.incomplete"):
                if previous:
                    assert cached(event.response) == history_tokens(previous) - 1
                previous = event.response


def test_store_false_leaves_nothing_behind(toy: Running, client: openai.OpenAI) -> None:
    before = sessions(toy)
    response = client.responses.create(**SETTINGS, input=HELLO, store=False)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(response.id)
    with pytest.raises(openai.NotFoundError) as refusal:
        client.responses.create(**SETTINGS, input="More", previous_response_id=response.id)
    assert refusal.value.param == "previous_response_id"
    assert sessions(toy) == before
    kept = client.responses.create(**SETTINGS, input=HELLO)
    with_kept = sessions(toy)
    passing = client.responses.create(**SETTINGS, input="More", previous_response_id=kept.id, store=False)
    assert cached(passing) == history_tokens(kept) - 1
    toy.wait_until(lambda: sessions(toy) == with_kept)


def test_a_deleted_response_is_gone_and_what_went_on_from_it_stays(toy: Running, client: openai.OpenAI) -> None:
    first = client.responses.create(**SETTINGS, input=HELLO)
    second = client.responses.create(**SETTINGS, input="And now?", previous_response_id=first.id)
    client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(first.id)
    third = client.responses.create(**SETTINGS, input="Go on", previous_response_id=second.id)
    assert cached(third) == history_tokens(second) - 1
    client.responses.delete(second.id)
    client.responses.delete(third.id)
    toy.wait_until(lambda: first.id not in sessions(toy))


def test_h55_another_keys_response_and_conversation_are_not_there(
    client: openai.OpenAI, other: openai.OpenAI
) -> None:
    response = client.responses.create(**SETTINGS, input=HELLO)
    conversation = client.conversations.create()
    for attempt in (
        lambda: other.responses.retrieve(response.id),
        lambda: other.responses.delete(response.id),
        lambda: other.responses.cancel(response.id),
        lambda: other.responses.input_items.list(response.id),
        lambda: other.responses.create(**SETTINGS, input="x", previous_response_id=response.id),
        lambda: other.responses.create(**SETTINGS, input="x", conversation=conversation.id),
        lambda: other.conversations.retrieve(conversation.id),
        lambda: other.conversations.delete(conversation.id),
    ):
        with pytest.raises(openai.NotFoundError):
            attempt()
    assert client.responses.retrieve(response.id).id == response.id


def test_input_items_are_listed_in_pages(client: openai.OpenAI) -> None:
    items = [{"role": "developer", "content": "Be kind"}, {"role": "user", "content": "One"},
             {"role": "user", "content": [{"type": "input_text", "text": "Two"}]}]  # fmt: skip
    response = client.responses.create(**SETTINGS, input=items)
    newest_first = list(client.responses.input_items.list(response.id, limit=2))
    assert [item.content[0].text for item in newest_first] == ["Two", "One", "Be kind"]
    oldest_first = list(client.responses.input_items.list(response.id, order="asc"))
    assert (oldest_first[0].role, oldest_first[0].content[0].text) == ("developer", "Be kind")


def test_output_items_sent_back_are_the_same_messages(client: openai.OpenAI) -> None:
    first = client.responses.create(**SETTINGS, input=HELLO)
    back = [{"role": "user", "content": HELLO}, *[item.model_dump() for item in first.output],
            {"role": "user", "content": "And now?"}]  # fmt: skip
    resent = client.responses.create(**SETTINGS, input=back)
    text = first.output_text
    assert resent.usage.input_tokens == len(f"user:{HELLO};assistant:{text};user:And now?;assistant:".encode())


def test_instructions_are_those_of_one_response(client: openai.OpenAI) -> None:
    first = client.responses.create(**SETTINGS, input=HELLO, instructions="Be brief")
    second = client.responses.create(**SETTINGS, input="And now?", previous_response_id=first.id)
    text = f"user:{HELLO};assistant:{first.output_text};user:And now?;assistant:"
    assert second.usage.input_tokens == len(text.encode())
    third = client.responses.create(
        **SETTINGS, input="And now?", previous_response_id=first.id, instructions="Be brief"
    )
    assert cached(third) == history_tokens(first) - 1


def test_a_background_response_is_polled_and_cancelled(toy: Running, client: openai.OpenAI) -> None:
    toy.engine.device.step_s = 0.01
    running = client.responses.create(model="default", input=HELLO, background=True, max_output_tokens=400)
    assert running.status == "in_progress"
    assert client.responses.retrieve(running.id).status == "in_progress"
    cancelled = client.responses.cancel(running.id)
    assert cancelled.status == "cancelled"
    with pytest.raises(openai.BadRequestError, match="cancelled"):
        client.responses.create(**SETTINGS, input="x", previous_response_id=running.id)
    toy.engine.device.step_s = 0.0
    short = client.responses.create(**SETTINGS, input=HELLO, background=True)
    toy.wait_until(lambda: client.responses.retrieve(short.id).status == "incomplete")
    with pytest.raises(openai.BadRequestError, match="nothing to cancel"):
        client.responses.cancel(short.id)
    after = client.responses.create(**SETTINGS, input="More", previous_response_id=short.id)
    assert cached(after) == history_tokens(client.responses.retrieve(short.id)) - 1


def test_a_background_response_that_cannot_be_sent_is_refused_and_leaves_nothing(
    toy: Running, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, place = sessions(toy), toy.service.dialogues.place
    monkeypatch.setattr(toy.service, "draining", False)

    async def place_at_the_last_moment(*given: Any, **named: Any) -> Any:
        found = await place(*given, **named)
        toy.service.draining = True
        return found

    monkeypatch.setattr(toy.service.dialogues, "place", place_at_the_last_moment)
    with pytest.raises(openai.APIStatusError) as refusal:
        client.with_options(max_retries=0).responses.create(**SETTINGS, input=HELLO, background=True)
    assert refusal.value.status_code == 503
    toy.wait_until(lambda: sessions(toy) == before)


def test_h27_a_client_that_leaves_ends_its_response_and_leaves_nothing(toy: Running, client: openai.OpenAI) -> None:
    before = sessions(toy)
    toy.engine.device.step_s = 0.01
    stream = client.responses.create(model="default", input=HELLO, stream=True, max_output_tokens=400)
    created = next(iter(stream))
    stream.close()
    toy.wait_until(lambda: toy.service.link.in_flight == 0)
    toy.wait_until(lambda: sessions(toy) == before)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(created.response.id)


def test_a_conversation_grows_with_each_response_and_keeps_its_kv(client: openai.OpenAI) -> None:
    conversation = client.conversations.create(metadata={"topic": "demo"})
    first = client.responses.create(**SETTINGS, input=HELLO, conversation=conversation.id)
    second = client.responses.create(**SETTINGS, input="And now?", conversation={"id": conversation.id})
    assert (second.conversation.id, cached(second)) == (conversation.id, history_tokens(first) - 1)
    items = list(client.conversations.items.list(conversation.id, order="asc"))
    assert [item.role for item in items] == ["user", "assistant", "user", "assistant"]
    assert [item.content[0].text for item in items[1::2]] == [first.output_text, second.output_text]


def test_a_conversation_is_created_updated_retrieved_and_deleted(toy: Running, client: openai.OpenAI) -> None:
    conversation = client.conversations.create(items=[{"type": "message", "role": "user", "content": "Hi"}])
    assert client.conversations.update(conversation.id, metadata={"a": "b"}).metadata == {"a": "b"}
    assert client.conversations.retrieve(conversation.id).metadata == {"a": "b"}
    client.responses.create(**SETTINGS, input=HELLO, conversation=conversation.id)
    assert conversation.id in sessions(toy)
    assert client.conversations.delete(conversation.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.conversations.retrieve(conversation.id)
    toy.wait_until(lambda: conversation.id not in sessions(toy))


def test_items_that_are_added_and_deleted_change_what_the_next_response_sees(client: openai.OpenAI) -> None:
    conversation = client.conversations.create(items=[{"type": "message", "role": "user", "content": "First"}])
    added = client.conversations.items.create(
        conversation.id, items=[{"type": "message", "role": "assistant", "content": "Second"}]
    )
    (item,) = added.data
    assert client.conversations.items.retrieve(item.id, conversation_id=conversation.id).content[0].text == "Second"
    seen = client.responses.create(**SETTINGS, input="x", conversation=conversation.id, store=False)
    assert seen.usage.input_tokens == len("user:First;assistant:Second;user:x;assistant:")
    client.conversations.items.delete(item.id, conversation_id=conversation.id)
    seen = client.responses.create(**SETTINGS, input="x", conversation=conversation.id, store=False)
    assert seen.usage.input_tokens == len("user:First;user:x;assistant:")
    assert len(list(client.conversations.items.list(conversation.id))) == 1


def test_a_second_response_of_a_conversation_waits_for_the_first(toy: Running, client: openai.OpenAI) -> None:
    conversation = client.conversations.create()
    toy.engine.device.step_s = 0.01
    running = client.responses.create(
        model="default", input=HELLO, conversation=conversation.id, background=True, max_output_tokens=300
    )
    with pytest.raises(openai.BadRequestError) as refusal:
        client.responses.create(**SETTINGS, input="x", conversation=conversation.id)
    assert (refusal.value.code, refusal.value.param) == ("conversation_locked", "conversation")
    client.responses.cancel(running.id)
    assert client.responses.create(**SETTINGS, input="x", conversation=conversation.id).status == "incomplete"
    assert len(list(client.conversations.items.list(conversation.id))) == 2


def test_responses_side_by_side_in_a_fresh_conversation_do_not_meet(client: openai.OpenAI) -> None:
    with ThreadPoolExecutor(4) as pool:
        for _ in range(8):
            conversation = client.conversations.create()
            ask = partial(client.responses.create, **SETTINGS, conversation=conversation.id)
            passing = [pool.submit(ask, input=HELLO, store=False) for _ in range(2)]
            kept = ask(input=HELLO)
            assert [each.result().usage.output_tokens for each in passing] == [ANSWER_TOKENS] * 2
            assert cached(ask(input="And now?")) == history_tokens(kept) - 1


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": ""}, None), ({}, "input"), ({"input": []}, "input"), ({"input": [{"role": "cat"}]}, "input[0].role"),
        ({"input": [{"type": "image", "id": "x"}]}, "input[0].type"), ({"input": "x", "inputs": 1}, "inputs"),
        ({"input": [{"role": "user", "content": "x", "name": "Ann"}]}, "input[0].name"),
        ({"input": [{"role": "tool", "content": "x", "tool_call_id": "c"}]}, "input[0].tool_call_id"),
        ({"input": [{"role": "assistant", "content": "x", "tool_calls": []}]}, "input[0].tool_calls"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0].type"),
        ({"input": "x", "include": ["a"]}, "include"),
        ({"input": "x", "background": True, "stream": True}, "background"),
        ({"input": "x", "background": True, "store": False}, "background"),
        ({"input": "x", "previous_response_id": "a", "conversation": "b"}, "previous_response_id"),
        ({"input": "x", "max_output_tokens": 0}, "max_output_tokens"),
        ({"input": "x", "conversation": {"id": "a", "name": "b"}}, "conversation.name"),
        ({"input": "x", "conversation": {"id": 5}}, "conversation"), ({"input": "x", "conversation": 5}, "conversation")
    ],
)  # fmt: skip
def test_bad_input_is_refused_with_its_param_and_leaves_nothing(
    toy: Running, fields: dict[str, Any], param: str | None
) -> None:
    before = sessions(toy)
    with toy.as_tenant("acme") as http:
        reply = http.post("/v1/responses", json={"max_output_tokens": 3, **fields})
    if param is None:
        assert reply.status_code == 200
        return
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, param)
    assert sessions(toy) == before


def test_a_prompt_that_is_too_long_is_refused_and_leaves_nothing(toy: Running, client: openai.OpenAI) -> None:
    before = sessions(toy)
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as refusal:
            client.responses.create(**SETTINGS, input="x" * 600, stream=stream)
        assert (refusal.value.code, refusal.value.param) == ("context_length_exceeded", "input")
    toy.wait_until(lambda: sessions(toy) == before)


def test_what_is_kept_is_bounded_and_forgotten_when_idle() -> None:
    engine = partial(ToyEngine, pages=900, page_size=16)
    with (
        running_server(
            engine, tokenizer=byte_tokenizer(MARKED), responses_max=3, dialogue_idle_timeout_s=1.5
        ) as toy,
        openai.OpenAI(base_url=f"{toy.url}/v1", api_key="none", max_retries=0) as client,
    ):
        made = [client.responses.create(**SETTINGS, input=f"Number {index}") for index in range(5)]
        for response in made[:2]:
            with pytest.raises(openai.NotFoundError):
                client.responses.retrieve(response.id)
        assert client.responses.retrieve(made[2].id).output_text == made[2].output_text
        toy.wait_until(lambda: toy.client.get("/v1/sessions").json()["total"] <= 3)
        time.sleep(2)
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(made[4].id)
        toy.wait_until(lambda: toy.client.get("/v1/sessions").json()["total"] == 0)


def test_a_shelf_of_one_response_keeps_the_kv_of_the_one_that_the_next_goes_on_from() -> None:
    engine = partial(ToyEngine, pages=900, page_size=16)
    with (
        running_server(engine, tokenizer=byte_tokenizer(MARKED), responses_max=1) as toy,
        openai.OpenAI(base_url=f"{toy.url}/v1", api_key="none", max_retries=0) as client,
    ):
        first = client.responses.create(**SETTINGS, input=HELLO)
        second = client.responses.create(**SETTINGS, input="And now?", previous_response_id=first.id)
        assert cached(second) == history_tokens(first) - 1
        background = client.responses.create(**SETTINGS, input="x", previous_response_id=second.id, background=True)
        toy.wait_until(lambda: client.responses.retrieve(background.id).status == "incomplete")
        assert cached(client.responses.retrieve(background.id)) == history_tokens(second) - 1
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(second.id)
        assert [view["turns"] for view in toy.client.get("/v1/sessions").json()["data"]] == [1]


def test_whatever_goes_wrong_before_a_response_is_sent_leaves_nothing(
    toy: Running, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    conversation = client.conversations.create()
    before = sessions(toy)

    def broken(*arguments: Any, **named: Any) -> Any:
        raise InvalidRequest("not this one")

    with monkeypatch.context() as patch:
        patch.setattr("sessile.server.responses.desk.Choice", broken)
        for fields in ({}, {"conversation": conversation.id}):
            with pytest.raises(openai.BadRequestError):
                client.responses.create(**SETTINGS, input="x", **fields)
    toy.wait_until(lambda: sessions(toy) == before)
    assert client.responses.create(**SETTINGS, input="x", conversation=conversation.id).status == "incomplete"


def test_responses_are_answered_though_no_session_is_left_for_them() -> None:
    engine = partial(ToyEngine, pages=900, page_size=16, tenants=(TenantPolicy("acme", sessions_max=2),))
    with (
        running_server(engine, tokenizer=byte_tokenizer(MARKED), key_ring=ring_of(acme="user")) as toy,
        openai.OpenAI(base_url=f"{toy.url}/v1", api_key="acme-key", max_retries=0) as client,
    ):
        made = [client.responses.create(**SETTINGS, input=f"Number {index}") for index in range(4)]
        last = client.responses.create(**SETTINGS, input="More", previous_response_id=made[3].id)
        text = f"user:Number 3;assistant:{made[3].output_text};user:More;assistant:"
        assert last.usage.input_tokens == len(text.encode())


def test_a_session_that_was_closed_costs_its_responses_their_kv_alone(toy: Running, client: openai.OpenAI) -> None:
    first = client.responses.create(**SETTINGS, input=HELLO)
    with toy.as_tenant("acme") as http:
        assert http.delete(f"/v1/sessions/{first.id}").status_code == 200
    second = client.responses.create(**SETTINGS, input="And now?", previous_response_id=first.id)
    text = f"user:{HELLO};assistant:{first.output_text};user:And now?;assistant:"
    assert second.usage.input_tokens == len(text.encode())

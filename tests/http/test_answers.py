"""Several answers to one prompt, on every surface: the real core computes it once, and counts it once."""

import json
from collections.abc import Iterator
from functools import partial

import openai
import pytest

from tests.http.conftest import Running, running_server
from tests.http.toy_engine import ToyEngine

PROMPT = "A prompt of no whole number of pages."


@pytest.fixture(scope="module", params=[1, 16, 256])
def toy(request: pytest.FixtureRequest) -> Iterator[Running]:
    pages = 4 + 2000 // request.param
    with running_server(partial(ToyEngine, pages=max(pages, 16), page_size=request.param)) as running:
        yield running


@pytest.fixture
def client(toy: Running) -> Iterator[openai.OpenAI]:
    assert toy.client.post("/flush_cache").status_code == 200
    # As slow as a small model: else the first answer may have ended before the engine has read of the last one.
    toy.engine.device.step_s = 0.01
    with openai.OpenAI(base_url=f"{toy.url}/v1", api_key="none", max_retries=0) as client:
        yield client
    toy.engine.device.step_s = 0.0


def computed_tokens(toy: Running) -> int:
    """Prompt tokens that the device ran, as the engine counts them."""
    (line,) = [
        line
        for line in toy.client.get("/metrics").text.splitlines()
        if line.startswith("sessile_computed_tokens_total")
    ]
    return int(float(line.split()[-1]))


def test_eight_answers_compute_their_prompt_once(toy: Running, client: openai.OpenAI) -> None:
    before = computed_tokens(toy)
    reply = client.completions.create(model="default", prompt=PROMPT, n=8, max_tokens=6, temperature=1, seed=5)
    # Besides, each of the others runs the last token of the prompt: its own first token is sampled from it.
    assert computed_tokens(toy) - before == len(PROMPT) + 7
    assert [choice.index for choice in reply.choices] == list(range(8))
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (len(PROMPT), 48)
    assert reply.usage.prompt_tokens_details.cached_tokens == 0


def test_the_answer_with_index_i_has_the_seed_plus_i(client: openai.OpenAI) -> None:
    settings = {"model": "default", "prompt": PROMPT, "max_tokens": 12, "temperature": 1}
    answers = client.completions.create(**settings, n=4, seed=7).choices
    alone = [client.completions.create(**settings, seed=7 + index).choices[0].text for index in range(4)]
    assert [choice.text for choice in answers] == alone
    assert len(set(alone)) > 1


def test_choices_of_a_stream_come_side_by_side_and_count_their_prompt_once(client: openai.OpenAI) -> None:
    texts, order, usage = dict.fromkeys(range(3), ""), [], None
    for chunk in client.chat.completions.create(
        model="default", messages=[{"role": "user", "content": PROMPT}], n=3, max_tokens=20, seed=1,
        stream=True, stream_options={"include_usage": True},
    ):  # fmt: skip
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            order.append(choice.index)
        usage = chunk.usage or usage
    whole = client.chat.completions.create(
        model="default", messages=[{"role": "user", "content": PROMPT}], n=3, max_tokens=20, seed=1
    )
    assert texts == {choice.index: choice.message.content for choice in whole.choices}
    assert order != sorted(order), "one choice came after the other"
    assert usage is not None and usage.prompt_tokens == whole.usage.prompt_tokens
    assert usage.completion_tokens == 60


def test_each_of_several_prompts_has_its_answers_in_a_row(client: openai.OpenAI) -> None:
    reply = client.completions.create(model="default", prompt=["first", "second"], n=2, max_tokens=4, temperature=0)
    texts = [choice.text for choice in reply.choices]
    assert texts[0] == texts[1] != texts[2] == texts[3]
    assert reply.usage.prompt_tokens == len("first") + len("second")


def test_native_answers_are_a_list_and_a_stream_names_each(toy: Running, client: openai.OpenAI) -> None:
    params = {"n": 3, "max_new_tokens": 5, "temperature": 1, "seed": 3}
    before = computed_tokens(toy)
    whole = toy.client.post("/generate", json={"text": PROMPT, "sampling_params": params}).json()
    assert computed_tokens(toy) - before == len(PROMPT) + 2
    assert [answer["meta_info"]["cached_tokens"] for answer in whole] == [0, len(PROMPT) - 1, len(PROMPT) - 1]
    stream = toy.client.post("/generate", json={"text": PROMPT, "sampling_params": params, "stream": True}).text
    events = [json.loads(line[6:]) for line in stream.splitlines() if line.startswith("data: {")]
    last = {event["index"]: event["output_ids"] for event in events}
    assert last == {index: answer["output_ids"] for index, answer in enumerate(whole)}


def test_a_client_that_leaves_ends_all_answers(toy: Running, client: openai.OpenAI) -> None:
    stream = client.completions.create(model="default", prompt=PROMPT, n=4, max_tokens=400, stream=True)
    next(iter(stream))
    stream.close()
    toy.wait_until(lambda: toy.service.link.in_flight == 0)
    assert toy.client.get("/health").status_code == 200


@pytest.mark.parametrize(
    ("route", "body", "param"),
    [
        ("/v1/completions", {"prompt": "a", "n": 2, "best_of": 3}, "best_of"),
        ("/v1/completions", {"prompt": ["a"] * 64, "n": 3}, "n"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "n": 0}, "n"),
    ],
)
def test_too_many_answers_and_a_choice_among_them_are_refused(
    toy: Running, route: str, body: dict[str, object], param: str
) -> None:
    reply = toy.client.post(route, json=body)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, param)


def test_a_turn_of_a_session_has_one_answer(toy: Running) -> None:
    session = toy.client.post("/open_session", json={"capacity_of_str_len": 0, "streaming": True}).json()
    body = {"text": "a", "session_params": {"id": session}, "sampling_params": {"n": 2}}
    refused = toy.client.post("/generate", json=body)
    assert refused.status_code == 400 and "sampling_params.n" in refused.json()["error"]["message"]


def test_a_pattern_ends_the_answer_and_stays_in_it(toy: Running, client: openai.OpenAI) -> None:
    settings = {"model": "default", "prompt": PROMPT, "max_tokens": 200, "temperature": 0}
    whole = client.completions.create(**settings).choices[0]
    pattern = "[A-Za-z][^A-Za-z]"
    ended = client.completions.create(**settings, extra_body={"stop_regex": pattern}).choices[0]
    assert ended.finish_reason == "stop" and ended.matched_stop == pattern
    assert whole.text.startswith(ended.text.rstrip("\ufffd")) and len(ended.text) < len(whole.text)
    native = {"text": PROMPT, "sampling_params": {"max_new_tokens": 200, "temperature": 0, "stop_regex": [pattern]}}
    reply = toy.client.post("/generate", json=native).json()
    assert reply["meta_info"]["finish_reason"] == {"type": "stop", "matched": pattern}
    assert reply["text"] == ended.text


def test_a_pattern_that_is_none_is_refused_with_its_place(toy: Running) -> None:
    reply = toy.client.post("/v1/completions", json={"prompt": "a", "stop_regex": "ab)"})
    error = reply.json()["error"]
    assert (reply.status_code, error["param"]) == (400, "stop_regex")
    assert "at character 2" in error["message"]

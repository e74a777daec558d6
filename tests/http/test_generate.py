"""POST /generate: what a good request gets, whole and as a stream."""

import json
from itertools import pairwise

import httpx
import orjson
import pytest

from sessile.server.stream import event
from tests.http.conftest import Running
from tests.http.fake_engine import EOS


def events(reply: httpx.Response) -> list[dict]:
    """The JSON of each event, after checking that the stream ended as it should."""
    lines = [line for line in reply.text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def test_a_text_is_answered_with_text_ids_and_figures(server: Running) -> None:
    reply = server.generate("hello")
    assert reply.status_code == 200
    body = reply.json()
    assert body["text"] == "hello"
    assert body["output_ids"] == [*b"hello", EOS]
    meta = body["meta_info"]
    assert meta["finish_reason"] == {"type": "stop", "matched": EOS}
    assert (meta["prompt_tokens"], meta["completion_tokens"], meta["cached_tokens"]) == (5, 6, 0)
    assert meta["e2e_latency"] > 0


def test_token_ids_are_taken_as_they_are(server: Running) -> None:
    reply = server.client.post("/generate", json={"input_ids": [104, 105]})
    assert reply.json()["text"] == "hi"


def test_128_tokens_are_generated_if_no_limit_is_given(server: Running) -> None:
    server.generate()
    server.generate(sampling_params={"max_new_tokens": None})
    assert [submit.sampling.max_new_tokens for submit in server.engine.submits()] == [128, None]


def test_the_length_limit_is_the_finish_reason(server: Running) -> None:
    reply = server.generate("hello", sampling_params={"max_new_tokens": 3})
    assert reply.json()["text"] == "hel"
    assert reply.json()["meta_info"]["finish_reason"] == {"type": "length", "length": 3}


def test_text_ends_before_the_stop_string_and_names_it(server: Running) -> None:
    reply = server.generate("one two three", sampling_params={"stop": ["thr", " two"]})
    assert reply.json()["text"] == "one"
    assert reply.json()["meta_info"]["finish_reason"] == {"type": "stop", "matched": " two"}


def test_no_stop_trim_keeps_the_stop_string(server: Running) -> None:
    reply = server.generate("one two three", sampling_params={"stop": " two", "no_stop_trim": True})
    assert reply.json()["text"] == "one two"


def test_a_stop_token_is_not_part_of_the_text(server: Running) -> None:
    reply = server.generate("abc", sampling_params={"stop_token_ids": [ord("b")]})
    assert reply.json()["text"] == "a"
    assert reply.json()["output_ids"] == [*b"ab"]


def test_zero_tokens_compute_the_prompt_only(server: Running) -> None:
    body = server.generate(sampling_params={"max_new_tokens": 0}).json()
    assert (body["text"], body["output_ids"]) == ("", [])
    assert body["meta_info"]["finish_reason"] == {"type": "length", "length": 0}


def test_every_sampling_field_reaches_the_engine(server: Running) -> None:
    fields = {
        "temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "frequency_penalty": 0.2, "presence_penalty": -0.3,
        "repetition_penalty": 1.1, "seed": 42, "min_new_tokens": 2, "max_new_tokens": 9, "ignore_eos": True,
        "skip_special_tokens": False,
    }  # fmt: skip
    server.generate(sampling_params={**fields, "logit_bias": {"5": -3.5}, "stop": "zz", "stop_token_ids": [3]})
    sampling = server.engine.submits()[0].sampling
    assert {name: getattr(sampling, name) for name in fields} == fields
    assert (sampling.logit_bias, sampling.stop, sampling.stop_token_ids) == (((5, -3.5),), (b"zz",), (3,))


def test_a_seed_is_drawn_for_each_request_that_gives_none(server: Running) -> None:
    for _ in range(2):
        server.generate()
    first, second = (submit.sampling.seed for submit in server.engine.submits())
    assert first != second


@pytest.mark.parametrize(("seed", "expected"), [(-1, 2**64 - 1), (2**64 - 1, 2**64 - 1), (0, 0)])
def test_seeds_are_taken_modulo_64_bits(server: Running, seed: int, expected: int) -> None:
    server.generate(sampling_params={"seed": seed})
    assert server.engine.submits()[0].sampling.seed == expected


def test_a_temperature_next_to_nothing_is_greedy(server: Running) -> None:
    server.generate(sampling_params={"temperature": 1e-9})
    assert server.engine.submits()[0].sampling.temperature == 0


@pytest.mark.parametrize("off", [-1, 0, None])
def test_top_k_can_be_off(server: Running, off: int | None) -> None:
    server.generate(sampling_params={"top_k": off})
    assert server.engine.submits()[0].sampling.top_k == 0


def test_sglang_fields_at_their_defaults_are_accepted(server: Running) -> None:
    defaults = {"lora_path": None, "image_data": None, "return_hidden_states": False, "log_metrics": True}
    reply = server.generate(**defaults, sampling_params={"n": 1, "regex": None, "custom_params": None})
    assert reply.status_code == 200


def test_a_stream_is_cumulative_and_ends_with_done(server: Running) -> None:
    server.engine.token_interval_s = 0.03
    reply = server.generate("hello", stream=True)
    assert reply.headers["content-type"].startswith("text/event-stream")
    texts = [event["text"] for event in events(reply)]
    assert len(texts) > 1
    assert texts[-1] == "hello"
    assert all(later.startswith(earlier) for earlier, later in pairwise(texts))
    last = events(reply)[-1]
    assert last["meta_info"]["finish_reason"]["type"] == "stop"
    assert last["output_ids"] == [*b"hello", EOS]


def test_a_delta_stream_adds_up_to_the_whole(server: Running) -> None:
    server.engine.token_interval_s = 0.02
    reply = events(server.generate("héllo wörld", stream=True, stream_output="delta"))
    assert len(reply) > 1
    assert "".join(event["text"] for event in reply) == "héllo wörld"
    assert [token for event in reply for token in event["output_ids"]] == [*"héllo wörld".encode(), EOS]
    assert "\ufffd" not in "".join(event["text"] for event in reply)


@pytest.mark.parametrize("answers", [1, 2])
@pytest.mark.parametrize("output", ["delta", "cumulative"])
def test_an_event_before_the_end_has_the_form_of_the_last(server: Running, output: str, answers: int) -> None:
    server.engine.token_interval_s = 0.02
    text = "a\u2028\"b\\"
    reply = server.generate(
        text, stream=True, stream_output=output, rid='1"\u2029', sampling_params={"n": answers}
    )
    lines = [line for line in reply.text.split("\n") if line and line != "data: [DONE]"]
    told = [orjson.loads(line.removeprefix("data: ")) for line in lines]
    assert [line.encode() + b"\n\n" for line in lines] == [event(content) for content in told]
    assert all(list(content) == list(told[-1]) for content in told)
    running = [content["meta_info"] for content in told if content["meta_info"]["finish_reason"] is None]
    prompt_tokens = len(text.encode())
    assert len(running) > answers
    for meta in running:
        name = meta.pop("id")
        count = meta.pop("completion_tokens")
        assert name.startswith('1"\u2029') and 0 < count <= prompt_tokens
        assert meta == {"finish_reason": None, "prompt_tokens": prompt_tokens, "cached_tokens": None}
    assert {content.get("index") for content in told} == ({None} if answers == 1 else {0, 1})


def test_a_stream_holds_back_what_may_become_a_stop_string(server: Running) -> None:
    server.engine.token_interval_s = 0.02
    reply = events(server.generate("say STOP now", stream=True, sampling_params={"stop": "STOP"}))
    assert {"say S", "say ST", "say STO"}.isdisjoint(event["text"] for event in reply)
    assert reply[-1]["text"] == "say "


def test_logprobs_come_in_sglangs_triples(server: Running) -> None:
    meta = server.generate(
        "abc", return_logprob=True, logprob_start_len=0, top_logprobs_num=2, return_text_in_logprobs=True,
        sampling_params={"max_new_tokens": 2},
    ).json()["meta_info"]  # fmt: skip
    assert meta["input_token_logprobs"] == [[None, 97, "a"], [-1.5, 98, "b"], [-1.5, 99, "c"]]
    assert meta["output_token_logprobs"] == [[-0.5, 97, "a"], [-0.5, 98, "b"]]
    assert meta["output_top_logprobs"][0] == [[-0.5, 97, "a"], [-1.5, 98, "b"]]


def test_prompt_logprobs_are_computed_only_if_asked_for(server: Running) -> None:
    meta = server.generate("abc", return_logprob=True).json()["meta_info"]
    assert meta["input_token_logprobs"] == []
    assert server.engine.submits()[0].prompt_logprobs_from == -1


def test_a_delta_stream_sends_each_logprob_once(server: Running) -> None:
    server.engine.token_interval_s = 0.02
    reply = events(server.generate("abc", stream=True, stream_output="delta", return_logprob=True))
    sent = [entry[1] for event in reply for entry in event["meta_info"]["output_token_logprobs"]]
    assert sent == [*b"abc", EOS]


def test_long_texts_are_tokenised_like_short_ones(server: Running) -> None:
    text = "x" * 40_000
    reply = server.client.post("/tokenize", json={"prompt": text})
    assert reply.json()["count"] == 40_000


def test_the_clients_rid_names_the_request(server: Running) -> None:
    assert server.generate(rid="mine").json()["meta_info"]["id"] == "mine"
    assert server.generate(rid="mine").status_code == 200, "a rid is free again once its request has ended"


def test_a_rid_in_flight_is_refused(server: Running) -> None:
    server.engine.pause()
    with server.in_background("a", rid="twice") as first:
        reply = server.generate("b", rid="twice")
        assert reply.status_code == 400
        assert reply.json()["error"]["message"].startswith("rid: ")
        server.engine.resume()
        assert first.result().status_code == 200

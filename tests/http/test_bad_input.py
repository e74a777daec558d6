"""Whatever is wrong with a request is a 4xx that names the field, and nothing of it reaches the engine."""

import gzip
import json
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from sessile.contract.messages import unpack_tokens
from sessile.server.app import create_app
from sessile.server.config import ServerOptions
from tests.http.conftest import PATIENCE_S, Running, running_server

BODY_BYTES_MAX = 20_000


@pytest.fixture(scope="module")
def shared_server() -> Iterator[Running]:
    with running_server(body_bytes_max=BODY_BYTES_MAX) as running:
        yield running


def refused(server: Running, path: str, content: str | bytes) -> str:
    """Post raw content; the message of the 400 it gets, after checking that the engine has not heard of it."""
    reply = server.client.post(path, content=content)
    assert reply.status_code == 400, reply.text
    assert server.engine.submits() == []
    message: str = reply.json()["error"]["message"]
    return message


@pytest.mark.parametrize(
    "content", ["", "{", '{"text": "a"', "[1, 2]", "3", '"text"', '{"text": "\\ud800"}', b"\xff\xfe{}"]
)
def test_what_is_not_a_json_object_is_refused(server: Running, content: str | bytes) -> None:
    assert "the body" in refused(server, "/generate", content)


@pytest.mark.parametrize(
    ("field", "value", "limit"),
    [
        ("temperature", "-0.1", "greater than or equal to 0"),
        ("temperature", "101", "less than or equal to 100"),
        ("temperature", "NaN", "finite"),
        ("temperature", "Infinity", "finite"),
        ("temperature", "1e999", "finite"),
        ("temperature", '"1"', "number"),
        ("temperature", "true", "number"),
        ("top_p", "0", "greater than 0"),
        ("top_p", "1.01", "less than or equal to 1"),
        ("top_k", "-2", "greater than or equal to -1"),
        ("top_k", "1.5", "integer"),
        ("top_k", "true", "integer"),
        ("min_p", "1.1", "less than or equal to 1"),
        ("frequency_penalty", "2.1", "less than or equal to 2"),
        ("presence_penalty", "-2.1", "greater than or equal to -2"),
        ("repetition_penalty", "0", "greater than 0"),
        ("max_new_tokens", "-1", "greater than or equal to 0"),
        ("max_new_tokens", "1e30", "integer"),
        ("max_new_tokens", "99999999999999999999999", "less than or equal to 2147483647"),
        ("min_new_tokens", "-1", "greater than or equal to 0"),
        ("min_new_tokens", "129", "above max_new_tokens"),
        ("seed", "18446744073709551616", "less than"),
        ("seed", "1.5", "integer"),
        ("stop", "3", "string or a list of strings"),
        ("stop", '["a", 3]', "string or a list of strings"),
        ("stop", '[""]', "1 to 1024 bytes"),
        ("stop", json.dumps(["x"] * 65), "at most 64"),
        ("stop", json.dumps("x" * 1025), "1 to 1024 bytes"),
        ("stop_token_ids", "[260]", "260 is not in the vocabulary"),
        ("stop_token_ids", "[-1]", "-1 is not in the vocabulary"),
        ("stop_token_ids", json.dumps([1] * 1025), "1024"),
        ("logit_bias", '{"260": 1}', "260 is not in the vocabulary"),
        ("logit_bias", '{"x": 1}', "'x' is not a token id"),
        ("logit_bias", '{"1": 101}', "-100 … 100"),
        ("logit_bias", '{"1": NaN}', "-100 … 100"),
        ("logit_bias", "[1]", "-100 … 100"),
        ("ignore_eos", "1", "boolean"),
        ("skip_special_tokens", '"no"', "boolean"),
    ],
)
def test_a_sampling_field_out_of_range_is_named_with_its_limit(
    server: Running, field: str, value: str, limit: str
) -> None:
    message = refused(server, "/generate", f'{{"text": "a", "sampling_params": {{"{field}": {value}}}}}')
    assert field in message
    assert limit in message


@pytest.mark.parametrize(
    "fields",
    [
        {"n": 0}, {"n": True}, {"json_schema": 3}, {"regex": ""}, {"ebnf": ["root ::= 'a'"]}, {"stop_regex": 3},
        {"structural_tag": "x"}, {"custom_params": {}}, {"temprature": 0.5}, {"best_of": 2},
    ],
)  # fmt: skip
def test_sampling_fields_that_are_unknown_or_not_built_are_refused_by_name(server: Running, fields: dict) -> None:
    content = json.dumps({"text": "a", "sampling_params": fields})
    assert f"sampling_params.{next(iter(fields))}" in refused(server, "/generate", content)


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": "a"}, {"image_data": "x"}, {"lora_path": "x"}, {"return_hidden_states": True}, {"priority": 101},
        {"input_embeds": [[0.1]]}, {"session_id": "x"}, {"background": True}, {"custom_logit_processor": "x"},
    ],
)  # fmt: skip
def test_other_fields_that_are_unknown_or_not_built_are_refused_by_name(server: Running, fields: dict) -> None:
    assert next(iter(fields)) in refused(server, "/generate", json.dumps({"text": "a", **fields}))


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({}, "text"),
        ({"text": ""}, "text"),
        ({"input_ids": []}, "input_ids"),
        ({"text": "a", "input_ids": [1]}, "input_ids"),
        ({"text": ["a", "b"]}, "text"),
        ({"text": 3}, "text"),
        ({"text": None}, "text"),
        ({"input_ids": [[1], [2]]}, "input_ids"),
        ({"input_ids": [1, 2.5]}, "input_ids"),
        ({"input_ids": [1, True]}, "input_ids"),
        ({"input_ids": [-1]}, "input_ids"),
        ({"input_ids": [1 << 40]}, "input_ids"),
        ({"input_ids": [260]}, "input_ids: 260 is not in the vocabulary; ids are 0 to 259"),
        ({"text": "a", "stream": "yes"}, "stream"),
        ({"text": "a", "stream_output": "all"}, "stream_output"),
        ({"text": "a", "rid": ""}, "rid"),
        ({"text": "a", "rid": ["x"]}, "rid"),
        ({"text": "a", "rid": "x" * 257}, "rid"),
        ({"text": "a", "return_logprob": True, "top_logprobs_num": 21}, "top_logprobs_num"),
        ({"text": "a", "top_logprobs_num": 2}, "top_logprobs_num: needs return_logprob"),
        ({"text": "a", "return_logprob": True, "logprob_start_len": 1}, "logprob_start_len"),
        ({"text": "a", "session_params": {}}, "session_params.id"),
        ({"text": "a", "session_params": {"id": 3}}, "session_params.id"),
        ({"text": "a", "session_params": {"id": "x", "parent": 1}}, "session_params.parent"),
        ({"text": "a", "session_params": {"id": "x", "expect_tokens": -3}}, "session_params.expect_tokens"),
        ({"text": "a", "session_params": {"id": "x" * 10_000}}, "session_params.id"),
        ({"text": "a", "session_params": {"id": "x", "rid": 3}}, "session_params.rid"),
        ({"text": "a", "session_params": {"id": "x", "offset": 1 << 40}}, "session_params.offset"),
        ({"text": "a", "session_params": {"id": "x", "replace": 1}}, "session_params.replace"),
        ({"text": "a", "priority": -101}, "priority"),
        ({"text": "a", "priority": 1.5}, "priority"),
    ],
)
def test_a_request_that_makes_no_sense_is_refused_by_field(server: Running, body: dict, named: str) -> None:
    assert named in refused(server, "/generate", json.dumps(body))


def test_a_prompt_over_the_context_is_400_with_the_words_clients_look_for(server: Running) -> None:
    reply = server.generate("x" * 600)
    assert reply.status_code == 400
    assert "context length" in reply.json()["error"]["message"]


def test_an_announced_body_over_the_limit_is_refused_unread(server: Running) -> None:
    with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])), timeout=PATIENCE_S) as client:
        client.sendall(b"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-length: 999999999\r\n\r\n{")
        assert client.recv(100).startswith(b"HTTP/1.1 413")


def test_a_body_over_the_limit_is_refused_while_reading(server: Running) -> None:
    with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])), timeout=PATIENCE_S) as client:
        client.sendall(b"POST /generate HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n")
        for _ in range(3):  # and no end of it
            client.sendall(b"%x\r\n%s\r\n" % (10_000, b"x" * 10_000))
        reply = ""
        while not reply.endswith("}"):
            reply += client.recv(2000).decode()
    assert reply.startswith("HTTP/1.1 413")
    assert f"over the limit of {BODY_BYTES_MAX} bytes" in reply


def test_a_body_at_the_limit_is_accepted(server: Running) -> None:
    content = json.dumps({"prompt": "x"})
    padded = content + " " * (BODY_BYTES_MAX - len(content))
    assert server.client.post("/tokenize", content=padded).status_code == 200
    assert server.client.post("/tokenize", content=padded + " ").status_code == 413


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/", 404), ("POST", "/v1/response", 404), ("POST", "/v1/embeddings", 404),
     ("POST", "/v1/corpora/x/y", 404), ("POST", "/v1/corpora/x", 405), ("GET", "/generate", 405)],
)  # fmt: skip
def test_routes_that_do_not_exist_answer_json(server: Running, method: str, path: str, status: int) -> None:
    reply = server.client.request(method, path)
    assert reply.status_code == status
    assert path in reply.json()["error"]["message"] or status == 405


@pytest.mark.parametrize(
    ("path", "body", "named"),
    [
        ("/open_session", {"streaming": True}, "capacity_of_str_len"),
        ("/open_session", {"capacity_of_str_len": -1, "streaming": True}, "capacity_of_str_len"),
        ("/open_session", {"capacity_of_str_len": 1, "streaming": True, "timeout": 0}, "timeout"),
        ("/open_session", {"capacity_of_str_len": 1, "streaming": True, "session_id": "a b"}, "session_id"),
        ("/open_session", {"capacity_of_str_len": 1, "streaming": True, "session_id": ""}, "session_id"),
        ("/open_session", {"capacity_of_str_len": 1, "streaming": True, "session_id": "a/b"},
         "session_id: must be 1 to 128 letters, digits or characters of _.:@=+-, not dots alone, got 'a/b'"),
        ("/open_session", {"capacity_of_str_len": 1, "streaming": True, "session_id": ".."},
         "session_id: must be 1 to 128 letters, digits or characters of _.:@=+-, not dots alone, got '..'"),
        ("/generate", {"text": "a", "rid": "x" * 257}, "rid: must have at most 256 characters"),
        ("/open_session", {"capacity_of_str_len": 1, "streaming": True, "colour": 1}, "colour"),
        ("/open_session", {"capacity_of_str_len": 1, "streaming": True, "timeout": -1}, "timeout"),
        ("/open_session", {"capacity_of_str_len": 1, "streaming": True, "session_id": "a/b"}, "session_id"),
        ("/open_session", {"capacity_of_str_len": 1, "streaming": True, "session_id": "x" * 10_000}, "session_id"),
        ("/close_session", {"session_id": "x" * 10_000}, "session_id"),
        ("/close_session", {}, "session_id"),
        ("/abort_request", {}, "rid"),
        ("/tokenize", {"prompt": 3}, "prompt"),
        ("/detokenize", {"tokens": "a"}, "tokens"),
        ("/detokenize", {"tokens": [1000]}, "tokens: 1000"),
    ],
)
def test_other_native_calls_name_the_field_too(server: Running, path: str, body: dict, named: str) -> None:
    assert named in refused(server, path, json.dumps(body))


def test_deeply_nested_json_is_refused(server: Running) -> None:
    assert "JSON" in refused(server, "/generate", "[" * 9000)


@pytest.mark.parametrize("value", ["18446744073709551616", "1" + "0" * 400, "2147483648", "-2"])
def test_a_start_of_logprobs_that_no_prompt_has_is_refused_in_a_session_too(server: Running, value: str) -> None:
    content = f'{{"text": "a", "session_params": {{"id": "x"}}, "return_logprob": true, "logprob_start_len": {value}}}'
    assert "logprob_start_len" in refused(server, "/generate", content)
    assert server.service.link.in_flight == 0


def test_a_compressed_body_is_refused_as_such(server: Running) -> None:
    reply = server.client.post("/tokenize", content=gzip.compress(b"{}"), headers={"content-encoding": "gzip"})
    assert reply.status_code == 400
    assert reply.json()["error"]["message"] == "content-encoding: send the body as it is; 'gzip' is not supported"


def test_a_field_name_as_long_as_the_body_is_not_repeated(server: Running) -> None:
    assert len(refused(server, "/generate", json.dumps({"text": "a", "k" * 10_000: 1}))) < 200


@pytest.mark.parametrize(("method", "path", "allowed"), [("GET", "/generate", "POST"), ("POST", "/v1/models", "GET")])
def test_a_wrong_method_is_told_the_right_one(server: Running, method: str, path: str, allowed: str) -> None:
    reply = server.client.request(method, path)
    assert (reply.status_code, reply.headers["allow"]) == (405, allowed)
    assert reply.json()["error"]["message"] == f"{path} takes {allowed}, not {method}"


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("DELETE", "/v1/sessions", ["GET", "POST"]),
        ("PUT", "/v1/sessions/a", ["GET", "DELETE"]),
        ("DELETE", "/v1/corpora", ["GET", "POST"]),
        ("POST", "/v1/responses/resp_1", ["GET", "DELETE"]),
        ("PUT", "/v1/conversations/conv_1", ["GET", "POST", "DELETE"]),
        ("DELETE", "/flush_cache", ["GET", "POST"]),
        ("POST", "/openapi.json", ["GET", "HEAD"]),
    ],
)
def test_a_wrong_method_is_told_all_the_right_ones(
    server: Running, method: str, path: str, allowed: list[str]
) -> None:
    reply = server.client.request(method, path)
    assert (reply.status_code, reply.headers.get_list("allow")) == (405, [", ".join(allowed)])
    assert reply.json()["error"]["message"] == f"{path} takes {' or '.join(allowed)}, not {method}"


def test_h56_no_field_of_any_body_names_a_file_of_the_server_but_those_of_corpora() -> None:
    paths = create_app(NotImplemented, NotImplemented, ServerOptions()).openapi()["paths"]
    asked = [(path, call.get("requestBody")) for path, route in paths.items() for call in route.values()]
    named = {(path, word) for path, body in asked for word in _property_names(body)}
    assert {("/generate", "input_ids"), ("/v1/sessions", "metadata")} <= named
    files = {(path, name) for path, name in named if {"path", "file", "url"} & set(name.split("_"))}
    assert files == {("/v1/corpora", "path"), ("/add_external_corpus", "file_path")}


def _property_names(schema: object) -> Iterator[str]:
    """Names of all properties in a piece of an OpenAPI document that may be anything but null."""
    if isinstance(schema, dict):
        yield from [name for name, field in schema.get("properties", {}).items() if field.get("enum") != [None]]
        for part in schema.values():
            yield from _property_names(part)
    elif isinstance(schema, list):
        for part in schema:
            yield from _property_names(part)


@pytest.mark.parametrize(
    ("path", "fields", "named"),
    [
        ("/generate", {"text": "a", "lora_path": "/etc/passwd"}, "lora_path"),
        ("/generate", {"text": "a", "image_data": "file:///etc/passwd"}, "image_data"),
        ("/v1/completions", {"prompt": "a", "lora_path": "/etc"}, "lora_path"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": [{
            "type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}]}, "messages[0].content[0]"),
    ],
)  # fmt: skip
def test_h56_what_would_name_a_file_in_peers_is_refused(server: Running, path: str, fields: dict, named: str) -> None:
    assert named in refused(server, path, json.dumps(fields))


def test_h57_a_client_brings_no_template_of_its_own(server: Running) -> None:
    body = {"messages": [{"role": "user", "content": "{{ 7 * 7 }}"}], "chat_template": "{% for x in y %}{% endfor %}"}
    assert "chat_template" in refused(server, "/v1/chat/completions", json.dumps(body))
    del body["chat_template"]
    sent = server.client.post("/v1/chat/completions", json={**body, "max_tokens": 1})
    assert sent.status_code == 200
    assert bytes(unpack_tokens(server.engine.submits()[0].tokens).tolist()) == b"user:{{ 7 * 7 }}\n"


def test_h57_a_template_that_takes_long_holds_up_nobody_else(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    renders, go_on = threading.Event(), threading.Event()

    def render(*arguments: object, **variables: object) -> str:
        renders.set()
        assert go_on.wait(PATIENCE_S)
        return "slow"

    monkeypatch.setattr("sessile.text.template.ChatTemplate.render", render)
    chat = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1}
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(server.client.post, "/v1/chat/completions", json=chat)
        assert renders.wait(PATIENCE_S)
        try:
            assert server.generate("quick").json()["text"] == "quick"
            assert not slow.done()
        finally:
            go_on.set()
        assert slow.result().status_code == 200


def test_h57_a_template_that_takes_too_long_costs_its_request_alone(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = threading.Event()

    def render(*arguments: object, **variables: object) -> str:
        assert go_on.wait(PATIENCE_S)
        return "slow"

    monkeypatch.setattr("sessile.text.template.ChatTemplate.render", render)
    monkeypatch.setattr("sessile.server.encoding.RENDER_TIMEOUT_S", 0.1)
    try:
        chat = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1}
        assert "took longer than 0.1 s" in refused(server, "/v1/chat/completions", json.dumps(chat))
    finally:
        go_on.set()

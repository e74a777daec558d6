"""Bodies of the surfaces with tools, changed at random places: whatever is wrong is a 4xx, never a failure of ours."""

import copy
import random
from collections.abc import Iterator
from typing import Any

import pytest

from tests.http.conftest import Running, running_server

pytestmark = pytest.mark.long

JUNK = [
    None, True, 0, -1, 1.5, 10**20, "", "x", "\u2028", "<think>", "\x00", "tool", "assistant", "text", [], {}, [1],
    [{}], {"a": 1}, [None], {"type": "text"}, {"type": "function"}, [["x"]], {"$ref": "#"},
]  # fmt: skip
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
CHAT = {
    "model": "default",
    "messages": [
        {"role": "system", "content": "s"},
        {"role": "user", "content": [{"type": "text", "text": "hi"}]},
        {"role": "assistant", "content": "a", "reasoning_content": "r", "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "c", "content": "x"},
    ],
    "tools": [{"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}],
    "tool_choice": "auto",
    "parallel_tool_calls": True,
    "separate_reasoning": True,
    "stream_reasoning": True,
    "chat_template_kwargs": {"enable_thinking": True},
    "max_tokens": 40,
}
EPHEMERAL = {"type": "ephemeral", "ttl": "5m"}
COUNT = {
    "model": "default",
    "system": [{"type": "text", "text": "s", "cache_control": EPHEMERAL}],
    "messages": [
        {"role": "user", "content": [{"type": "text", "text": "hi"}]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "t", "signature": ""},
                {"type": "redacted_thinking", "data": "x"},
                {"type": "text", "text": "a"},
                {"type": "tool_use", "id": "c", "name": "f", "input": {}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "c", "content": [{"type": "text", "text": "x"}]},
                {"type": "text", "text": "so"},
            ],
        },
    ],
    "tools": [{"name": "f", "input_schema": {"type": "object"}, "cache_control": EPHEMERAL}],
    "tool_choice": {"type": "auto", "disable_parallel_tool_use": True},
    "thinking": {"type": "enabled", "budget_tokens": 1024, "display": "omitted"},
    "output_config": {"effort": "low"},
}
MESSAGES = {**COUNT, "max_tokens": 40, "stop_sequences": ["zz"], "stream": False, "metadata": {"user_id": "u"}}
RESPONSE = {
    "model": "default",
    "input": [
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "hi"}]},
        {"type": "reasoning", "id": "r", "summary": [], "content": [{"type": "reasoning_text", "text": "so"}]},
        {"role": "assistant", "content": "a", "status": "completed"},
        {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c", "output": [{"type": "input_text", "text": "x"}]},
    ],
    "tools": [{"type": "function", "name": "f", "description": "d", "parameters": {"type": "object"}, "strict": True}],
    "tool_choice": {"type": "function", "name": "f"},
    "parallel_tool_calls": True,
    "max_output_tokens": 40,
    "store": False,
}
BODIES = {
    "/v1/chat/completions": CHAT,
    "/v1/messages": MESSAGES,
    "/v1/messages/count_tokens": COUNT,
    "/v1/responses": RESPONSE,
    "/v1/conversations": {"items": RESPONSE["input"], "metadata": {"topic": "weather"}},
}


@pytest.fixture(scope="module")
def shared_server() -> Iterator[Running]:
    with running_server(reasoning_format="think") as running:
        yield running


def containers(node: Any) -> Iterator[Any]:
    """Every object and list in a body that has something in it."""
    if isinstance(node, dict | list) and node:
        yield node
        for inner in node.values() if isinstance(node, dict) else node:
            yield from containers(inner)


def mutated(body: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """The body with one to three things in it changed, dropped or added."""
    changed = copy.deepcopy(body)
    for _ in range(rng.choice([1, 1, 2, 3])):
        node = rng.choice(list(containers(changed)))
        place = rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
        junk, act = copy.deepcopy(rng.choice(JUNK)), rng.random()
        if act < 0.6:
            node[place] = junk
        elif act < 0.75 and len(changed) > 1:
            del node[place]
        elif isinstance(node, dict):
            node[rng.choice(["x", "type", "role", "name", "content"])] = junk
        else:
            node.insert(place, junk)
    return changed


@pytest.mark.parametrize("path", BODIES)
def test_no_change_of_a_body_makes_it_fail(server: Running, path: str, whole_grid: bool) -> None:
    server.engine.context_tokens = 1 << 20
    assert server.client.post(path, json=BODIES[path]).status_code == 200
    rng = random.Random(20)
    bodies = [mutated(BODIES[path], rng) for _ in range(1000 if whole_grid else 120)]
    statuses = [server.client.post(path, json=body).status_code for body in bodies]
    assert set(statuses) <= {200, 400, 404}
    assert statuses.count(400) > 48 and 200 in statuses

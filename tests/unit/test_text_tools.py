"""Tools in a prompt: by the template, or in words where it knows none."""

import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from tokenizers import Tokenizer as Backend
from tokenizers import models

from sessile.errors import InvalidRequest
from sessile.text.load import load_tokenizer
from sessile.text.template import ChatTemplate, check_messages
from sessile.text.tools import ToolSpec
from tests.unit.tiny_folder import write_tiny_model

TOOL: ToolSpec = {
    "type": "function",
    "function": {"name": "weather", "description": "Tell „it“", "parameters": {"type": "object", "properties": {}}},
}
CALLED = {
    "role": "assistant",
    "content": None,
    "tool_calls": [
        {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Zürich", "days": 2}'}}
    ],
}
TURNS = [{"role": "user", "content": "Weather?"}, CALLED, {"role": "tool", "tool_call_id": "c1", "content": "rain"}]
SOURCES = {
    "hermes": "{% if tools %}<tools>{% for t in tools %}\n{{ t | tojson }}{% endfor %}\n</tools>{% endif %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% if m.tool_calls %}{% for c in m.tool_calls %}<tool_call>\n"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\n</tool_call>{% endfor %}'
    "{% endif %}{% endfor %}",
    "llama": "{% if tools is not none %}{% for t in tools %}{{ t | tojson(indent=4) }}{% endfor %}{% endif %}"
    "{% for m in messages %}{% if 'tool_calls' in m %}{% set c = m.tool_calls[0].function %}"
    "{{ '{\"name\": \"' + c.name + '\", \"parameters\": ' }}{{ c.arguments | tojson }}{{ '}' }}"
    "{% elif m.role == 'tool' %}{{ {'output': m.content} | tojson }}{% else %}{{ m.content }}{% endif %}{% endfor %}",
}
PLAIN = "{% for m in messages %}{{ m.role }}:{{ m.content }}\n{% endfor %}"


@pytest.mark.parametrize("name", SOURCES)
def test_tools_and_calls_are_rendered_as_in_transformers(name: str) -> None:
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=Backend(models.BPE()))
    parsed = json.loads(json.dumps(TURNS))
    parsed[1]["content"] = ""
    parsed[1]["tool_calls"][0]["function"]["arguments"] = {"city": "Zürich", "days": 2}
    expected = theirs.apply_chat_template(parsed, chat_template=SOURCES[name], tools=[TOOL], tokenize=False)
    template = ChatTemplate(SOURCES[name], {})
    assert template.knows_tools
    assert template.render(check_messages(TURNS), tools=[TOOL], add_generation_prompt=False) == expected


def test_a_template_that_never_asks_for_tools_is_known_not_to_know_them() -> None:
    assert not ChatTemplate(PLAIN, {}).knows_tools
    assert not load_tokenizer("default").template.knows_tools


def folder_with(folder: Path, templates: Any) -> Path:
    write_tiny_model(folder)
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>", "chat_template": templates}))
    return folder


def test_calls_and_results_are_words_for_a_template_that_knows_none(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(folder_with(tmp_path, PLAIN))
    prompt = tokenizer.render_chat(check_messages(TURNS))
    assert prompt == (
        'user:Weather?\nassistant:<tool_call>\n{"name": "weather", "arguments": {"city": "Zürich", "days": 2}}\n'
        "</tool_call>\nuser:<tool_response>\nrain\n</tool_response>\n"
    )
    offered = tokenizer.render_chat(check_messages(TURNS[:1]), tools=[TOOL])
    assert offered.startswith("system:# Tools\n") and offered.endswith("</tool_call>\nuser:Weather?\n")
    assert json.dumps(TOOL, ensure_ascii=False) in offered


def test_the_template_for_tools_is_taken_where_tools_are_offered(tmp_path: Path) -> None:
    named = [{"name": "default", "template": PLAIN}, {"name": "tool_use", "template": SOURCES["hermes"]}]
    tokenizer = load_tokenizer(folder_with(tmp_path, named))
    assert tokenizer.render_chat(check_messages(TURNS[:1])) == "user:Weather?\n"
    assert tokenizer.render_chat(check_messages(TURNS[:1]), tools=[TOOL]).startswith("<tools>")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools | length }} tool")
    assert load_tokenizer(tmp_path).render_chat(check_messages(TURNS[:1]), tools=[TOOL]) == "1 tool"


def test_an_answer_goes_on_from_its_beginning_with_nothing_of_the_template_behind_it() -> None:
    messages = check_messages([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello, I am"}])
    prompt = load_tokenizer("default").render_chat(messages, continues_last=True)
    assert prompt.endswith("<|im_start|>assistant\nHello, I am")


def test_a_template_that_drops_the_beginning_of_an_answer_refuses_it(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(folder_with(tmp_path, "{{ messages[0].content }}"))
    messages = check_messages([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}])
    with pytest.raises(InvalidRequest, match="beginning"):
        tokenizer.render_chat(messages, continues_last=True)


@pytest.mark.parametrize(
    ("arguments", "expected"), [("", {}), (None, None), ("{}", {}), ('{"a": "x\ny"}', {"a": "x\ny"}), ("[]", None)]
)
def test_arguments_are_an_object_as_text_or_nothing(arguments: str | None, expected: dict[str, Any] | None) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": arguments}}
    message = {"role": "assistant", "content": "", "tool_calls": [call]}
    if expected is None:
        with pytest.raises(InvalidRequest, match="arguments"):
            check_messages([message])
    else:
        assert check_messages([message])[0]["tool_calls"][0]["function"]["arguments"] == expected

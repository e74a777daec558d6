"""Chat templates: what transformers renders, we render; what is wrong with messages is named."""

import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from tokenizers import Tokenizer as Backend
from tokenizers import models

from sessile.errors import InvalidRequest, StartupError
from sessile.text.load import load_tokenizer
from sessile.text.template import ChatTemplate, check_messages

TURNS = [
    {"role": "user", "content": "Hi <b>there</b> & 'you'"},
    {"role": "assistant", "content": " Hello!\n"},
    {"role": "user", "content": "ünï 日本"},
]
SOURCES = {
    "plain": "{% for m in messages %}<{{ m.role }}>{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}",
    "trimmed": "{{- bos_token }}\n{%- for m in messages %}\n    {%- if loop.index0 % 2 %}\n  A: {{ m.content | trim }}"
    "\n    {%- else %}\n  U: {{ m.content }}\n    {% endif %}\n{%- endfor %}",
    "json": "{{ messages | tojson }} {{ messages | tojson(indent=2) }}",
    "break": "{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "tools": "{{ tools is none }} {{ documents is none }} {{ tools is defined }}",
    "year": "{{ strftime_now('%Y') }}",
}


def template(source: str) -> ChatTemplate:
    return ChatTemplate(source, {"bos_token": "<s>", "eos_token": "</s>"})


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("add_generation_prompt", [False, True])
def test_a_template_renders_as_in_transformers(name: str, add_generation_prompt: bool) -> None:
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Backend(models.BPE()), bos_token="<s>", eos_token="</s>"
    )
    expected = theirs.apply_chat_template(
        TURNS, chat_template=SOURCES[name], tokenize=False, add_generation_prompt=add_generation_prompt
    )
    rendered = template(SOURCES[name]).render(check_messages(TURNS), add_generation_prompt=add_generation_prompt)
    assert rendered == expected


def test_the_default_model_brings_its_template() -> None:
    tokenizer = load_tokenizer("default")
    prompt = tokenizer.render_chat(check_messages([{"role": "user", "content": "Hi"}]))
    assert prompt.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert prompt.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    ids = tokenizer.encode_chat(check_messages([{"role": "user", "content": "Hi"}]))
    assert tokenizer.decode(ids, skip_special_tokens=False) == prompt


def save_tokenizer(folder: Path) -> None:
    backend = Backend.from_str(load_tokenizer("default").backend.to_str())
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>").save_pretrained(folder)


def test_a_folder_may_keep_its_template_in_either_place(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    messages = check_messages(TURNS)
    with pytest.raises(InvalidRequest, match="no chat template"):
        load_tokenizer(tmp_path).render_chat(messages)
    config = tmp_path / "tokenizer_config.json"
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    config.write_text(json.dumps({"chat_template": named}))
    assert load_tokenizer(tmp_path).render_chat(messages) == "d"
    config.write_text('{"chat_template": "c {{ eos_token }}", "eos_token": {"content": "<|im_end|>"}}')
    assert load_tokenizer(tmp_path).render_chat(messages) == "c <|im_end|>"
    (tmp_path / "chat_template.jinja").write_text("file")
    assert load_tokenizer(tmp_path).render_chat(messages) == "file"


def test_what_a_template_says_against_the_messages_reaches_the_client() -> None:
    with pytest.raises(InvalidRequest, match="roles must alternate") as caught:
        template("{{ raise_exception('roles must alternate') }}").render(check_messages(TURNS))
    assert caught.value.param == "messages"


@pytest.mark.parametrize("source", ["{{ messages[9].content.x }}", "{{ 1 / 0 }}", "{{ messages + 'a' }}"])
def test_a_template_that_fails_is_the_requests_fault(source: str) -> None:
    with pytest.raises(InvalidRequest, match="chat template"):
        template(source).render(check_messages(TURNS))


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.append(1) }}",
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__subclasses__() }}",
        "{{ raise_exception.__globals__.keys() }}",
    ],
)
def test_h57_a_template_cannot_leave_the_sandbox(source: str) -> None:
    messages = check_messages(TURNS)
    with pytest.raises(InvalidRequest):
        template(source).render(messages)
    assert messages == check_messages(TURNS)


ENDLESS = {
    "nested loops": "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}",
    "a loop that calls itself": "{% for a in [range(99)] recursive %}{{ loop(range(9)) }}{{ loop([a]) }}{% endfor %}",
    "a macro that calls itself": "{% macro m() %}{{ m() }}{{ m() }}{% endmacro %}{{ m() }}",
    "macros that double": "".join(f"{{% macro m{n}() %}}{{{{ m{n - 1}() }}}}{{{{ m{n - 1}() }}}}{{% endmacro %}}"
                                  for n in range(1, 60)) + "{{ m59() }}",
    "a tower of powers": "{{ 9 ** (9 ** 9) }}",
    "squares of squares": "{% set ns = namespace(n=9) %}"
    "{% for i in range(99) %}{% set ns.n = ns.n * ns.n %}{% endfor %}",
    "a text a billion times": "{{ 'x' * 1000000000 }}",
    "a list a billion times": "{{ 1000000000 * [0] }}",
}  # fmt: skip


@pytest.mark.parametrize("name", ENDLESS)
def test_h57_a_template_that_would_not_end_is_stopped(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sessile.text.template._Budget.__init__", small_budget)
    with pytest.raises(InvalidRequest, match="chat template"):
        template("{% macro m0() %}{% endmacro %}" + ENDLESS[name]).render(check_messages(TURNS))


def small_budget(budget: Any) -> None:
    budget.steps, budget.chars = 50_000, 1_000


def test_h57_what_a_template_writes_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sessile.text.template._Budget.__init__", small_budget)
    source = "{% for i in range(101) %}0123456789{{ '0123456789' }}{% endfor %}"
    with pytest.raises(InvalidRequest, match="more than"):
        template(source).render(check_messages(TURNS))
    assert len(template(source.replace("101", "100")).render(check_messages(TURNS))) == 2000


def test_h57_a_conversation_of_ten_thousand_messages_is_rendered() -> None:
    messages = check_messages([TURNS[0], TURNS[1]] * 5000)
    assert template(SOURCES["trimmed"]).render(messages).count("U: ") == 5000


@pytest.mark.parametrize(
    "source",
    ["{{ 9 ** (9 ** 9) }}", "{{ 'x' * 10 ** 10 }}", "{{ 'x' | center(10000000000) }}", "{{ lipsum(10000000) }}"],
)
def test_h57_nothing_of_a_template_is_evaluated_when_it_is_compiled(source: str) -> None:
    assert template(source).source == source


NESTED = {
    "parentheses": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "loops": "{% for x in y %}" * 50 + "{% endfor %}" * 50,
    "conditions": "{% if x %}" * 3000 + "{% endif %}" * 3000,
    "lists": "{{ " + "[" * 500 + "]" * 500 + " }}",
    "signs": "{{ " + "-" * 5000 + "1 }}",
    "too many characters": " " * (1 << 20) + "x",
}


@pytest.mark.parametrize("name", NESTED)
def test_a_template_that_cannot_be_compiled_is_refused_in_one_line(name: str) -> None:
    with pytest.raises(StartupError, match="chat template") as refusal:
        template(NESTED[name])
    assert str(refusal.value).isprintable() and len(str(refusal.value)) < 300


@pytest.mark.parametrize("name", ["the budget of the render", "budget", "_BUDGET"])
def test_h57_no_template_reaches_its_budget(name: str) -> None:
    for source in (f"{{{{ self['{name}'].steps }}}}", f"{{{{ self._TemplateReference__context['{name}'].steps }}}}"):
        with pytest.raises(InvalidRequest):
            template(source).render(check_messages(TURNS))


def test_a_template_that_is_not_jinja_is_refused_at_start() -> None:
    with pytest.raises(StartupError, match="line 2"):
        template("a\n{% for %}")


def test_text_parts_are_joined_and_developer_is_system() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert check_messages([{"role": "developer", "content": parts, "name": "n", "refusal": None}]) == [
        {"role": "system", "content": "a\nb", "name": "n"}
    ]


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ("hi", "messages"),
        ([], "messages"),
        (["hi"], "messages[0]"),
        ([{"content": "x"}], "messages[0].role"),
        ([{"role": "robot", "content": "x"}], "messages[0].role"),
        ([{"role": "tool", "content": "x"}], "messages[0].tool_call_id"),
        ([{"role": "tool", "content": None, "tool_call_id": "c"}], "messages[0].content"),
        ([{"role": "user", "content": "x", "tool_calls": []}], "messages[0].tool_calls"),
        ([{"role": "user"}], "messages[0].content"),
        ([{"role": "user", "content": 1}], "messages[0].content"),
        ([{"role": "user", "content": []}], "messages[0].content"),
        ([TURNS[0], {"role": "user", "content": ["x"]}], "messages[1].content[0]"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "messages[0].content[0]"),
        ([{"role": "user", "content": [{"type": "text", "text": 5}]}], "messages[0].content[0].text"),
        ([{"role": "user", "content": [{"type": "text", "text": "a", "x": 1}]}], "messages[0].content[0].x"),
        ([{"role": "assistant", "content": "a", "tool_calls": {"id": "x"}}], "messages[0].tool_calls"),
        ([{"role": "user", "content": "a", "name": 5}], "messages[0].name"),
    ],
)
def test_a_message_that_is_wrong_is_refused_by_its_field(messages: Any, param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check_messages(messages)
    assert caught.value.param == param
    assert param in caught.value.message

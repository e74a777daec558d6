"""What a chat template writes behind an answer, and templates behind whose answers nothing can be gone on from."""

import pytest

from sessile.text.seams import closing_of
from sessile.text.template import ChatTemplate

ASK = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}" + ASK
TRIMS = CHATML.replace("m.content", "m.content | trim")
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML
DEFAULT_SYSTEM = "{% if messages[0].role != 'system' %}<|im_start|>system\nHi<|im_end|>\n{% endif %}" + CHATML

FORGETS = "{% for m in messages if m.role == 'user' or loop.last %}[{{ m.role }}]{{ m.content }};{% endfor %}" + ASK
REWRITES = "{{ messages | length }}" + CHATML
THINKS = CHATML.replace(ASK, ASK.replace("assistant\n", "assistant\n<think>\n"))
LAST_IS_OPEN = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% if not loop.last %};{% endif %}{% endfor %}"


def closing(source: str) -> str | None:
    template = ChatTemplate(source, {})
    return closing_of(lambda messages, asks: template.render(messages, add_generation_prompt=asks))


@pytest.mark.parametrize("source", [CHATML, TRIMS, NO_SYSTEM, DEFAULT_SYSTEM])
def test_the_end_marker_of_a_template_that_only_writes_behind_is_found(source: str) -> None:
    assert closing(source) == "<|im_end|>\n"


@pytest.mark.parametrize("source", [FORGETS, REWRITES, THINKS, LAST_IS_OPEN, "{{ raise_exception('never') }}", "fixed"])
def test_a_template_that_rewrites_what_came_before_has_none(source: str) -> None:
    assert closing(source) is None

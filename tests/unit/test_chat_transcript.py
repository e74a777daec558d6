"""What a chat client sends: each turn only what the server lacks, and together exactly the rendered conversation."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest

from sessile.chat import Answer, Transcript
from sessile.errors import StartupError
from sessile.text.load import load_tokenizer
from sessile.text.template import ChatTemplate, check_messages
from sessile.text.tokenizer import Tokenizer

IM_END = 2


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer("default")


def answer(tokenizer: Tokenizer, text: str, finish: Mapping[str, Any]) -> Answer:
    tokens = tokenizer.encode(text) + ([IM_END] if finish["type"] == "stop" else [])
    return Answer(text, tokens, finish, prompt_tokens=30, cached_tokens=20, first_token_s=0.5, total_s=2.5)


def rendered(tokenizer: Tokenizer, *texts: str) -> str:
    roles = ("user", "assistant")
    messages = [{"role": roles[index % 2], "content": text} for index, text in enumerate(texts)]
    return tokenizer.render_chat(check_messages(messages))


def text_of(tokenizer: Tokenizer, *runs: Sequence[int]) -> str:
    return "".join(tokenizer.decode(run, skip_special_tokens=False) for run in runs)


@pytest.mark.parametrize("finish", [{"type": "stop", "matched": IM_END}, {"type": "length", "length": 3}])
def test_turns_joined_are_the_rendered_conversation_whether_an_answer_ended_or_was_cut(
    tokenizer: Tokenizer, finish: Mapping[str, Any]
) -> None:
    transcript = Transcript(tokenizer)
    first = transcript.question("Hi")
    said = answer(tokenizer, " Hello,  you!\n", finish)
    transcript.answered("Hi", first, said)
    second = transcript.question("And  42?")
    assert text_of(tokenizer, first, said.tokens, second) == rendered(tokenizer, "Hi", said.text, "And  42?")
    assert len(second) < len(first)


def test_an_interrupted_turn_is_sent_again_with_the_next_and_closed(tokenizer: Tokenizer) -> None:
    transcript = Transcript(tokenizer)
    first = transcript.question("Count")
    cut = answer(tokenizer, "1, 2,", {"type": "abort", "message": "aborted by the client"})
    transcript.answered("Count", first, cut)
    second = transcript.question("Go on")
    assert second[: len(first) + len(cut.tokens)] == [*first, *cut.tokens]
    assert text_of(tokenizer, second) == rendered(tokenizer, "Count", "1, 2,", "Go on")


def test_a_refused_question_leaves_no_trace(tokenizer: Tokenizer) -> None:
    transcript = Transcript(tokenizer)
    before = transcript.question("Hi")
    transcript.question("something that the server refused")
    assert transcript.question("Hi") == before


def test_a_model_without_template_gets_the_lines_as_they_are(tokenizer: Tokenizer) -> None:
    transcript = Transcript(replace(tokenizer, template=None))
    assert transcript.question("Once upon") == tokenizer.encode("Once upon")


@pytest.mark.parametrize(
    "source", ["{{ messages[-1].content }}", "{% if messages|length > 1 %}{{ raise_exception('one turn') }}{% endif %}"]
)
def test_a_template_that_cannot_be_continued_is_refused_at_the_start(tokenizer: Tokenizer, source: str) -> None:
    with pytest.raises(StartupError, match="cannot chat with this model"):
        Transcript(replace(tokenizer, template=ChatTemplate(source, {})))


def test_the_summary_counts_new_and_reused_tokens_and_the_speed_after_the_first(tokenizer: Tokenizer) -> None:
    said = replace(answer(tokenizer, "x", {"type": "length"}), tokens=[5] * 21)
    assert said.summary == "10 new tokens · 20 reused · first token after 500 ms · 21 tokens at 10.0 tokens/s"
    assert replace(said, tokens=[]).summary == "10 new tokens · 20 reused"

"""What a chat client sends: each turn only what the server lacks, and together exactly the rendered conversation."""

from collections.abc import Sequence
from dataclasses import replace

import pytest

from sessile.chat.transcript import Answer, Transcript
from sessile.completion import Completion
from sessile.errors import StartupError
from sessile.text.load import load_tokenizer
from sessile.text.template import ChatTemplate, check_messages
from sessile.text.tokenizer import Tokenizer

IM_END = 2


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer("default")


def completion(tokenizer: Tokenizer, text: str, finish_reason: str) -> Completion:
    ended_by = IM_END if finish_reason == "stop" else None
    tokens = tokenizer.encode(text) + ([IM_END] if ended_by else [])
    return Completion(text, tokens, finish_reason, ended_by, prompt_tokens=30, cached_tokens=20)


def rendered(tokenizer: Tokenizer, *texts: str) -> str:
    roles = ("user", "assistant")
    messages = [{"role": roles[index % 2], "content": text} for index, text in enumerate(texts)]
    return tokenizer.render_chat(check_messages(messages))


def text_of(tokenizer: Tokenizer, *runs: Sequence[int]) -> str:
    return "".join(tokenizer.decode(run, skip_special_tokens=False) for run in runs)


@pytest.mark.parametrize("finish_reason", ["stop", "length"])
def test_turns_joined_are_the_rendered_conversation_whether_an_answer_ended_or_was_cut(
    tokenizer: Tokenizer, finish_reason: str
) -> None:
    transcript = Transcript(tokenizer)
    first = transcript.question("Hi")
    said = completion(tokenizer, " Hello,  you!\n", finish_reason)
    transcript.answered("Hi", first, said)
    second = transcript.question("And  42?")
    assert text_of(tokenizer, first, said.tokens, second) == rendered(tokenizer, "Hi", said.text, "And  42?")
    assert len(second) < len(first)


def test_an_interrupted_turn_is_sent_again_with_the_next_and_closed(tokenizer: Tokenizer) -> None:
    transcript = Transcript(tokenizer)
    first = transcript.question("Count")
    cut = completion(tokenizer, "1, 2,", "abort")
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
    said = replace(completion(tokenizer, "x", "length"), tokens=[5] * 21)
    speed = "first token after 500 ms · 21 tokens at 10.0 tokens/s"
    assert Answer(said, 0.5, 2.5).summary == f"10 new tokens · 20 reused · {speed}"
    assert Answer(replace(said, tokens=[]), 0.5, 2.5).summary == "10 new tokens · 20 reused"


def test_a_copy_of_a_transcript_goes_its_own_way(tokenizer: Tokenizer) -> None:
    transcript = Transcript(tokenizer)
    first = transcript.question("Hi")
    copy = transcript.copy()
    transcript.answered("Hi", first, completion(tokenizer, "Hello", "stop"))
    assert copy.question("Hi") == first
    assert (copy.title, transcript.title) == ("", "Hi")
    transcript.answered("And\nyou?", [5], completion(tokenizer, "Fine", "stop"))
    assert transcript.title == "Hi … And you?"

"""The engine without HTTP, on the embedded model."""

from collections.abc import Iterator

import pytest

from sessile import LLM
from sessile.errors import InvalidRequest, NotFound, SessionClosed, StartupError, TooLong

CONTEXT_TOKENS = 512
FRANCE = "The capital of France is"


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(dtype="float32", context_tokens=CONTEXT_TOKENS, page_size=4, kv_memory="128M", audit_level=2) as llm:
        yield llm


def test_a_prompt_as_text_and_as_token_ids_gives_the_same(llm: LLM) -> None:
    text = llm.generate(FRANCE, max_new_tokens=4, temperature=0.0)
    tokens = llm.generate(llm.tokenizer.encode(FRANCE), max_new_tokens=4, temperature=0.0)
    assert "Paris" in text.text
    assert tokens.tokens == text.tokens


def test_prompts_side_by_side_give_what_each_gives_alone(llm: LLM) -> None:
    prompts = [FRANCE, "Once upon a time", "def add(a, b):"]
    together = llm.generate(prompts, max_new_tokens=8, temperature=0.0)
    alone = [llm.generate(prompt, max_new_tokens=8, temperature=0.0) for prompt in prompts]
    assert [c.tokens for c in together] == [c.tokens for c in alone]


def test_the_same_seed_gives_the_same_sample(llm: LLM) -> None:
    first, second = (llm.generate(FRANCE, max_new_tokens=12, temperature=1.0, seed=5).tokens for _ in range(2))
    assert first == second


def test_a_stop_string_ends_the_text_before_it(llm: LLM) -> None:
    completion = llm.generate(FRANCE, max_new_tokens=8, temperature=0.0, stop="aris")
    assert (completion.text, completion.finish_reason, completion.matched) == (" P", "stop", "aris")


def test_a_warm_turn_computes_all_but_one_token_of_its_history_never_again(llm: LLM) -> None:
    with llm.session() as session:
        session.generate(FRANCE, max_new_tokens=8, temperature=0.0)
        history = session.tokens()
        assert session.generate(" And", max_new_tokens=8, temperature=0.0).cached_tokens == len(history) - 1


def test_a_session_of_turns_says_what_one_prompt_says(llm: LLM) -> None:
    with llm.session() as session:
        session.generate("Once upon a time", max_new_tokens=6, temperature=0.0)
        session.generate(" there was", max_new_tokens=6, temperature=0.0)
        history = session.tokens()
    assert llm.generate(history[:-6], max_new_tokens=6, temperature=0.0).tokens == history[-6:]


def test_a_refused_request_raises_what_the_core_raised(llm: LLM) -> None:
    with pytest.raises(TooLong, match="context length"):
        llm.generate([5] * CONTEXT_TOKENS)
    with pytest.raises(InvalidRequest, match="vocabulary"):
        llm.generate([10**6])


def test_a_closed_session_is_gone(llm: LLM) -> None:
    session = llm.session()
    session.close()
    with pytest.raises((NotFound, SessionClosed)):
        session.generate("x")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pagesize": 4}, "unknown setting 'pagesize'; did you mean page_size"),
        ({"page_size": 0}, "--page-size must"),
        ({"page_size": "4"}, "page_size must be int; got '4'"),
        ({"rows_max": 1.5}, "rows_max must be int or None"),
    ],
)
def test_a_wrong_setting_is_refused_before_anything_is_loaded(settings: dict[str, object], message: str) -> None:
    with pytest.raises(StartupError, match=message):
        LLM(**settings)

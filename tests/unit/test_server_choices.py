"""One answer as it grows: what is read of it is what somebody asks for."""

from sessile.contract.messages import Done, Sampling
from sessile.server.calls import Call, Order
from sessile.server.link import Arrival
from sessile.server.openai_replies import Choice
from sessile.text.answer.reader import AnswerReader
from tests.http.fake_engine import byte_tokenizer


def choice_of(text: str, reader: AnswerReader | None) -> Choice:
    """An answer that has come to its end."""
    call = Call(None, Order(tokens=[1], sampling=Sampling(seed=0), tenant=""), whole=False)  # type: ignore[arg-type]
    choice = Choice(0, call, byte_tokenizer(), trim_stop=True, reader=reader)
    for byte in text.encode():
        choice.add(Arrival(tokens=[byte]))
    choice.add(Arrival(done=Done(key=1, reason="length")))
    return choice


def test_an_answer_that_nobody_reads_in_parts_is_kept_once() -> None:
    choice = choice_of("some text", None)
    events, _ = choice.take_answer()
    assert not events and not choice.answer.content


def test_an_answer_says_the_same_whether_it_is_read_or_not() -> None:
    plain, read = choice_of("some text", None), choice_of("some text", AnswerReader())
    assert plain.message == read.message == {"role": "assistant", "content": "some text"}
    assert plain.reasoning_tokens == read.reasoning_tokens == 0

"""Items of a response from the parts of its answer, however many come at once."""

import copy
from dataclasses import dataclass, field
from typing import Any

import pytest

from sessile.contract.messages import Done
from sessile.server.responses.output import OutputItems
from sessile.text.answer.events import CallArguments, CallBegan, CallEnded, CallFailed, Content, Event, Reasoning

ANSWER: list[Event] = [
    Reasoning("So, "), Reasoning("Oslo."), Content("Let me "), Content("see."),
    CallBegan(0, "weather"), CallArguments(0, '{"city": '), CallFailed(0, "<broken>", "no JSON"), Content(" Again:"),
    CallBegan(1, "weather"), CallArguments(1, '{"city": '), CallArguments(1, '"Oslo"}'), CallEnded(1),
]  # fmt: skip


@dataclass
class Answering:
    """What OutputItems reads of a Choice."""

    fresh: list[Event] = field(default_factory=list)
    done: Done | None = None

    def take_answer(self) -> tuple[list[Event], None]:
        fresh, self.fresh = self.fresh, []
        return fresh, None

    def call_id(self, index: int) -> str:
        return f"call_{index}"


def read(pieces: list[list[Event]], reason: str = "stop") -> tuple[OutputItems, list[dict[str, Any]]]:
    """The items of an answer that came in these pieces, and what a stream that writes each piece at once has told."""
    output, told = OutputItems(), []
    for index, piece in enumerate(pieces):
        is_last = index == len(pieces) - 1
        told += copy.deepcopy(output.take(Answering(piece, Done(key=1, reason=reason) if is_last else None)))  # type: ignore[arg-type]
    return output, told


def without_ids(content: Any) -> Any:
    if isinstance(content, list):
        return [without_ids(each) for each in content]
    if not isinstance(content, dict):
        return content
    return {name: without_ids(value) for name, value in content.items() if name not in ("id", "item_id")}


@pytest.mark.parametrize("cut", range(1, len(ANSWER)))
def test_items_and_events_do_not_depend_on_how_much_comes_at_once(cut: int) -> None:
    whole, at_once = read([ANSWER])
    by_piece, one_by_one = read([[event] for event in ANSWER])
    halves, in_halves = read([ANSWER[:cut], ANSWER[cut:]])
    assert without_ids(whole.items) == without_ids(by_piece.items) == without_ids(halves.items)
    assert without_ids(at_once) == without_ids(one_by_one) == without_ids(in_halves)


def test_the_items_are_what_was_said_without_the_broken_call() -> None:
    output, _ = read([ANSWER])
    assert [item["type"] for item in output.items] == ["reasoning", "message", "function_call"]
    assert [item["content"][0]["text"] for item in output.items[:2]] == ["So, Oslo.", "Let me see.<broken> Again:"]
    assert (output.items[2]["call_id"], output.items[2]["arguments"]) == ("call_1", '{"city": "Oslo"}')
    assert output.errors == [{"index": 2, "message": "no JSON"}]


def test_every_item_that_a_stream_begins_it_ends_with_what_it_told_of_it() -> None:
    _, told = read([ANSWER])
    begun = [each for each in told if each["type"] == "response.output_item.added"]
    ended = [each for each in told if each["type"] == "response.output_item.done"]
    assert [each["output_index"] for each in begun] == [each["output_index"] for each in ended] == list(range(5))
    for index, end in enumerate(ended):
        said = "".join(each["delta"] for each in told if each.get("output_index") == index and "delta" in each)
        item = end["item"]
        assert said == (item["arguments"] if item["type"] == "function_call" else item["content"][0]["text"])


def test_a_call_that_the_end_cut_off_is_no_item() -> None:
    output, told = read([[Content("So:"), CallBegan(0, "weather"), CallArguments(0, '{"ci')]], reason="abort")
    assert [(item["type"], item["status"]) for item in output.items] == [("message", "completed")]
    assert (told[-1]["item"]["type"], told[-1]["item"]["status"]) == ("function_call", "incomplete")


def test_an_answer_without_words_is_an_empty_message() -> None:
    output, _ = read([[]])
    assert [item["content"][0]["text"] for item in output.items] == [""]

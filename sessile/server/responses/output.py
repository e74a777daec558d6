"""What a response answers, item by item as it is read, and what a stream tells of each."""

from typing import Any

from sessile.server.openai_replies import Choice
from sessile.server.responses.items import Item, call_item, message_item, reasoning_item
from sessile.text.answer.events import CallArguments, CallBegan, CallEnded, CallFailed, Content, Event, Reasoning

Told = dict[str, Any]
"""An event of a stream without its number in it."""
_DELTAS = {
    "message": "response.output_text",
    "reasoning": "response.reasoning_text",
    "function_call": "response.function_call_arguments",
}
"""Type of an item → what its events of growing begin with."""


class OutputItems:
    """The items of one answer. One grows at a time; `items` has those that have ended."""

    def __init__(self) -> None:
        self.items: list[Item] = []
        self.errors: list[dict[str, Any]] = []
        """What looked like calls and was none: its text is in a message. index: of the item in the stream, or None."""
        self._open: Item | None = None
        self._pieces: list[str] = []
        self._index = -1

    def take(self, choice: Choice) -> list[Told]:
        """Take what is new of an answer; what a stream tells of it. An answer that has ended has at least one item."""
        told = [each for event in choice.take_answer()[0] for each in self._tell(event, choice)]
        if choice.done is not None:
            if self._open is None and not self.items:
                told += self._begin(message_item("assistant", ""))
            told += self.close("completed" if choice.done.reason == "stop" else "incomplete")
        return told

    def close(self, status: str) -> list[Told]:
        """The item that grows has ended. A call that is cut off is none: clients would make it."""
        if self._open is None:
            return []
        item, text = self._open, "".join(self._pieces)
        self._open, self._pieces = None, []
        item["status"] = status
        told: list[Told] = []
        if item["type"] == "function_call":
            item["arguments"] = text
            if status == "completed":
                told.append(self._grown(item, "done", arguments=text, name=item["name"]))
                self.items.append(item)
        else:
            part = item["content"][0]
            part["text"] = text
            told.append(self._grown(item, "done", text=text))
            told.append({"type": "response.content_part.done", **self._place(item), "part": part})
            self._keep(item)
        return [*told, {"type": "response.output_item.done", "output_index": self._index, "item": item}]

    def _keep(self, item: Item) -> None:
        """Words on both sides of what turned out to be no call are one message, though a stream has told of two."""
        last = self.items[-1] if self.items else None
        if last is not None and last["type"] == item["type"] == "message":
            # A new one: the stream may not have written the other yet.
            part = last["content"][0]
            whole = {**part, "text": part["text"] + item["content"][0]["text"]}
            self.items[-1] = {**last, "status": item["status"], "content": [whole]}
        else:
            self.items.append(item)

    def _tell(self, event: Event, choice: Choice) -> list[Told]:
        match event:
            case Reasoning(text):
                return self._say("reasoning", text)
            case Content(text) | CallFailed(None, text, _):
                self._note_failure(event, None)
                return self._say("message", text)
            case CallBegan(index, name):
                return self._begin(call_item(choice.call_id(index), name, ""))
            case CallArguments(_, text):
                return [self._grow(text)]
            case CallEnded():
                return self.close("completed")
            case CallFailed(_, text, _):
                self._note_failure(event, self._index)
                return [*self.close("incomplete"), *self._say("message", text)]

    def _note_failure(self, event: Event, index: int | None) -> None:
        if isinstance(event, CallFailed):
            self.errors.append({"index": index, "message": event.reason})

    def _say(self, kind: str, text: str) -> list[Told]:
        """More text of the item that grows, if it is of that kind, or of a new one."""
        if self._open is not None and self._open["type"] == kind:
            return [self._grow(text)]
        begun = self._begin(message_item("assistant", "") if kind == "message" else reasoning_item(""))
        return [*begun, self._grow(text)]

    def _begin(self, item: Item) -> list[Told]:
        ended = self.close("completed")
        self._open, self._index = item, self._index + 1
        item["status"] = "in_progress"
        shown = {**item, "content": []} if "content" in item else dict(item)
        begun = {"type": "response.output_item.added", "output_index": self._index, "item": shown}
        if "content" not in item:
            return [*ended, begun]
        part = {"type": "response.content_part.added", **self._place(item), "part": dict(item["content"][0])}
        return [*ended, begun, part]

    def _grow(self, text: str) -> Told:
        assert self._open is not None, "text of an item that has not begun"
        self._pieces.append(text)
        return self._grown(self._open, "delta", delta=text)

    def _grown(self, item: Item, what: str, **content: Any) -> Told:
        told = {"type": f"{_DELTAS[item['type']]}.{what}", **self._place(item), **content}
        return told | {"logprobs": []} if item["type"] == "message" else told

    def _place(self, item: Item) -> dict[str, Any]:
        place = {"item_id": item["id"], "output_index": self._index}
        return place | {"content_index": 0} if "content" in item else place

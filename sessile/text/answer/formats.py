"""Which format a model answers in, and the reader for it."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from sessile.text.answer.marked import HERMES, LLAMA3, MarkedCalls, Markers
from sessile.text.answer.pythonic import PythonicCalls
from sessile.text.answer.reader import AnswerReader, CallReader
from sessile.text.answer.reasoning import CLOSE, OPEN, ReasoningSplit

_MARKERS: Mapping[str, Markers] = {"hermes": HERMES, "llama3": LLAMA3}
_SIGNS: Mapping[str, tuple[str, ...]] = {
    "hermes": ("<tool_call>",),
    "llama3": ('{"name": function name, "parameters":', "<|python_tag|>"),
    "pythonic": ("[func_name1(", "[func1(", "[func("),
}
"""What a chat template says when it tells the model how to call: the first format of which it has a sign is its own."""
_FOREIGN = ("<function=", "<arg_key>")
"""Signs of formats that begin with the markers of Hermes, and go on as nothing that is read here."""


@dataclass(frozen=True, slots=True)
class AnswerFormat:
    """How a model writes calls and reasoning: "hermes", "llama3", "pythonic" or "none"; "think" or "none"."""

    tools: str
    reasoning: str

    def reader(
        self,
        prompt: str,
        *,
        tool_names: Iterable[str] = (),
        allowed_names: Iterable[str] | None = None,
        is_parallel: bool = True,
        separates_reasoning: bool = True,
        streams_reasoning: bool = True,
    ) -> AnswerReader:
        """A reader for the answer to a rendered prompt. tool_names: what is offered; none: nothing is a call.

        allowed_names: what alone may be called: a call of anything else is told as one that failed. None: anything.
        """
        names, allowed = frozenset(tool_names), None if allowed_names is None else frozenset(allowed_names)
        reasoning = None
        if self.reasoning == "think":
            reasoning = ReasoningSplit(is_open=prompt.rstrip().endswith(OPEN), is_apart=separates_reasoning)
        return AnswerReader(
            reasoning=reasoning,
            calls=self._call_reader(names, allowed) if names else None,
            is_parallel=is_parallel,
            streams_reasoning=streams_reasoning,
        )

    def markers(self, tool_names: Iterable[str] = ()) -> tuple[str, ...]:
        """What must be seen in the text, though it be a special token, for such a reader to find its way."""
        tools = _MARKERS.get(self.tools) if any(True for _ in tool_names) else None
        thought = (OPEN, CLOSE) if self.reasoning == "think" else ()
        return (*((tools.open, tools.close) if tools else ()), *thought)

    def _call_reader(self, names: frozenset[str], allowed: frozenset[str] | None) -> CallReader | None:
        if self.tools == "pythonic":
            return PythonicCalls(names, allowed)
        return MarkedCalls(_MARKERS[self.tools], names, allowed) if self.tools in _MARKERS else None


def tool_format(template: str, *, knows_tools: bool) -> str:
    """The format that a chat template asks for; "none" if it is none of ours.

    A template that knows no tools is given ours (spelled.py), which ask for Hermes's.
    """
    if not knows_tools:
        return "hermes"
    if any(sign in template for sign in _FOREIGN):
        return "none"
    return next((name for name, signs in _SIGNS.items() if any(sign in template for sign in signs)), "none")


def reasoning_format(template: str) -> str:
    """The format of reasoning that a chat template knows."""
    return "think" if OPEN in template or CLOSE in template else "none"

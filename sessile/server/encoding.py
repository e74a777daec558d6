"""Text to token ids without holding up the event loop."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sessile.errors import InvalidRequest
from sessile.server.body import THREAD_BYTES
from sessile.text.template import Message, check_messages
from sessile.text.tokenizer import Tokenizer
from sessile.text.tools import ToolSpec

RENDER_TIMEOUT_S = 20.0
"""How long a chat template may take; the steps that it may take are bounded too, so that its thread comes to an end."""


class Rendering:
    """Writes messages as `Dialogues.place` asks for it, and keeps the prompt: how an answer is read depends on it."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        variables: Mapping[str, Any] | None = None,
        tools: Sequence[ToolSpec] | None = None,
    ) -> None:
        self.prompt = ""
        """What was written last to be answered."""
        self._tokenizer = tokenizer
        self._variables = variables
        self._tools = tools

    def __call__(self, messages: Sequence[Message], asks: bool) -> str:
        text = self._tokenizer.render_chat(
            messages, add_generation_prompt=asks, variables=self._variables, tools=self._tools
        )
        self.prompt = text if asks else self.prompt
        return text


async def encode_text(tokenizer: Tokenizer, text: str, *, add_special_tokens: bool = True) -> list[int]:
    """Token ids of text; a long one is encoded in a thread (the encoder releases the interpreter lock)."""
    if len(text) > THREAD_BYTES:
        return await asyncio.to_thread(tokenizer.encode, text, add_special_tokens=add_special_tokens)
    return tokenizer.encode(text, add_special_tokens=add_special_tokens)


async def render_messages(
    tokenizer: Tokenizer,
    messages: object,
    variables: Mapping[str, Any] | None,
    *,
    tools: Sequence[ToolSpec] | None = None,
) -> str:
    """The prompt for a client's chat messages. Raises InvalidRequest naming what is wrong with them."""
    return await render_prompt(tokenizer, lambda: check_messages(messages), variables, tools=tools)


async def render_prompt(
    tokenizer: Tokenizer,
    checked: Callable[[], Sequence[Message]],
    variables: Mapping[str, Any] | None,
    *,
    tools: Sequence[ToolSpec] | None = None,
    may_continue: bool = False,
) -> str:
    """The prompt for the messages that `checked` returns; it raises what it finds wrong with them.

    may_continue: if the last message is the assistant's, the prompt ends within it. Always in a thread: a template is
    foreign code, and how long it takes over these messages nobody knows (H57).
    """

    def render() -> str:
        messages = checked()
        continues_last = may_continue and messages[-1]["role"] == "assistant"
        return tokenizer.render_chat(messages, variables=variables, tools=tools, continues_last=continues_last)

    try:
        return await asyncio.wait_for(asyncio.to_thread(render), RENDER_TIMEOUT_S)
    except TimeoutError:
        message = f"the chat template took longer than {RENDER_TIMEOUT_S:g} s over the messages"
        raise InvalidRequest(message, param="messages") from None

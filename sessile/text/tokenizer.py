"""The one Tokenizer that server and clients use, whatever file it was built from (see from_gguf.py, from_folder.py)."""

import contextlib
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import tokenizers

from sessile.contract.model import ModelFacts
from sessile.errors import InvalidRequest
from sessile.modelfile import shown
from sessile.text.detokenise import TextStream
from sessile.text.template import ChatTemplate, Message
from sessile.text.tools import ToolSpec, spelled_out
from sessile.text.vocabulary import Vocabulary

FINGERPRINT_BYTES = 24


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """Text ⇄ token ids of one model. Immutable, usable from any thread.

    eos_ids: tokens that end an output. bos_id: the token that `encode` puts first; None if it puts none (a model may
    name a BOS that its prompts never start with: SmolLM2 names <|im_start|>). template: None if the model has none.
    tool_template: the one to take where tools are offered, if the model has a second one for that.
    strips_space: the encoder puts a space before the text, which `decode` takes away again.
    """

    backend: tokenizers.Tokenizer
    vocabulary: Vocabulary
    eos_ids: tuple[int, ...]
    bos_id: int | None
    template: ChatTemplate | None
    strips_space: bool = False
    tool_template: ChatTemplate | None = None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of text; special tokens written in it are taken as such. add_special_tokens: BOS and the like.

        Raises InvalidRequest for text with half a surrogate pair, which no encoding has, and for text that a tokenizer
        has no token for, not even one that stands for what is unknown.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidRequest(f"text is not valid Unicode: {error.reason}", param="text") from error
        with _refusing_text():
            ids: list[int] = self.backend.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, without BOS and the like, by several threads. Raises InvalidRequest as `encode` does;
        the texts are valid Unicode.
        """
        with _refusing_text():
            return [encoding.ids for encoding in self.backend.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, tokens: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """Text of a whole sequence; bytes that are no UTF-8 become U+FFFD. For a growing output see `stream`."""
        text = self.vocabulary.join(tokens, skip_special_tokens=skip_special_tokens).decode(errors="replace")
        return text.removeprefix(" ") if self.strips_space else text

    def stream(self, *, skip_special_tokens: bool = True, stops: Sequence[bytes] = ()) -> TextStream:
        """A new TextStream for one output."""
        return TextStream(self.vocabulary, skip_special_tokens=skip_special_tokens, stops=stops)

    def render_chat(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
        tools: Sequence[ToolSpec] | None = None,
        continues_last: bool = False,
    ) -> str:
        """The prompt for checked messages (see `check_messages`), to be encoded without special tokens.

        tools: what is offered, by the template if it knows of tools, else in words (see `spelled_out`). continues_last:
        the last message is the beginning of the answer. Raises InvalidRequest if the model has no chat template or the
        template refuses.
        """
        template = self.template_for(tools)
        speaks_of_tools = tools or any(message["role"] == "tool" or "tool_calls" in message for message in messages)
        worded: Sequence[Mapping[str, Any]] = messages
        if speaks_of_tools and not template.knows_tools:
            worded, tools = spelled_out(messages, tools), None
        if continues_last:
            prompt = template.render(worded, add_generation_prompt=False, variables=variables, tools=tools)
            return _cut_behind(prompt, worded[-1]["content"])
        return template.render(worded, add_generation_prompt=add_generation_prompt, variables=variables, tools=tools)

    def template_for(self, tools: Sequence[ToolSpec] | None) -> ChatTemplate:
        """The chat template that renders these tools. Raises InvalidRequest if the model has none."""
        template = self.tool_template if tools and self.tool_template else self.template
        if template is None:
            raise InvalidRequest(
                "the model has no chat template; send a prompt to /generate or /v1/completions", param="messages"
            )
        return template

    def encode_chat(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> list[int]:
        """Token ids of `render_chat`; what the template wrote is all there is."""
        prompt = self.render_chat(messages, add_generation_prompt=add_generation_prompt)
        return self.encode(prompt, add_special_tokens=False)

    def fingerprint(self) -> str:
        """Tells this tokenizer from any that gives other ids: 24 bytes in hexadecimal. Takes 10 to 100 ms."""
        digest = hashlib.blake2b(self.backend.to_str().encode(), digest_size=FINGERPRINT_BYTES)
        return digest.hexdigest()

    def facts(self, *, vocab_size: int, context_tokens: int) -> ModelFacts:
        """What the core needs to know, for a model of this vocabulary size and context length."""
        return self.vocabulary.facts(
            vocab_size=vocab_size, context_tokens=context_tokens, eos_ids=self.eos_ids, bos_id=self.bos_id
        )


@contextlib.contextmanager
def _refusing_text() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if type(error) is not Exception:  # The library raises this very class; anything else is no text's fault.
            raise
        reason = f"the model's tokenizer cannot encode this text: {shown(str(error))}"
        raise InvalidRequest(reason, param="text") from error


def _cut_behind(prompt: str, said: str) -> str:
    """A rendered prompt up to the end of its last message's words, so that the answer goes on from there."""
    words = said.strip()
    at = prompt.rfind(words)
    if at < 0 or not words:
        raise InvalidRequest("the chat template lets no answer go on from its beginning", param="messages")
    return prompt[: at + len(words)]

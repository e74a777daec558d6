"""One request, from the prompt to the completion: what is submitted for it, and what its arrivals come to."""

from collections.abc import Sequence
from typing import Any, SupportsIndex, TypeGuard

import numpy as np

from sessile.completion import Completion, GenerateFields, Message, Piece, Prompt, TokenLogprob
from sessile.contract.messages import Done, Submit, TokenDetail, pack_tokens, unpack_tokens
from sessile.errors import InvalidRequest, error_of
from sessile.offline.driver import Arrival
from sessile.offline.sampling import wish_of
from sessile.text.template import check_messages
from sessile.text.tokenizer import Tokenizer


class Request:
    """A prompt, perhaps the next turn of a session, and its output so far.

    Raises InvalidRequest for what is wrong with it; nothing has been submitted then.
    """

    def __init__(
        self, tokenizer: Tokenizer, vocab_size: int, prompt: Prompt, fields: GenerateFields, session: str | None = None
    ) -> None:
        self._wish = wish_of(fields, vocab_size)
        self._prompt = tokenizer.encode(prompt) if isinstance(prompt, str) else checked_ids(prompt, vocab_size)
        if not self._prompt and session is None:
            raise InvalidRequest("prompt: must not be empty", param="prompt")
        self._session = session
        self._text_stream = tokenizer.stream(
            skip_special_tokens=self._wish.sampling.skip_special_tokens,
            stops=self._wish.sampling.stop if self._wish.trim_stop else (),
        )
        self._texts: list[str] = []
        self._tokens: list[int] = []
        self._details: list[TokenDetail] = []

    def submit(self, key: int) -> Submit:
        """The message that starts it."""
        return Submit(
            key=key,
            tokens=pack_tokens(self._prompt),
            sampling=self._wish.sampling,
            session=self._session,
            logprobs=self._wish.logprobs,
            grammar=self._wish.grammar,
        )

    def add(self, arrival: Arrival) -> Piece:
        """Take what has come; what is new of the output. Raises the UserError of a request that was refused."""
        done = arrival.done
        if done and done.reason == "error":
            raise error_of(done.status, done.code, done.message, done.param)
        self._tokens += arrival.tokens
        self._details += arrival.details
        text = self._fresh_text(arrival)
        self._texts.append(text)
        return Piece(text, arrival.tokens, self._completion(done) if done else None)

    def _fresh_text(self, arrival: Arrival) -> str:
        done, tokens = arrival.done, arrival.tokens
        if done is None:
            return self._text_stream.push(tokens)
        if not self._wish.trim_stop:
            return self._text_stream.finish(tokens)
        if isinstance(done.matched, int):
            tokens = tokens[:-1]
        return self._text_stream.finish(tokens, kept_bytes=done.kept_bytes)

    def _completion(self, done: Done) -> Completion:
        return Completion(
            text="".join(self._texts),
            tokens=self._tokens,
            finish_reason=done.reason,
            matched=done.matched.decode(errors="replace") if isinstance(done.matched, bytes) else done.matched,
            prompt_tokens=done.prompt_tokens,
            cached_tokens=done.cached_tokens,
            logprobs=None if self._wish.logprobs < 0 else self._logprobs(),
        )

    def _logprobs(self) -> list[TokenLogprob]:
        logprobs = np.frombuffer(b"".join(detail.logprobs for detail in self._details), "<f4").tolist()
        assert len(logprobs) == len(self._tokens), "log-probabilities and tokens differ in number"
        count = len(self._tokens), self._wish.logprobs
        if not all(count):
            return [TokenLogprob(token, logprob) for token, logprob in zip(self._tokens, logprobs, strict=True)]
        ids = unpack_tokens(b"".join(detail.top_ids for detail in self._details)).reshape(count).tolist()
        tops = np.frombuffer(b"".join(detail.top_logprobs for detail in self._details), "<f4").reshape(count).tolist()
        return [
            TokenLogprob(token, logprob, tuple(zip(top_ids, top_logprobs, strict=True)))
            for token, logprob, top_ids, top_logprobs in zip(self._tokens, logprobs, ids, tops, strict=True)
        ]


def checked_ids(prompt: Sequence[int], vocab_size: int) -> list[int]:
    """Token ids as a list of plain integers. Raises InvalidRequest for anything else, or outside the vocabulary."""
    try:
        ids = np.asarray(prompt)
    except (ValueError, OverflowError):  # lists of several lengths, numbers beyond 64 bits
        ids = np.empty((0, 0))
    if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
        raise InvalidRequest("prompt: must be text or a list of token ids", param="prompt")
    outside = ids[(ids < 0) | (ids >= vocab_size)]
    if outside.size:
        raise InvalidRequest(
            f"prompt: {outside[0]} is not in the vocabulary; ids are 0 to {vocab_size - 1}", param="prompt"
        )
    return [int(token) for token in ids]


def is_one_prompt(prompt: Prompt | Sequence[Prompt]) -> TypeGuard[Prompt]:
    """Whether this is text or token ids, and not a list of such. Nothing is a list of no prompts."""
    return isinstance(prompt, str) or (len(prompt) > 0 and isinstance(prompt[0], SupportsIndex))


def chat_tokens(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    """The prompt for a chat. Raises InvalidRequest for what is no message, or without a chat template."""
    return tokenizer.encode_chat(check_messages(list(messages)))


def merged(sampling_params: Any, fields: GenerateFields) -> GenerateFields:
    """Sampling parameters given as a dict and by keyword; the keyword wins."""
    if sampling_params is None:
        return fields
    if not isinstance(sampling_params, dict):
        raise InvalidRequest(
            f"sampling_params: must be a SamplingParams, which is a dict, got {type(sampling_params).__name__}",
            param="sampling_params",
        )
    return {**sampling_params, **fields}

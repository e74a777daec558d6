"""What a call has produced so far: token ids, text and log-probabilities, from the arrivals of its stream."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from sessile.contract.messages import Done, Sampling, Scores, TokenDetail, unpack_tokens
from sessile.server.calls import Order
from sessile.server.link import Arrival
from sessile.text.tokenizer import Tokenizer


@dataclass(slots=True)
class Logprobs:
    """Log-probabilities of a run of tokens; tops is parallel to tokens, each entry most likely first."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float | None] = field(default_factory=list)
    tops: list[list[tuple[int, float]]] = field(default_factory=list)

    def add(self, tokens: Sequence[int], scored: "TokenDetail | Scores") -> None:
        """Append the tokens that `scored` describes."""
        logprobs = np.frombuffer(scored.logprobs, "<f4")
        assert len(logprobs) == len(tokens), "log-probabilities and tokens differ in number"
        self.tokens.extend(tokens)
        self.logprobs.extend(logprobs.tolist())
        if scored.top_ids:
            ids = unpack_tokens(scored.top_ids).reshape(len(tokens), -1).tolist()
            tops = np.frombuffer(scored.top_logprobs, "<f4").reshape(len(tokens), -1).tolist()
            self.tops.extend(list(zip(*pair, strict=True)) for pair in zip(ids, tops, strict=True))
        else:
            self.tops.extend([] for _ in tokens)

    def since(self, start: int) -> "Logprobs":
        """Those from index start on."""
        return Logprobs(self.tokens[start:], self.logprobs[start:], self.tops[start:])

    def followed_by(self, later: "Logprobs") -> "Logprobs":
        """These and then those."""
        return Logprobs(self.tokens + later.tokens, self.logprobs + later.logprobs, self.tops + later.tops)


NO_LOGPROBS = Logprobs()
"""Of no tokens; nothing is added to it."""


class Output:
    """Accumulates one call. Text stays behind the tokens where a character or a stop string is not yet decided."""

    def __init__(self, tokenizer: Tokenizer, sampling: Sampling, *, trim_stop: bool = True) -> None:
        """trim_stop: the text ends before the stop string or stop token that ended it."""
        self.tokens: list[int] = []
        self.generated = Logprobs()
        self._prompt = Logprobs()
        self._prompt_start = -1  # position in the context of the first scored prompt token; -1: none was scored
        self._trim_stop = trim_stop
        self._sampling = sampling
        self._tokenizer = tokenizer
        self._texts: list[str] = []
        self._text_stream = tokenizer.stream(
            skip_special_tokens=sampling.skip_special_tokens,
            stops=sampling.stop if trim_stop else (),
        )

    def add(self, arrival: Arrival) -> str:
        """Take an arrival; the text it adds."""
        for scores in arrival.scores:
            if self._prompt_start < 0:
                self._prompt_start = scores.start
            self._prompt.add(unpack_tokens(scores.tokens).tolist(), scores)
        start = len(self.tokens)
        self.tokens.extend(arrival.tokens)
        for detail in arrival.details:
            count = len(detail.logprobs) // 4
            self.generated.add(self.tokens[start : start + count], detail)
            start += count
        fresh = self._fresh_text(arrival.tokens, arrival.done)
        self._texts.append(fresh)
        return fresh

    @property
    def text(self) -> str:
        """All that was added. Joined when it is asked for: a stream that tells what is new never does."""
        if len(self._texts) > 1:
            self._texts = ["".join(self._texts)]
        return self._texts[0] if self._texts else ""

    def tokens_within(self, count: int) -> int:
        """How many tokens the first so many bytes of the text take, the last perhaps not whole."""
        join, skips = self._tokenizer.vocabulary.join, self._sampling.skip_special_tokens
        tokens = 0
        while count > 0 and tokens < len(self.tokens):
            count -= len(join((self.tokens[tokens],), skip_special_tokens=skips))
            tokens += 1
        return tokens

    def prompt_logprobs(self, order: Order) -> Logprobs:
        """Of the scored prompt tokens; the first token of a context, which nothing predicts, has None."""
        alone = len(order.tokens) == 1 and order.session is None
        if order.prompt_logprobs_from == 0 and (self._prompt_start == 1 or alone):
            return Logprobs([int(order.tokens[0])], [None], [[]]).followed_by(self._prompt)
        return self._prompt

    def _fresh_text(self, tokens: list[int], done: Done | None) -> str:
        if done is None:
            return self._text_stream.push(tokens)
        if not self._trim_stop:
            return self._text_stream.finish(tokens)
        if isinstance(done.matched, int):
            tokens = tokens[:-1]
        return self._text_stream.finish(tokens, kept_bytes=done.kept_bytes)

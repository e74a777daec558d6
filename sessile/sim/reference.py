"""The right answer: what a request's own tokens alone make the toy model say, with no pages, rows, steps or drafts."""

import copy
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from sessile.contract.messages import Grammar, Sampling
from sessile.contract.model import ModelFacts
from sessile.sim import hashing
from sessile.sim.grammar import beginning_of, forbidden_at


class Chain:
    """Tokens read one after the other, as contiguous KV."""

    def __init__(self, tokens: Iterable[int] = ()) -> None:
        self.digest = 0
        self.length = 0
        for token in tokens:
            self.push(token)

    def push(self, token: int) -> None:
        """Read one more token."""
        self.digest = hashing.extend(self.digest, token, self.length)
        self.length += 1

    def copy(self) -> "Chain":
        """An independent chain of the same tokens."""
        return copy.copy(self)


class Speaker:
    """Says the output of one request, token by token.

    prompt: the whole context, a session's history included. The device must have said the same.
    """

    def __init__(
        self, prompt: Sequence[int], sampling: Sampling, facts: ModelFacts, grammar: Grammar | None = None
    ) -> None:
        self.chain = Chain(prompt)
        self._place = None if grammar is None else beginning_of(grammar)
        self.output_tokens = 0
        self._facts = facts
        self._sampling = sampling
        penalties = (sampling.repetition_penalty, sampling.frequency_penalty, sampling.presence_penalty)
        warmth = (sampling.temperature, sampling.top_p, sampling.min_p, float(sampling.top_k))
        settings = penalties if sampling.temperature == 0 else penalties + warmth
        self._flavour = hashing.flavour_of(settings, sampling.logit_bias)
        self._has_penalty = penalties != (1.0, 0.0, 0.0)
        self._seen = sum(hashing.seen_term(token, is_output=False) for token in prompt) if self._has_penalty else 0
        eos_ids = () if sampling.ignore_eos else facts.eos_ids
        self._banned = frozenset((*eos_ids, *sampling.stop_token_ids))

    @property
    def is_astray(self) -> bool:
        """Whether its grammar cannot be followed any further."""
        return self._place is not None and self._place.is_astray

    def peek(self) -> int:
        """The next token; -1 if it may not say any."""
        if self.is_astray:
            return -1
        noise = self._flavour
        if self._sampling.temperature != 0:
            noise = hashing.noise_of(self._flavour, self._sampling.seed, self.output_tokens)
        if self._has_penalty:
            noise ^= hashing.mix(self._seen)
        banned = self._banned if self.output_tokens < self._sampling.min_new_tokens else frozenset()
        if self._place is not None:
            banned |= forbidden_at(self._place, self._facts.vocab_size)
        return hashing.token_of(self.chain.digest, noise, self._facts.vocab_size, banned)

    def push(self, token: int) -> None:
        """Take a token as said, whether it is the right one or not."""
        self.chain.push(token)
        self.output_tokens += 1
        if self._place is not None:
            self._place = self._place.after(token)
        if self._has_penalty:
            self._seen += hashing.seen_term(token, is_output=True)

    def copy(self) -> "Speaker":
        """An independent speaker at the same place."""
        twin = copy.copy(self)
        twin.chain = self.chain.copy()
        return twin


@dataclass(frozen=True)
class Ending:
    """How an output has to end: reason as in Done, what matched, and how many bytes of text stand before the match."""

    reason: str
    matched: frozenset[int | bytes] = frozenset()
    kept_bytes: frozenset[int] = frozenset({-1})


def text_of(tokens: Sequence[int], sampling: Sampling, facts: ModelFacts) -> bytes:
    """Output as the stop matcher sees it: special tokens count as nothing where they are skipped."""
    skipped = facts.special_ids if sampling.skip_special_tokens else frozenset()
    return b"".join(facts.token_bytes[token] for token in tokens if token not in skipped)


def ending_of(output: Sequence[int], sampling: Sampling, facts: ModelFacts, output_limit: int) -> Ending | None:
    """Where an output stands that has not ended before its last token: the way it has to end now, or None.

    output_limit: most output tokens that limits and context allow.
    """
    if not output:
        return Ending("length") if output_limit == 0 else None
    last = output[-1]
    if len(output) > sampling.min_new_tokens or not sampling.min_new_tokens:
        if last in sampling.stop_token_ids or (last in facts.eos_ids and not sampling.ignore_eos):
            return Ending("stop", frozenset({last}))
    if sampling.stop and len(output) > sampling.min_new_tokens:
        ending = _string_ending(output, sampling, facts)
        if ending is not None:
            return ending
    if sampling.stop_patterns and len(output) > sampling.min_new_tokens:
        ending = _pattern_ending(output, sampling, facts)
        if ending is not None:
            return ending
    return Ending("length") if len(output) >= output_limit else None


def _string_ending(output: Sequence[int], sampling: Sampling, facts: ModelFacts) -> Ending | None:
    """A stop string that the last token completes: the match that ends first; of several, any.

    What the first min_new_tokens said is not part of any match.
    """
    first_byte = len(text_of(output[: sampling.min_new_tokens], sampling, facts))
    text = text_of(output, sampling, facts)
    before_bytes = len(text_of(output[:-1], sampling, facts))
    matches = [
        (start + len(stop), stop, start)
        for stop in sampling.stop
        for start in range(max(first_byte, before_bytes - len(stop) + 1), len(text) - len(stop) + 1)
        if text.startswith(stop, start)
    ]
    first_end = min((end for end, _, _ in matches), default=-1)
    earliest = [match for match in matches if match[0] == first_end]
    if not earliest:
        return None
    return Ending("stop", frozenset(m[1] for m in earliest), frozenset(m[2] for m in earliest))


def _pattern_ending(output: Sequence[int], sampling: Sampling, facts: ModelFacts) -> Ending | None:
    """A pattern of which a match ends in the last token, as Python's own engine finds it; of several, any."""
    first_byte = len(text_of(output[: sampling.min_new_tokens], sampling, facts))
    text = text_of(output, sampling, facts)[first_byte:]
    before_bytes = len(text_of(output[:-1], sampling, facts)) - first_byte
    matched = [
        pattern.source.encode()
        for pattern in sampling.stop_patterns
        if any(
            re.search(b"(?:%s)\\Z" % pattern.source.encode(), text[:end])
            for end in range(before_bytes + 1, len(text) + 1)
        )
    ]
    return Ending("stop", frozenset(matched)) if matched else None

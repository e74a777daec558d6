"""Outputs that follow compiled grammars: the lines of requests, and the masks of a step in one call."""

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
from llguidance import LLExecutor, LLMatcher
from llguidance.numpy import (
    fill_next_token_bitmask,
    fill_next_token_bitmask_par,
    fill_next_token_bitmask_par_with_draft_tokens,
)

from sessile.contract.grammar import GrammarLine
from sessile.contract.messages import Grammar
from sessile.contract.plan import Ints
from sessile.errors import InvalidRequest
from sessile.units import TokenId, ceil_div

KEPT_MAX = 128
"""Grammars that stay compiled after their last use."""
KEPT_SOURCE_BYTES_MAX = 4 * 2**20
"""Text of these together: what a matcher takes grows with it."""

PARALLEL_FROM = 4
"""Masks for which it is worth waking other threads."""

Key = tuple[str, str]
"""Kind and source: equal texts are one grammar, whichever field they came in."""


def key_of(grammar: Grammar) -> Key:
    """What a grammar is kept under."""
    return grammar.kind, grammar.source


class MatcherLine:
    """A GrammarLine on a matcher of its own, copied when there is something to ask it."""

    __slots__ = ("_matcher", "_start", "failure", "tokens")

    def __init__(self, start: LLMatcher) -> None:
        """start: the matcher at the start of the grammar, shared by all its lines and never advanced."""
        self._start = start
        self._matcher: LLMatcher | None = None
        self.tokens = 0
        self.failure = ""

    @property
    def matcher(self) -> LLMatcher:
        """At the end of what the line was told; to be left as it is."""
        if self._matcher is None:
            self._matcher = self._start.deep_copy()
        return self._matcher

    def extend(self, tokens: Sequence[int]) -> None:
        """Settled output tokens. One that the grammar does not allow means that it gave up within its bounds."""
        self.tokens += len(tokens)
        if not self.failure and not self.matcher.consume_tokens(list(tokens)):
            self.fail()

    def fail(self) -> None:
        """The matcher cannot go on: remember why."""
        reason = "" if has_no_extension(self.matcher) else " ".join(self.matcher.get_error().split())[:200]
        reason = reason or "no token of the model can follow"
        self.failure = f"the grammar cannot be followed beyond output token {self.tokens}: {reason}"


def has_no_extension(matcher: LLMatcher) -> bool:
    """Whether a matcher failed because nothing can follow, which llguidance calls so and explains to nobody."""
    return matcher.get_error().startswith("NoExtension")


class CompiledGrammars:
    """Grammars of the core: a bounded store of matchers, and masks. One thread only: that of the step loop.

    Holds the matchers that were `put` there, least recently used ones until there is no room.
    """

    def __init__(self, vocab_size: int, threads: int | None = None) -> None:
        """threads: that fill masks, started when there are some to fill; None: most of the machine's cores."""
        self._words = ceil_div(vocab_size, 32)
        self._threads = threads
        self._executor: LLExecutor | None = None
        self._kept: OrderedDict[Key, LLMatcher] = OrderedDict()
        self._kept_bytes = 0

    def __contains__(self, grammar: Grammar) -> bool:
        return key_of(grammar) in self._kept

    def put(self, grammar: Grammar, matcher: LLMatcher) -> None:
        """Keep a compiled grammar. The newest is kept whatever its size, as it is about to be used."""
        key = key_of(grammar)
        if key not in self._kept:
            self._kept_bytes += len(grammar.source)
        self._kept[key] = matcher
        self._kept.move_to_end(key)
        while len(self._kept) > 1 and (len(self._kept) > KEPT_MAX or self._kept_bytes > KEPT_SOURCE_BYTES_MAX):
            (_, source), _ = self._kept.popitem(last=False)
            self._kept_bytes -= len(source)

    def start(self, grammar: Grammar) -> GrammarLine:
        """The line of a request. Raises InvalidRequest if the grammar was not compiled before."""
        key = key_of(grammar)
        if key not in self._kept:
            field = grammar.field or grammar.kind
            raise InvalidRequest(f"{field}: the grammar is not compiled", param=field)
        self._kept.move_to_end(key)
        return MatcherLine(self._kept[key])

    def masks(
        self, lines: Sequence[GrammarLine], drafts: Sequence[Sequence[TokenId]]
    ) -> tuple[Sequence[int], Ints]:
        """See Grammars. The masks of all lines are filled at once, on several threads, without the interpreter lock."""
        counts: list[int] = []
        single: list[tuple[LLMatcher, int]] = []
        drafted: list[tuple[LLMatcher, int, list[int]]] = []
        places = 0
        for line, proposed in zip(lines, drafts, strict=True):
            assert isinstance(line, MatcherLine)
            allowed = line.matcher.validate_tokens(list(proposed)) if proposed and not line.failure else 0
            counts.append(allowed)
            if allowed:
                drafted.append((line.matcher, places, list(proposed[:allowed])))
            elif not line.failure:
                single.append((line.matcher, places))
            places += allowed + 1
        words = np.full((places, self._words), -1, np.int32)
        self._executor = self._executor or LLExecutor(self._threads)
        if len(single) < PARALLEL_FROM:
            for matcher, own_place in single:
                fill_next_token_bitmask(matcher, words, own_place)
        else:
            fill_next_token_bitmask_par(self._executor, single, words)
        if drafted:
            fill_next_token_bitmask_par_with_draft_tokens(self._executor, drafted, words)
        place = 0
        for line, count in zip(lines, counts, strict=True):
            assert isinstance(line, MatcherLine)
            own = words[place : place + count + 1]
            if not line.failure and (line.matcher.is_error() or not own.any(axis=1).all()):
                line.fail()
            if line.failure:
                own[:] = -1
            place += count + 1
        return counts, words

"""What the simulator writes down about sessions and requests, and how a checker says that something is wrong."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NoReturn

from sessile.contract.messages import Done, Scores, Submit, ToEngine, TokenDetail
from sessile.sim.reference import Ending, Speaker


class CheckFailed(AssertionError):
    """A checker found the core wrong: `checker` is its name, the message says what differs."""

    def __init__(self, checker: str, message: str) -> None:
        super().__init__(message)
        self.checker = checker


def check(holds: bool, checker: str, message: str) -> None:
    """Raise CheckFailed unless it holds."""
    if not holds:
        fail(checker, message)


def fail(checker: str, message: str) -> NoReturn:
    """Raise CheckFailed: where a check is made so often that its message must not be written before it is needed."""
    raise CheckFailed(checker, message)


def corpus_of(key: int) -> str:
    """The corpus that holds what a request is about to say."""
    return f"what request {key} says"


@dataclass(slots=True)
class SessionBook:
    """A session as its client knows it."""

    id: str
    opened_ns: int
    idle_since_ns: int
    idle_timeout_ns: int | None
    tokens_max: int
    metadata: dict[str, str]
    history: list[int] = field(default_factory=list)
    turn_ends: list[int] = field(default_factory=list)
    """Length of the history after each finished turn."""
    turn: "RequestBook | None" = None
    closing: bool = False
    reclaim_mark: int | None = None
    """Reclaims counted when its KV was last known to be complete; None: nothing is known of its KV."""
    lost_part: bool = False
    """Whether a rewind may have cost it less than a page of KV."""
    tenant: str = ""
    reserved_pages: int = 0
    reply: "RequestBook | None" = None
    """The last finished turn, if it had a name: sent again, it is answered again."""
    branching: bool = False
    nodes: "dict[str, SessionBook]" = field(default_factory=dict)
    """Of a branching session, by rid: every turn that finished or is in flight."""
    root: "SessionBook | None" = None
    """Of a node: its session."""
    rid: str = ""
    parent: "SessionBook | None" = None
    input_end: int = 0
    """Where the output of the last finished turn begins."""

    @property
    def in_flight(self) -> bool:
        """Whether a turn of it is queued or runs."""
        return self.turn is not None or any([node.turn is not None for node in self.nodes.values()])

    @property
    def lines(self) -> "list[SessionBook]":
        """What holds a history: itself and its nodes."""
        return [self, *self.nodes.values()]

    @property
    def expires_ns(self) -> int | None:
        """When it has to expire if nobody uses it; None while a turn is in flight, or never."""
        if self.idle_timeout_ns is None or self.closing or self.in_flight:
            return None
        return self.idle_since_ns + self.idle_timeout_ns


@dataclass(slots=True)
class RequestBook:
    """A request as its client knows it."""

    submit: Submit
    session: SessionBook | None
    prompt: list[int]
    """The whole context, a session's history included."""
    output_limit: int
    """Most output tokens that the request, the context and the pool allow."""
    speaker: Speaker
    refusals: frozenset[int]
    """Statuses of which one must refuse it; empty: it must be accepted, but for `excuses`."""
    excuses: frozenset[int]
    """Statuses that may refuse it: what depends on the state of the waiting line."""
    reclaim_mark: int | None = None
    """The session's, when the turn was sent."""
    output: list[int] = field(default_factory=list)
    scored_to: int = 0
    """Prompt positions below this have their scores, or want none."""
    cancelled: bool = False
    ending: Ending | None = None
    """Set with the token that has to be the last one."""
    done: Done | None = None
    ran_as_oldest: bool = False
    """Whether a step ran it while no older request was live."""
    input_tokens: int = 0
    """Tokens that came with it."""
    kept: bool = False
    """Whether what it delivered stays, though it was ended: another turn goes on from it."""
    replays: "RequestBook | None" = None
    """The turn whose reply it must repeat."""
    told: "list[TokenDetail | Scores]" = field(default_factory=list)
    """What came beside its tokens."""
    device_prompt_tokens: int = 0
    """Prompt tokens that the device ran for it, recomputation included."""

    @property
    def key(self) -> int:
        """The number its client gave it."""
        return self.submit.key

    @property
    def is_over(self) -> bool:
        """Nothing more may happen to it but its Done."""
        return self.cancelled or self.done is not None or bool(self.refusals) or self.replays is not None


Script = Mapping[int, Sequence[ToEngine]]
"""Messages by turn of the loop: a recorded workload."""


@dataclass(frozen=True)
class Failure:
    """What was found, and where."""

    seed: int
    step: int
    checker: str
    message: str
    balanced: bool
    """Whether all totals of pages and rows still added up: what sums alone would have seen."""
    events: tuple[str, ...]


@dataclass(frozen=True)
class Report:
    """One simulation's outcome. `trace` is a digest of all messages, plans and effects, in order."""

    seed: int
    steps: int
    trace: str
    totals: Counter[str]
    failure: Failure | None
    script: Script

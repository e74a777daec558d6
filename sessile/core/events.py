"""The last events of a machine, kept compactly while it runs and told in words when something is wrong.

No token of any client is kept: numbers, names and lengths are enough to follow who held what.
"""

from collections import deque
from typing import Any

import numpy as np

from sessile.contract.messages import GetStats, RestoreSession, Submit, ToEngine
from sessile.contract.plan import SAMPLE, Ints, StepPlan, StepResult

EVENTS_KEPT = 1000
STEPS_IN_FULL = 64
"""Of older steps only the size is kept: the arrays of a thousand would not stay in a processor's cache."""

Event = tuple[Any, ...]
"""A verb, and what it is about."""


class EventRing:
    """Takes events at the cost of an append; nothing is put into words before `lines` is asked."""

    def __init__(self) -> None:
        self._events: deque[Event | _Step] = deque(maxlen=EVENTS_KEPT)
        self._in_full: deque[_Step] = deque()

    def received(self, message: ToEngine) -> None:
        """A message came in."""
        if isinstance(message, Submit):
            self._events.append(
                ("submit", message.key, message.session, len(message.tokens) // 4, message.sampling.max_new_tokens)
            )
        elif isinstance(message, RestoreSession):
            self._events.append(("restore", message.opening.session, len(message.tokens) // 4))
        elif not isinstance(message, GetStats):  # It changes nothing, and a watchdog asks all the time.
            self._events.append(("received", message))

    def planned(self, plan: StepPlan) -> None:
        """A step is launched."""
        # Not the plan: its tokens and parameters are a client's, and many.
        step = _Step(
            "planned", plan.step, plan.rows, plan.starts, plan.query_counts, plan.draft_counts, plan.flags,
            plan.bind_rows, plan.table_rows, plan.table_starts, plan.table_counts, plan.table_pages, plan.copies,
        )  # fmt: skip
        self._add_step(step)

    def settled(self, result: StepResult) -> None:
        """A step's result came."""
        self._add_step(_Step("settled", result.step, result.emitted, result.faulty))

    def _add_step(self, step: "_Step") -> None:
        self._events.append(step)
        self._in_full.append(step)
        if len(self._in_full) > 2 * STEPS_IN_FULL:
            self._in_full.popleft().cut()

    def ended(self, key: int, reason: str, output_tokens: int, message: str) -> None:
        """A request ended."""
        self._events.append(("ended", key, reason, output_tokens, message))

    def noted(self, text: str) -> None:
        """Something happened that has words already."""
        self._events.append(("noted", text))

    def lines(self) -> list[str]:
        """Every event kept, oldest first, one line each."""
        # A copy made at once: a watchdog asks from another thread, perhaps while events still come.
        return [_told(event) for event in list(self._events)]


class _Step:
    """A plan or a result: its arrays at first, later only their length."""

    __slots__ = ("facts",)

    def __init__(self, *facts: Any) -> None:
        self.facts: Event = facts

    def cut(self) -> None:
        """Let go of the arrays. At once: another thread may be reading."""
        verb, step, rows = self.facts[:3]
        self.facts = ("cut", verb, step, len(rows))


def _told(event: "Event | _Step") -> str:
    verb, *facts = event.facts if isinstance(event, _Step) else event
    match verb:
        case "submit":
            key, session, tokens, wanted = facts
            place = "" if session is None else f" to session {session!r}"
            return f"received Submit {key}{place}: {tokens} tokens, at most {wanted} new"
        case "restore":
            return f"received RestoreSession {facts[0]!r}: {facts[1]} tokens"
        case "received":
            return f"received {facts[0]}"
        case "planned":
            return f"planned {plan_in_words(*facts)}"
        case "settled":
            step, emitted, faulty = facts
            text = f"settled {step}: emitted {emitted.tolist()}"
            return text + (f", faulty {faulty.tolist()}" if np.count_nonzero(faulty) else "")
        case "cut":
            verb, step, rows = facts
            return f"{verb} {step}: {rows} rows"
        case "ended":
            key, reason, tokens, message = facts
            return f"ended {key}: {reason} after {tokens} tokens{f': {message}' if message else ''}"
        case _:
            return str(facts[0])


def plan_in_words(
    step: int,
    rows: Ints,
    starts: Ints,
    query_counts: Ints,
    draft_counts: Ints,
    flags: Ints,
    bind_rows: Ints,
    table_rows: Ints,
    table_starts: Ints,
    table_counts: Ints,
    table_pages: Ints,
    copies: Ints,
) -> str:
    """What a plan runs, binds and draws; arrays as in StepPlan."""
    parts = []
    for row, start, count, drafts, flag in zip(rows, starts, query_counts, draft_counts, flags, strict=True):
        kind = ("samples" if flag & SAMPLE else "fills") + (f" with {drafts} drafts" if drafts else "")
        parts.append(f"row {row} {kind} {count} at {start}")
    runs = list(zip(table_rows.tolist(), table_starts.tolist(), table_counts.tolist(), strict=True))
    copied = f"; copies {copies.tolist()}" if len(copies) else ""
    return (
        f"{step}: {'; '.join(parts)}; binds {bind_rows.tolist()}; runs {runs} of pages {table_pages.tolist()}{copied}"
    )

"""The canonical form of a small world's state: equal forms have equal futures.

Two schedules that differ in names alone lead to states that behave alike for ever. So the form holds everything that
decides the future, with the names taken out:

  pages      numbered by first appearance. The core compares pages with nothing; the stack of free ones gives them out
             in its order, and the form visits it first.
  rows       likewise: those held in the order of their requests, then the free ones in the order of the stack.
  accounts   left out. The audit has just shown that tags and balances are what the holders hold.
  steps      counted from the newest settled one; whatever has settled is 0, because the core only asks whether a step
             has settled.
  clocks     last uses, arrivals and serials as ranks: the core compares them with each other, and each new one is
             above all that are there (the tree's clock itself is among the ranked, as a use may repeat it).
  heaps      as the sorted list of entries that may come to count again. An entry whose last use is not its node's or
             session's any more never will, since last uses only grow.
  totals     left out, as are marks, the ring of events, the learned forecast (worlds are made with an estimate of one
             token, which every ratio leaves at one) and what tenants were served (there is one tenant).
  memory     cells of pages that somebody owns. Free pages and rows are scrambled after every action.

What is not named below is written out in full, so a field that the core gains can only keep states apart.
"""

import hashlib
from array import array
from collections import Counter, deque
from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any

import msgspec
import numpy as np

from sessile.core.rows import COUNTED
from sessile.sim.twin import fields_of

Write = Callable[["Form", Any], object]

_PLAIN = frozenset((bool, int, float, str, bytes, type(None)))
_rules: "dict[type, tuple[str, list[tuple[str, Write | None]]]]" = {}
"""By class: its name in the rules, and the fields that are written, each with its rule; None: in full."""


class Form:
    """Writes one state down. Use once."""

    def __init__(self, machine: Any, device: Any, result: Any, books: Any) -> None:
        core = machine._books
        self._core = core
        self._pages: dict[int, int] = {}
        self._requests: dict[int, int] = {}
        self._seen: dict[int, int] = {}
        self._settled_step: int = core.settled_step
        self._reclaims: int = core.totals.evicted_pages + core.totals.demoted_pages
        self._nodes = {node.serial: index for index, node in enumerate(core.tree.walk())}
        lines = list(core.lines())
        self._warm = [line for line in lines if line.parked is not None]
        tree_uses = {node.last_use for node in core.tree.walk()}
        self._uses = _ranks({core.tree.clock, *tree_uses, *(line.last_use for line in self._warm)})
        self._serials = _ranks({session.serial for session in lines})
        self._arrivals = _ranks({request.arrival for request in core.requests.values()})
        held = [request.row for request in (*core.requests.values(), *core.draining) if request.row is not None]
        self._row_order = [*held, *reversed(core.rows.free_list)]
        self._rows = {row: index for index, row in enumerate(self._row_order)}
        free = list(reversed(core.ledger.free_stack))
        self._parts = [
            self.pages(free),
            self.write(machine),
            self.write(books),
            self._heap(),
            self._parked(),
            self._memory(device, frozenset(free), held),
            None if result is None else [result.tokens.tolist(), result.emitted.tolist(), result.faulty.tolist()],
        ]

    def digest(self, clients: object) -> bytes:
        """16 bytes that stand for the state. clients: what they still intend, in plain values."""
        packed = msgspec.msgpack.encode((self._parts, clients))
        return hashlib.blake2b(packed, digest_size=16).digest()

    # -- names ----------------------------------------------------------------------------------------------------

    def pages(self, pages: Sequence[int]) -> list[int]:
        """Pages by first appearance."""
        known = self._pages
        return [known.setdefault(page, len(known)) for page in pages]

    def request(self, key: int) -> int:
        """A request's key by first appearance."""
        return self._requests.setdefault(key, len(self._requests))

    def row(self, row: int | None) -> int | None:
        """A row by its place."""
        return None if row is None else self._rows[row]

    def step(self, step: int) -> int:
        """A step, counted from the newest settled one."""
        return max(0, step - self._settled_step)

    # -- everything that is reached -------------------------------------------------------------------------------

    def write(self, value: Any) -> object:
        """Any value: objects field by field, each once, by the rules below."""
        kind = type(value)
        if kind in _PLAIN:
            return value
        if kind in (list, tuple, deque):
            return [item if type(item) in _PLAIN else self.write(item) for item in value]
        if kind in (array, bytearray):
            return list(value)
        if kind in (dict, Counter):
            return [(self.write(key), self.write(item)) for key, item in value.items()]
        if kind in (set, frozenset):
            return sorted(value)
        if isinstance(value, np.ndarray | np.generic):
            return value.tolist()
        if isinstance(value, Enum):
            return value.name
        if isinstance(value, msgspec.Struct):
            return msgspec.msgpack.encode(value)
        return self._object(value)

    def _object(self, value: Any) -> object:
        index = self._seen.get(id(value))
        if index is not None:
            return ("again", index)
        self._seen[id(value)] = len(self._seen)
        kind = type(value)
        name, rules = _rules.get(kind) or _rules_of(value)
        whole = _WHOLE.get(name)
        if whole is not None:
            return whole(self, value)
        written: list[object] = [name]
        for field, rule in rules:
            item = getattr(value, field)
            if rule is not None:
                written.append(rule(self, item))
            else:
                written.append(item if type(item) in _PLAIN else self.write(item))
        return written

    def values(self, mapping: dict[Any, Any]) -> object:
        """What a mapping holds, in its order; the keys are names that the values bear themselves."""
        return [self.write(value) for value in mapping.values()]

    def mark(self, reclaims: int | None) -> bool:
        """Whether nothing was reclaimed since a mark was set; if not now, never again."""
        return reclaims == self._reclaims

    def share(self, key: tuple[int, bytes] | None) -> object:
        """The page that a request is about to publish: behind which node, with which tokens."""
        return None if key is None else (self._nodes.get(key[0], -1), key[1])

    def held_rows(self, rows: Any) -> object:
        """The columns of rows that are held; what a free row has is overwritten before it is read."""
        held = [row for row in self._row_order if rows.occupants[row] is not None]
        columns: list[object] = [len(rows.free_list)]
        for name in sorted({*vars(rows), *COUNTED} - _ROW_NAMES):
            values = getattr(rows, name)
            if isinstance(values, np.ndarray) and not name.startswith("_"):
                columns.append(values[..., held].tolist())
        for row in held:
            columns.append((
                self.request(int(rows.key[row])),
                self._arrivals.get(int(rows.arrival[row]), -1),
                self.step(int(rows.last_step[row])),
                rows.outputs[row, : rows.filled[row]].tolist(),
            ))
        return columns

    def computing(self, computing: dict[Any, Any]) -> object:
        """Who is about to publish which page."""
        return [(self.share(key), self.write(request)) for key, request in computing.items()]

    def limbo(self, limbo: dict[int, Sequence[int]]) -> object:
        """Pages that wait for steps."""
        return [(self.step(step), self.pages(pages)) for step, pages in limbo.items()]

    def flight(self, flight: Any) -> object:
        """A step on its way: who runs, and what the device will answer is in its own part."""
        plan = flight.plan
        rows = [self._rows[row] for row in plan.rows.tolist()]
        sampling = flight.sampling[self._row_order].tolist()
        counts = (plan.starts, plan.query_counts, plan.draft_counts, plan.flags, flight.allowed)
        return [
            self.step(plan.step), rows, sampling, [each.tolist() for each in counts], flight.samples, flight.decodes,
            self.write(flight.parts),
        ]  # fmt: skip

    # -- what has an order of its own -----------------------------------------------------------------------------

    def _heap(self) -> object:
        tree = self._core.tree
        return [
            self._nodes[node.serial]
            for last_use, _, node in sorted(tree._evictable, key=lambda entry: entry[:2])
            if node.parent is not None and last_use == node.last_use
        ]

    def _parked(self) -> object:
        entries = {
            (waits, self._uses[last_use], self._serials[serial])
            for waits, last_use, serial, line in self._core._parked_order
            if line.parked is not None and line.last_use == last_use
        }
        return sorted(entries), [(self._serials[line.serial], self._uses[line.last_use]) for line in self._warm]

    def _memory(self, device: Any, free: frozenset[int], held: list[int]) -> object:
        """What the device keeps of pages and rows that somebody holds, and the results that are on their way."""
        rows = [(self.pages(_used(device._table[row])), self.write(device._rows[row])) for row in held]
        cells = [(index, device._pool.cells[page]) for page, index in self._pages.items() if page not in free and page]
        flights = []
        for flight in device._flights:
            assert not flight.late, "a strict device holds no writes back"
            touched = (self._touched(flight.reads), self._touched(flight.writes))
            flights.append((self.step(flight.step), sorted([self._rows[row] for row in flight.rows]), touched))
        return rows, cells, flights

    def _touched(self, users: dict[int, set[int]]) -> object:
        named = [(*self.pages([page]), sorted([self._rows[row] for row in rows])) for page, rows in users.items()]
        return sorted(named)


def _rules_of(value: Any) -> "tuple[str, list[tuple[str, Write | None]]]":
    kind = type(value)
    name = f"{kind.__module__.split('.')[1]}.{kind.__name__}"
    rules = _RULES.get(name, {})
    fields = (*fields_of(kind), *getattr(value, "__dict__", ()))
    unknown = rules.keys() - set(fields)
    assert not unknown, f"{name} has no {sorted(unknown)} any more"
    written = [(field, rules.get(field)) for field in fields if field not in rules or rules[field] is not None]
    known = _rules[kind] = name, written
    return known


def _ranks(values: set[int]) -> dict[int, int]:
    return {value: rank for rank, value in enumerate(sorted(values))}


def _used(slots: list[int]) -> list[int]:
    return [page for page in slots if page]


_ROW_NAMES = frozenset({"key", "arrival", "last_step", "outputs"})
"""Columns of rows that hold names, and one that is only read as far as it is filled."""
_WHOLE: dict[str, Write] = {"core.RowTable": Form.held_rows, "core.Flight": Form.flight}
_RULES: dict[str, dict[str, Write | None]] = {
    "core.Machine": dict.fromkeys(("_limits", "_facts", "_bos", "_watch")),
    # Worlds are made without forced retraction and with mixed steps, which these two are for.
    # What is steady is there to save work: the same is found without, but for how often drafts are asked for.
    "core.Planner": dict.fromkeys(("_books", "_retracted_step", "_decoded_last", "_took_turns", "_denied", "_steady")),
    "core.Admitter": dict.fromkeys(("_books",)),
    "core.Books": {
        **dict.fromkeys((
            "limits", "facts", "drafter", "totals", "forecast", "effects", "events", "marks", "now_ns", "settled_step",
            "arrivals", "session_serials", "idle_deadlines", "_parked_order",
        )),
        "drafted_step": Form.step,
        "suspects": Form.pages,
        "requests": Form.values,
        "computing": Form.computing,
        "copies": lambda form, copies: [(*form.pages(copy[:2]), copy[2]) for copy in copies],
    },
    "core.PageLedger": {
        **dict.fromkeys((
            "pages_total", "_tags", "_tag_view", "_balances", "_generations", "_vacant_slots", "_sequences", "_free",
        )),
        "_quarantined": Form.pages,
        "quarantine_step": Form.step,
        "_limbo": Form.limbo,
        "floor_step": Form.step,
    },
    "core.PrefixTree": {
        # The places of nodes are for the rolling audit.
        **dict.fromkeys((
            "_ledger", "_page_bytes", "_evictable", "_offers", "_serial", "clock", "places", "_vacant_places", "splits",
        )),
        "step": Form.step,
    },
    "core.Node": {
        **dict.fromkeys(("parent", "serial", "place", "looked")),
        "children": lambda form, children: [form.write(child) for _, child in sorted(children.items())],
        "pages": Form.pages,
        "last_use": lambda form, last_use: form._uses.get(last_use, -1),
        "last_step": Form.step,
    },
    "core.Pin": {"pages": Form.pages},
    "core.Lease": {**dict.fromkeys(("_account", "_lost")), "_pages": Form.pages},
    "core.Request": {
        # These follow from its sampling parameters.
        **dict.fromkeys(("bind_ints", "bind_floats", "ban_ids", "stop_ids", "shaped", "penalised", "slow")),
        "key": Form.request,
        "arrival": lambda form, arrival: form._arrivals.get(arrival, -1),
        "row": Form.row,
        "share_key": Form.share,
    },
    "core.Session": {
        # Its last use is in the order of reclaiming, and nobody asks again for a stored reply.
        **dict.fromkeys(("last_use", "reply")),
        "serial": lambda form, serial: form._serials.get(serial, -1),
        "turn": lambda form, key: None if key is None else form.request(key),
    },
    "core.ParkedKv": {"ready_step": Form.step},
    "core.Tenant": dict.fromkeys(("policy", "served")),
    "core.PromptPart": {"row": Form.row},
    "sim.Books": {
        **dict.fromkeys(("_world", "now_ns", "totals", "by_seed", "requests", "is_unsure", "just_idle", "_settled_ns")),
        "live": Form.values,
        "_reclaims_at_last_end": Form.mark,
    },
    "sim.SessionBook": {"reclaim_mark": Form.mark},
    # What was sent is in the core's request, and the speaker follows from prompt and output.
    "sim.RequestBook": {**dict.fromkeys(("submit", "speaker")), "reclaim_mark": Form.mark},
}
"""By class and field: how it is written; None: it is left out."""

"""Inputs changed by chance: bytes anywhere, or values within JSON, so that what lies behind the parser is reached."""

import copy
import json
import struct
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

Mutate = Callable[[bytes, Random], bytes]

LENGTHS = [0, 1, 2**16, 2**31 - 1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 1]
ODD_VALUES = [
    None, True, False, 0, -1, 1, 3, 2**31, 2**53, 2**63, 2**64, 10**400, 0.5, -1e308, 1e308, 1e-308, "", "x", "\ud800",
    "\x00", "\u2028", "../../etc/passwd", "s" * 5000, "{{ 9 ** 9 }}", "#/a", [], [[]], {}, [None], [1, 2], {"a": 1},
    {"type": "x"}, {"$ref": "#"}, [{}],
]  # fmt: skip
OPENINGS = [b"[", b"(", b"{", b'{"a":', b"- ", b"(?:", b"not "]
"""What nests in some language or other; said over and over again, it asks for a deep stack."""
NESTED_MAX = 60


def mutated_bytes(raw: bytes, rng: Random) -> bytes:
    """A few of: bits flipped, bytes put in, cut out or said again, a length overwritten."""
    for _ in range(rng.choice([1, 1, 2, 4])):
        at, span = rng.randrange(len(raw) + 1), rng.choice([1, 1, 2, 4, 8, 64])
        raw = rng.choice([
            raw[:at] + bytes([raw[at] ^ 1 << rng.randrange(8)]) + raw[at + 1 :] if at < len(raw) else raw + b"\x00",
            raw[:at] + rng.randbytes(span) + raw[at:],
            raw[:at] + raw[at + span :],
            raw[:at] + raw[at : at + span] * rng.randrange(2, 40) + raw[at:],
            raw[:at] + struct.pack("<Q", rng.choice(LENGTHS)) + raw[at + 8 :],
            raw[:at],
            raw[:at] + rng.choice(OPENINGS) * rng.choice([10, 1000, 4000]) + raw[at:],
        ])  # fmt: skip
    return raw


def mutated_json(raw: bytes, rng: Random) -> bytes:
    """The document with a few values exchanged, dropped, moved or added; what is no JSON, as bytes."""
    try:
        content = json.loads(raw)
    except (ValueError, RecursionError):
        return mutated_bytes(raw, rng)
    for _ in range(rng.choice([1, 1, 2, 3])):
        content = _changed(content, rng)
    return json.dumps(content).encode()


def _changed(content: Any, rng: Random) -> Any:
    containers = list(_containers(content))
    if not containers:
        return copy.deepcopy(rng.choice(ODD_VALUES))
    node = rng.choice(containers)
    place = rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
    match rng.randrange(6):
        case 0:
            node[place] = copy.deepcopy(rng.choice(ODD_VALUES))
        case 1:
            del node[place]
        case 2:  # a value from elsewhere
            other = rng.choice(containers)
            node[place] = copy.deepcopy(rng.choice(list(other.values()) if isinstance(other, dict) else other))
        case 3:
            node[place] = [node[place]] * rng.choice([0, 1, 3, 200])
        case 4 if isinstance(node, dict):
            node[rng.choice(["x", "type", "\ud800", "name", str(place) + "s"])] = node[place]
        case 4:
            node.insert(place, copy.deepcopy(rng.choice(ODD_VALUES)))
        case _:
            node[place] = _other_scalar(node[place], rng)
    return content


def _other_scalar(value: Any, rng: Random) -> Any:
    """Near what was there: as likely as not it still has the right type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + rng.choice([-1, 1, 7, -value, 1 << 31, -(1 << 31), 1 << 62])
    if isinstance(value, float):
        return value * rng.choice([-1.0, 0.0, 0.5, 1e300])
    if isinstance(value, str):
        return mutated_bytes(value.encode("utf-8", "surrogatepass"), rng).decode("utf-8", "replace")
    return [value] if rng.random() < 0.5 else {"a": value}


def _containers(content: Any, depth: int = 0) -> Iterator[Any]:
    """Every object and list that has something in it; beyond a depth they are passed on as they are."""
    if isinstance(content, dict | list) and content and depth < NESTED_MAX:
        yield content
        for inner in content.values() if isinstance(content, dict) else content:
            yield from _containers(inner, depth + 1)


def behind(head_bytes: int, mutate: Mutate) -> Mutate:
    """Changes what stands behind a head of so many bytes, and now and then the head."""

    def changed(raw: bytes, rng: Random) -> bytes:
        head, rest = raw[:head_bytes], raw[head_bytes:]
        if rng.random() < 0.1 and head:
            return rng.randbytes(len(head)) + rest
        return head + mutate(rest, rng)

    return changed

"""JSON schemas before they are compiled: what is refused by name, and where in a schema a fault lies.

A keyword that would be ignored is refused instead: an output that passes for valid and is not is worse than none.
"""

import itertools
import json
import re
import time
from collections.abc import Callable, Iterator
from decimal import Decimal
from typing import Any

from sessile.errors import InvalidRequest

DEPTH_MAX = 64
"""Deepest nesting of a schema, or of brackets in any other grammar."""
NODES_MAX = 50_000
"""Most values in a schema, nested ones included."""
FORCED_CHARS_MAX = 4096
"""Longest text that leaves no choice: as long as it lasts, each mask takes a microsecond for each character left."""
QUANTIFIERS_MAX = 8192
"""Most of ?, * and { in a grammar, or in all patterns of a schema: compiling takes the square of them, a second."""
REMAINDERS_MAX = 10_000
"""Most states that all `multipleOf` of a schema take together: five milliseconds a thousand."""
_NAME_CHARS_SHOWN = 40
"""Of each name in a place: it is the client's, and there may be 64 of them."""
_LOOKS_MAX = 64
_LOOKING_S_MAX = 0.2
"""Subschemas that are tried to find the place of a fault, and how long; beyond, the place is what is known by then."""

_FOLLOWED = frozenset({
    "type", "const", "enum", "anyOf", "allOf", "oneOf", "$ref", "properties", "patternProperties",
    "additionalProperties", "required", "minProperties", "maxProperties", "items", "prefixItems", "additionalItems",
    "minItems", "maxItems", "minLength", "maxLength", "pattern", "format", "minimum", "maximum", "exclusiveMinimum",
    "exclusiveMaximum", "multipleOf",
})  # fmt: skip
"""Keywords that outputs follow."""
_NOTES = frozenset({
    "$schema", "$id", "id", "$anchor", "$comment", "$defs", "definitions", "$vocabulary", "title", "description",
    "default", "example", "examples", "deprecated", "readOnly", "writeOnly", "contentEncoding", "contentMediaType",
    "contentSchema", "discriminator",
})  # fmt: skip
"""Keywords that say nothing about what is valid, or only name schemas."""
_MAPS = ("properties", "patternProperties", "$defs", "definitions")
_LISTS = ("anyOf", "allOf", "oneOf", "prefixItems")
_SINGLES = ("items", "additionalItems", "additionalProperties")

_CLOSED = re.compile(r"(?:\\.|\[(?:\\.|[^\]\\])*+\]|[^\[\\])*+", re.DOTALL)
"""Of a regular expression, all up to a class that does not end, which is looked for once and not at every bracket."""
_PARTS = re.compile(r"\\.|\[(?:\\.|[^\]\\])*+\]|\{(?P<least>\d{1,9})(?:,\d*)?\}|.", re.DOTALL)
"""An escape, a class of characters, a count, or a single character."""
_OPEN_PARTS = re.compile(r"\\.|\{(?P<least>\d{1,9})(?:,\d*)?\}|.", re.DOTALL)
"""The same behind there."""

Place = tuple[str, Any]
"""A JSON pointer as a fragment, "#/properties/name", and the schema there."""


def checked_schema(source: str, field: str) -> Any:
    """The schema in this text. Raises InvalidRequest that names the field and the place in it."""
    try:
        schema = json.loads(source, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise InvalidRequest(f"{field}: not valid JSON at {where}: {error.msg}", param=field) from None
    except (RecursionError, ValueError) as error:
        what = "nested too deeply" if isinstance(error, RecursionError) else f"not valid JSON: {error}"
        raise InvalidRequest(f"{field}: {what}", param=field) from None
    check_schema(schema, field)
    return schema


def check_schema(schema: Any, field: str, *, ignores: bool = False) -> None:
    """Raise InvalidRequest that names the field and the place in the schema. ignores: keywords that no output follows
    are none of its faults, but all bounds hold.
    """
    _check_size(schema, field)
    _check_letters(schema, field)
    remainders = quantifiers = 0
    for place, part in walk(schema):
        if isinstance(part, dict):
            if not ignores:
                _check_keywords(place, part, field)
            _check_texts(place, part, field)
            quantifiers += sum(map(quantifiers_of, _patterns_of(part)))
            if quantifiers > QUANTIFIERS_MAX:
                raise InvalidRequest(f"{field}: patterns with more than {QUANTIFIERS_MAX} of ?, * and {{", param=field)
            remainders += _remainders_of(part.get("multipleOf"))
            if remainders > REMAINDERS_MAX:
                limit = f"multipleOf may have {REMAINDERS_MAX} as its digits, in all of the schema together"
                raise InvalidRequest(f"{field}: at {place}: {limit}", param=field)
        elif not isinstance(part, bool):
            raise InvalidRequest(f"{field}: at {place}: a schema must be an object, true or false", param=field)


def walk(schema: Any, place: str = "#") -> Iterator[Place]:
    """The schema and all within it, outermost first; what a `$ref` names is visited where it stands."""
    waiting = [(place, schema)]
    while waiting:
        here = waiting.pop()
        yield here
        waiting.extend(reversed(list(children(*here))))


def children(place: str, schema: Any) -> Iterator[Place]:
    """The schemas right below this one."""
    if not isinstance(schema, dict):
        return
    for keyword in _MAPS:
        if isinstance(named := schema.get(keyword), dict):
            yield from ((f"{place}/{keyword}/{_escaped(name)}", part) for name, part in named.items())
    for keyword in (*_LISTS, *_SINGLES):
        if isinstance(parts := schema.get(keyword), list):
            yield from ((f"{place}/{keyword}/{index}", part) for index, part in enumerate(parts))
        elif keyword in _SINGLES and keyword in schema:
            yield f"{place}/{keyword}", parts


def place_of_fault(schema: Any, fault: str, fault_of: Callable[[Any], str]) -> str:
    """The innermost schema that has this fault by itself. fault_of: what is wrong with a schema; empty if nothing."""
    place, looks, until_s = "#", 0, time.perf_counter() + _LOOKING_S_MAX
    own = schema if isinstance(schema, dict) else {}
    definitions = {name: own[name] for name in ("$defs", "definitions") if name in own}
    here: Any = schema
    while True:
        for inner, part in children(place, here):
            looks += 1
            if looks > _LOOKS_MAX or time.perf_counter() > until_s:
                return place
            if fault_of({**definitions, **part} if isinstance(part, dict) else part) == fault:
                place, here = inner, part
                break
        else:
            return place


def _check_size(schema: Any, field: str) -> None:
    waiting = [(schema, 1)]
    nodes = 0
    while waiting:
        value, depth = waiting.pop()
        nodes += 1
        if depth > DEPTH_MAX:
            raise InvalidRequest(f"{field}: nested more than {DEPTH_MAX} deep", param=field)
        if nodes > NODES_MAX:
            raise InvalidRequest(f"{field}: more than {NODES_MAX} values", param=field)
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        waiting.extend((each, depth + 1) for each in inner)


def _check_letters(schema: Any, field: str) -> None:
    """Refuse half a surrogate pair, which JSON can spell and no output can say, nor any message about it."""
    try:
        json.dumps(schema, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise InvalidRequest(f"{field}: half a surrogate pair, which is no character", param=field) from None


def _check_keywords(place: str, schema: dict[str, Any], field: str) -> None:
    for keyword in schema:
        is_known = keyword in _FOLLOWED or keyword in _NOTES
        if not is_known and (not keyword.startswith("x-") or keyword == "x-guidance"):
            raise InvalidRequest(f"{field}: at {place}: keyword {keyword[:64]!r} is not supported", param=field)


def _check_texts(place: str, schema: dict[str, Any], field: str) -> None:
    """Bound what must be said as it stands: constants, names of properties, patterns without choice."""
    pattern = schema.get("pattern")
    texts = [schema.get("const"), *_listed(schema.get("enum")), *_listed(schema.get("required"))]
    texts += list(names) if isinstance(names := schema.get("properties"), dict) else []
    if any(len(text) > FORCED_CHARS_MAX for text in texts if isinstance(text, str)):
        raise InvalidRequest(f"{field}: at {place}: a text has more than {FORCED_CHARS_MAX} characters", param=field)
    if isinstance(pattern, str) and least_length(pattern) > FORCED_CHARS_MAX:
        limit = f"a pattern asks for more than {FORCED_CHARS_MAX} characters"
        raise InvalidRequest(f"{field}: at {place}: {limit}", param=field)


def quantifiers_of(text: str) -> int:
    """How many there may be, escaped ones included."""
    return sum(map(text.count, "?*{"))


def _patterns_of(schema: dict[str, Any]) -> list[str]:
    named = schema.get("patternProperties")
    patterns = [schema.get("pattern"), *(named if isinstance(named, dict) else ())]
    return [pattern for pattern in patterns if isinstance(pattern, str)]


def least_length(pattern: str) -> int:
    """Characters that a regular expression asks for at least, about: an upper bound, as escapes count in full."""
    # The longest alternative so far, the length of this one, and that of its last part; the first two of the groups
    # around as plain numbers, since a list for each of 60,000 parentheses has the collector go over all of the heap.
    longest = length = last = 0
    around: list[int] = []
    found = _CLOSED.match(pattern)
    end = found.end() if found else 0
    for part in itertools.chain(_PARTS.finditer(pattern, 0, end), _OPEN_PARTS.finditer(pattern, end)):
        text = part[0]
        if text == "(":
            around += longest, length
            longest = length = last = 0
        elif text == "|":
            longest, length, last = max(longest, length), 0, 0
        elif text == ")" and around:
            last = max(longest, length)
            length, longest = around.pop() + last, around.pop()
        elif part["least"] is not None:
            length, last = length + last * (int(part["least"]) - 1), last * int(part["least"])
        elif text in "?*":
            length, last = length - last, 0
        elif text != "+":
            length, last = length + 1, 1
    return max(longest, length, *around)


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _remainders_of(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return 0
    digits = Decimal(str(value)).as_tuple().digits
    return int("".join(map(str, digits)).rstrip("0") or "0")


def _escaped(name: str) -> str:
    name = name if len(name) <= _NAME_CHARS_SHOWN else name[: _NAME_CHARS_SHOWN - 1] + "…"
    return name.replace("~", "~0").replace("/", "~1")


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")

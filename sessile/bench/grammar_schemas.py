"""Forty JSON schemas of many kinds, for the bench of grammars and for checks that outputs are valid under them.

Every string, number and list has a bound, so that a small model comes to an end.
"""

from typing import Any

Schema = dict[str, Any]


def _object(required: Any = None, **properties: Any) -> Schema:
    """A closed object; all properties are required unless said otherwise."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties) if required is None else required,
        "additionalProperties": False,
    }


def _text(longest: int = 24, **more: Any) -> Schema:
    return {"type": "string", "maxLength": longest, **more}


def _whole(low: int, high: int) -> Schema:
    return {"type": "integer", "minimum": low, "maximum": high}


def _list(items: Schema, most: int, least: int = 0) -> Schema:
    return {"type": "array", "items": items, "minItems": least, "maxItems": most}


_POINT = _object(x=_whole(-100, 100), y=_whole(-100, 100))
_PERSON = _object(name=_text(), age=_whole(0, 120))
_FLAG: Schema = {"type": "boolean"}

SCHEMAS: dict[str, Schema] = {
    "person": _PERSON,
    "person with optional fields": _object(["name"], name=_text(), email=_text(30), vip=_FLAG),
    "flat record of ten": _object(**{f"field_{n}": _whole(0, 9) for n in range(10)}),
    "flags": _object(a=_FLAG, b=_FLAG, c={"type": "null"}),
    "one of three words": {"enum": ["red", "green", "blue"]},
    "enum of mixed types": {"enum": [1, "one", None, True, [1, 2], {"k": "v"}]},
    "constant": {"const": {"kind": "ping", "version": 2}},
    "whole number": _whole(10, 99_999),
    "negative numbers": _list(_whole(-50, -1), 5, 2),
    "number between": {"type": "number", "minimum": 0, "maximum": 1, "multipleOf": 0.01},
    "exclusive bounds": {"type": "integer", "exclusiveMinimum": 0, "exclusiveMaximum": 10},
    "multiples of seven": {"type": "integer", "minimum": 0, "maximum": 700, "multipleOf": 7},
    "short text": _text(12, minLength=3),
    "text by pattern": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{4}$"},
    "version number": {"type": "string", "pattern": r"^\d{1,2}\.\d{1,2}\.\d{1,2}$"},
    "date": {"type": "string", "format": "date"},
    "duration": {"type": "string", "format": "duration", "maxLength": 24},
    "uuid": {"type": "string", "format": "uuid"},
    "IPv4 address": {"type": "string", "format": "ipv4"},
    "list of words": _list(_text(10), 4, 1),
    "list of enums": _list({"enum": ["low", "mid", "high"]}, 6, 2),
    "matrix": _list(_list(_whole(0, 9), 3, 3), 3, 3),
    "pair": {"type": "array", "prefixItems": [_text(8), _whole(0, 9)], "items": False, "minItems": 2},
    "list of objects": _list(_POINT, 3, 1),
    "nested five deep": _object(a=_object(b=_object(c=_object(d=_object(e=_whole(0, 9)))))),
    "either text or number": {"anyOf": [_text(10), _whole(0, 99)]},
    "either of two objects": {"anyOf": [_PERSON, _POINT]},
    "one of two kinds": {
        "oneOf": [
            _object(kind={"const": "circle"}, radius=_whole(1, 9)),
            _object(kind={"const": "square"}, side=_whole(1, 9)),
        ]
    },
    "all of two": {"allOf": [_whole(0, 1000), {"minimum": 100, "multipleOf": 5}]},
    "nullable": _object(
        name={"type": ["string", "null"], "maxLength": 10},
        count={"type": ["integer", "null"], "maximum": 9, "minimum": 0},
    ),
    "definitions": {
        **_object(home={"$ref": "#/$defs/point"}, work={"$ref": "#/$defs/point"}),
        "$defs": {"point": _POINT},
    },
    "tree": {
        "$ref": "#/$defs/node",
        "$defs": {
            "node": {
                "type": "object",
                "properties": {
                    "value": _whole(0, 9),
                    "leaf": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/tip"}]},
                },
                "required": ["value", "leaf"],
                "additionalProperties": False,
            },
            "tip": _object(value=_whole(0, 9)),
        },
    },
    "keys by pattern": {
        "type": "object",
        "patternProperties": {"^k[0-9]$": _whole(0, 9)},
        "properties": {"id": _whole(1, 9)},
        "required": ["id"],
        "maxProperties": 4,
        "additionalProperties": False,
    },
    "free values": _object(
        id=_whole(1, 9),
        value={"type": ["string", "integer", "boolean", "null"], "maxLength": 8, "minimum": 0, "maximum": 9},
    ),
    "text with quotes": _object(quote={"type": "string", "pattern": r'^"[a-z]{1,8}"$'}),
    "keys that need escapes": _object(**{'a "b"': _whole(0, 9), "c\\d": _FLAG, "e/f~g": _FLAG}),
    "words of other scripts": _object(größe=_whole(0, 9), 名前={"enum": ["猫", "犬", "鳥"]}, ключ=_FLAG),
    "tool call": _object(
        name={"enum": ["get_weather", "get_time"]},
        arguments=_object(["city"], city=_text(16), unit={"enum": ["C", "F"]}, days=_whole(1, 7)),
    ),
    "order": _object(
        id={"type": "string", "pattern": "^ORD-[0-9]{6}$"},
        customer=_PERSON,
        items=_list(_object(sku=_text(8), quantity=_whole(1, 99), price=_whole(0, 999)), 3, 1),
        paid=_FLAG,
    ),
    "review": _object(
        sentiment={"enum": ["positive", "negative", "neutral"]},
        score={"type": "number", "minimum": 0, "maximum": 10, "multipleOf": 0.5},
        reasons=_list(_text(40), 3, 1),
    ),
}  # fmt: skip

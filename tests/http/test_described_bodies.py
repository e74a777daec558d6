"""What /openapi.json says of the fields of bodies is what the server does with them."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest

from sessile.server.body import NO_EFFECT
from tests.http.conftest import Running
from tests.http.test_described import PATHS

Schema = dict[str, Any]
Wrap = Callable[[Any], Any]
"""A value that a place in a body may have → the body with it."""

BODIES = [
    (path, operation["post"]["requestBody"]["content"]["application/json"]["schema"])
    for path, operation in PATHS.items()
    if "requestBody" in operation.get("post", {})
]


def least(schema: Schema) -> Any:
    """A value that the schema allows, with no more in it than must be."""
    if "const" in schema or "enum" in schema:
        return schema.get("const", schema.get("enum", [None])[0])
    if "anyOf" in schema:
        return least(schema["anyOf"][0])
    match schema.get("type"):
        case "object":
            return {name: least(schema["properties"][name]) for name in schema.get("required", ())}
        case "array":
            return [least(schema["items"])] * schema.get("minItems", 0)
        case "string":
            return "a" * max(schema.get("minLength", 0), 1)
        case "integer" | "number":
            return max(schema.get("minimum", 1), 1)
        case "boolean":
            return False
        case kind:
            assert kind in (None, "null"), f"no value of type {kind}"
            return None


def objects(schema: Schema, wrap: Wrap = lambda body: body, path: str = "") -> Iterator[tuple[Schema, Wrap, str]]:
    """Every object that a body may be or have in it, however deep, with the way to put one there and its path."""
    for choice in schema.get("anyOf", ()):
        yield from objects(choice, wrap, path)
    if isinstance(schema.get("items"), dict):
        yield from objects(schema["items"], lambda value: wrap([value]), f"{path}0.")
    if schema.get("type") == "object":
        yield schema, wrap, path
        for name, field in schema.get("properties", {}).items():
            around = partial(_with_field, wrap, least(schema), name)
            yield from objects(field, around, f"{path}{name}.")


def _with_field(wrap: Wrap, around: Schema, name: str, value: Any) -> Any:
    return wrap({**around, name: value})


def refusal(server: Running, path: str, body: Any) -> str:
    """What a body is refused with, if it is."""
    reply = server.client.post(path.replace("{", "").replace("}", ""), json=body)
    assert reply.status_code < 500, reply.text
    content = reply.json() if reply.content else {}
    if not isinstance(content, dict):
        return ""
    return content["error"]["message"] if "error" in content else content.get("message", "")


def test_there_are_bodies_with_objects_in_them() -> None:
    assert len(BODIES) >= 20
    assert sum(len(list(objects(schema))) for _, schema in BODIES) > 2 * len(BODIES)


@pytest.mark.parametrize(("path", "schema"), BODIES, ids=[path for path, _ in BODIES])
def test_a_field_that_is_not_described_is_refused_by_name_unless_any_is_allowed(
    server: Running, path: str, schema: Schema
) -> None:
    for place, wrap, inner in objects(schema):
        told = refusal(server, path, wrap({**least(place), "unheard_of": "a"}))
        is_refused = told == f"{inner}unheard_of: unknown field"
        assert is_refused == (place.get("additionalProperties") is False), told


@pytest.mark.parametrize(("path", "schema"), BODIES, ids=[path for path, _ in BODIES])
def test_every_field_that_is_described_is_known(server: Running, path: str, schema: Schema) -> None:
    for place, wrap, _ in objects(schema):
        for name, field in place.get("properties", {}).items():
            values = [least(field)] if NO_EFFECT not in field else field.get("enum", [{"a": 1}])
            for value in values:
                told = refusal(server, path, wrap({**least(place), name: value}))
                assert f"{name}: unknown field" not in told and f"{name}: not supported" not in told, told

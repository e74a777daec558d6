"""What /openapi.json says of the fields of bodies is what the server does with them."""

import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest

from sessile.server.body import NO_EFFECT
from sessile.server.message_schemas import NULL
from tests.http.conftest import Running
from tests.http.test_described import PATHS

pytestmark = pytest.mark.long

Schema = dict[str, Any]
Wrap = Callable[[Any], Any]
"""A value that a place in a body may have → the body with it."""

CLOSED = (False, NULL)
"""What additionalProperties says where a field that nobody defines is refused, whatever it is or unless it is null."""
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
            fields = {name: least(schema["properties"][name]) for name in schema.get("required", ())}
            return fields | {"model": "default"} if "model" in fields else fields
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
    if "{conversation}" in path:
        path = path.replace("{conversation}", server.client.post("/v1/conversations", json={}).json()["id"])
    reply = server.client.post(path.replace("{", "").replace("}", ""), json=body)
    assert reply.status_code < 500, reply.text
    if reply.status_code < 400:
        return ""
    content = reply.json()
    return content.get("error", content)["message"]


def is_unknown(place: str, told: str) -> bool:
    """Whether a refusal says that nobody defines the field at a place, however the surface writes places."""
    told = re.sub(r"\[(\d+)\]", r".\1", told)
    return re.match(re.escape(place) + ":? (unknown field|(is )?not supported)", told) is not None


def test_there_are_bodies_with_objects_in_them() -> None:
    assert len(BODIES) >= 20
    assert sum(len(list(objects(schema))) for _, schema in BODIES) > 2 * len(BODIES)


@pytest.mark.parametrize(("path", "schema"), BODIES, ids=[path for path, _ in BODIES])
def test_a_field_that_is_not_described_is_refused_by_name_unless_any_is_allowed(
    server: Running, path: str, schema: Schema
) -> None:
    for place, wrap, inner in objects(schema):
        told = refusal(server, path, wrap({**least(place), "unheard_of": "a"}))
        assert is_unknown(f"{inner}unheard_of", told) == (place.get("additionalProperties") in CLOSED), (inner, told)


@pytest.mark.parametrize(("path", "schema"), BODIES, ids=[path for path, _ in BODIES])
def test_every_field_that_is_described_is_known(server: Running, path: str, schema: Schema) -> None:
    for place, wrap, inner in objects(schema):
        for name, field in place.get("properties", {}).items():
            values = [least(field)] if NO_EFFECT not in field else field.get("enum", [{"a": 1}])
            for value in values:
                told = refusal(server, path, wrap({**least(place), name: value}))
                assert not is_unknown(f"{inner}{name}", told), told


@pytest.mark.parametrize(("path", "schema"), BODIES, ids=[path for path, _ in BODIES])
def test_where_other_fields_may_be_null_they_are_taken_for_absent(server: Running, path: str, schema: Schema) -> None:
    for place, wrap, inner in objects(schema):
        if place.get("additionalProperties") == NULL:
            told = refusal(server, path, wrap({**least(place), "unheard_of": None}))
            assert not is_unknown(f"{inner}unheard_of", told), told

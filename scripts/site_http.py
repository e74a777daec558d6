"""The page of the documentation site that describes every route field by field, from the application's OpenAPI."""

import importlib
import inspect
import json
import re
from collections.abc import Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

from sessile.server.app import create_app
from sessile.server.body import NO_EFFECT
from sessile.server.config import ServerOptions

GUIDE = Path(__file__).resolve().parents[1] / "docs" / "HTTP.md"

INTRODUCTION = """\
# HTTP, field by field

Every route that is served, with its fields, types and limits, as the server checks them. [HTTP](HTTP.md) says what they
mean together. A running server has the same as `/openapi.json`, and to try out at `/docs`.

A field is optional unless it says *required*, and `null` is the same as leaving it out. Another type, a value beyond a
limit and a field that nobody defines are refused by name.
"""

PROPER_NAMES = {"Openai": "OpenAI"}

Schema = Mapping[str, Any]
Field = tuple[str, Schema, bool]
"""Name, schema, and whether it is required."""


def render() -> str:
    """The page as Markdown."""
    app = create_app(NotImplemented, NotImplemented, ServerOptions())  # type: ignore[arg-type]  # nothing is served
    description = app.openapi()
    definitions = description.get("components", {}).get("schemas", {})
    operations = [
        (operation.get("tags", ["app"])[0], Route(method.upper(), path, operation, definitions))
        for path, methods in description["paths"].items() for method, operation in methods.items()
    ]  # fmt: skip
    parts = [INTRODUCTION]
    for tag, members in groupby(operations, key=lambda tagged: tagged[0]):
        parts.append(f"## {heading(tag)}\n\n{told(tag)}\n")
        parts += [route.render() for _, route in members]
    return "\n".join(parts)


def heading(tag: str) -> str:
    """A heading for the routes of a module, whose name the tag is."""
    name = re.sub(r"[._]", " ", tag).capitalize()
    return PROPER_NAMES.get(name, name)


def told(tag: str) -> str:
    """What the module says of itself."""
    module = importlib.import_module(f"sessile.server.{tag}")
    if hasattr(module, "__path__"):  # a package has its routes, and what is to be said of them, in a module of its own
        module = importlib.import_module(f"{module.__name__}.routes")
    return re.sub(r" \(docs/HTTP\.md\)", "", inspect.cleandoc(module.__doc__ or ""))


class Route:
    """One method of one path."""

    def __init__(self, method: str, path: str, operation: Schema, definitions: Mapping[str, Schema]) -> None:
        self._name = f"{method} {path}"
        self._operation = operation
        self._definitions = definitions

    def render(self) -> str:
        """The route's section."""
        anchor = re.sub(r"\W+", "-", self._name.lower()).strip("-")
        parts = [f"### `{self._name}` {{ #{anchor} }}", self._description()]
        parameters = self._operation.get("parameters", [])
        if parameters:
            rows = [(f"`{each['name']}`, in the {each['in']}", each["schema"], each["required"]) for each in parameters]
            parts.append(self._table("parameter", rows))
        for kind, content in self._operation.get("requestBody", {}).get("content", {}).items():
            schema = self._resolved(content.get("schema", {}))
            fields = list(self._fields(schema))
            parts.append(f"Body, `{kind}`:" if fields else f"Body, `{kind}`: {self._type(schema)}.")
            parts.append(self._table("field", fields) if fields else "")
            parts += [tolerated(each, path) for each, path in self._bodies(schema)]
        parts.append(self._answers())
        return "\n\n".join(part for part in parts if part) + "\n"

    def _description(self) -> str:
        """What the handler says of itself, or the guide of it."""
        said = self._operation.get("description") or guide().get(self._name, "")
        return re.sub(r"\s*\n\s*", " ", said[:1].upper() + said[1:])

    def _answers(self) -> str:
        """What a success says; errors are the same on all routes of a surface, and described in the guide."""
        told = []
        for status, answer in self._operation.get("responses", {}).items():
            for kind, content in answer.get("content", {}).items() if status.startswith("2") else ():
                schema = self._resolved(content.get("schema", {}))
                names = [f"`{name}`" for name in schema.get("properties", {})]
                says = f"an object with {', '.join(names)}" if names else self._type(schema)
                told.append(f"Answer {status}, `{kind}`: {'events' if kind == 'text/event-stream' else says}.")
        return "\n\n".join(told)

    def _fields(self, schema: Schema, path: str = "", above: tuple[str, ...] = ()) -> Iterator[Field]:
        """Every field of an object and of the objects in it."""
        required = schema.get("required", [])
        for name, field in schema.get("properties", {}).items():
            if NO_EFFECT in field:
                continue
            yield f"`{path}{name}`", field, name in required
            for inner, suffix in self._objects(field):
                title = inner.get("title", "")
                if title not in above:
                    yield from self._fields(inner, f"{path}{name}{suffix}.", (*above, title))

    def _bodies(self, schema: Schema, path: str = "", above: tuple[str, ...] = ()) -> Iterator[tuple[Schema, str]]:
        """The schema of a body and those of the objects in it, each with where it is."""
        title = schema.get("title", "")
        yield schema, path
        for name, field in schema.get("properties", {}).items():
            for inner, suffix in self._objects(field):
                if inner.get("title", "") not in (*above, title):
                    yield from self._bodies(inner, f"{path}{name}{suffix}.", (*above, title))

    def _objects(self, schema: Schema, suffix: str = "") -> Iterator[tuple[Schema, str]]:
        """The objects with fields of their own that a value may be or hold; [] for each list that they are in."""
        schema = self._resolved(schema)
        if "properties" in schema:
            yield schema, suffix
        for choice in schema.get("anyOf", schema.get("oneOf", ())):
            yield from self._objects(choice, suffix)
        if isinstance(schema.get("items"), Mapping):
            yield from self._objects(schema["items"], suffix + "[]")

    def _table(self, head: str, rows: list[Field]) -> str:
        lines = [f"| {head} | type | |", "|---|---|---|"]
        for name, schema, is_required in rows:
            default = schema.get("default")
            absent = "" if default is None else f"`{json.dumps(default)}` if not given"
            remarks = ["*required*" if is_required else absent, cell(self._resolved(schema).get("description", ""))]
            lines.append(f"| {name} | {self._type(schema)} | {'. '.join(filter(None, remarks))} |")
        return "\n".join(lines)

    def _resolved(self, schema: Schema) -> Schema:
        """The schema that a reference names, or itself."""
        name = schema.get("$ref", "").rpartition("/")[2]
        return {**self._definitions[name], "title": name} if name else schema

    def _type(self, schema: Schema) -> str:
        """A schema in words: what a value may be, and its limits."""
        schema = self._resolved(schema)
        choices = schema.get("anyOf", schema.get("oneOf"))
        if choices:
            return " or ".join(dict.fromkeys(self._type(each) for each in choices if each.get("type") != "null"))
        if "enum" in schema or "const" in schema:
            return " or ".join(f'`"{value}"`' for value in schema.get("enum", [schema.get("const")]))
        match schema.get("type"):
            case "integer" | "number" as kind:
                return f"{kind}{bounds(schema)}"
            case "string":
                return f"string{counted(schema, 'Length', 'characters')}"
            case "array":
                items = grouped(self._type(schema["items"])) if schema.get("items") else "anything"
                return f"list of {items}{counted(schema, 'Items', 'of them')}"
            case "object":
                values = schema.get("additionalProperties")
                if isinstance(values, Mapping) and values and values.get("type") != "null":
                    return f"object of {grouped(self._type(values))}"
                return "object"
            case None:
                return "anything"
            case kind:
                return str(kind)


def grouped(words: str) -> str:
    """A type inside another, in brackets where it says more than a word."""
    return f"({words})" if " " in words else words


def bounds(schema: Schema) -> str:
    """The range of a number."""
    low, above = schema.get("minimum"), schema.get("exclusiveMinimum")
    high, below = schema.get("maximum"), schema.get("exclusiveMaximum")
    if low is not None and high is not None:
        return f", {number(low)} … {number(high)}"
    limits = [("≥", low), (">", above), ("≤", high), ("<", below)]
    return "".join(f", {sign} {number(limit)}" for sign, limit in limits if limit is not None)


def number(value: float) -> str:
    """A limit as one would write it: powers of two as such."""
    whole = int(value)
    if whole != value:
        return str(value)
    size = abs(whole)
    sign = "−" if whole < 0 else ""
    if size >= 1 << 16 and size & (size - 1) == 0:
        return f"{sign}2<sup>{size.bit_length() - 1}</sup>"
    if size >= 1 << 16 and size & (size + 1) == 0:
        return f"{sign}(2<sup>{size.bit_length()}</sup> − 1)" if sign else f"2<sup>{size.bit_length()}</sup> − 1"
    return f"{sign}{size:,}"


def counted(schema: Schema, what: str, unit: str) -> str:
    """The bounds of a length."""
    low, high = schema.get(f"min{what}"), schema.get(f"max{what}")
    if low is None and high is None:
        return ""
    shown = f"{low} … {high}" if low is not None and high is not None else f"≥ {low}" if high is None else f"≤ {high}"
    return f", {shown} {unit}"


def cell(text: str) -> str:
    """Text that fits a cell of a table."""
    return re.sub(r"\s+", " ", text).replace("|", "\\|").strip()


def guide() -> dict[str, str]:
    """What the tables of docs/HTTP.md say of each route."""
    return dict(re.findall(r"^\| `([A-Z]+ /[^`]*)` \| (.*) \|$", GUIDE.read_text("utf-8"), re.MULTILINE))


def tolerated(schema: Schema, path: str) -> str:
    """The fields that a body accepts without effect. path: what stands before each field's name."""
    fields = {name: field for name, field in schema.get("properties", {}).items() if NO_EFFECT in field}
    always = [f"`{path}{name}`" for name, field in fields.items() if "enum" not in field]
    off = [shown_off(f"{path}{name}", field["enum"]) for name, field in fields.items() if "enum" in field]
    parts = []
    if always:
        parts.append(f"Accepted without effect: {', '.join(always)}.")
    if off:
        parts.append(f"Accepted as `null` or at the value that asks for nothing: {', '.join(off)}.")
    return " ".join(parts)


def shown_off(name: str, values: list[Any]) -> str:
    """A field and the values at which it has no effect, beside null."""
    told = [f"`{json.dumps(value)}`" for value in values if value is not None]
    return f"`{name}`" + (f" ({', '.join(told)})" if told else "")

"""Reading and checking a request body: limits while it is read, types and ranges as pydantic models.

A body is parsed and checked in one pass, strictly: no number in a string, no bool for an int, no NaN, and no field
that nobody defines. The first fault becomes an InvalidRequest that names the field.
"""

import asyncio
import re
from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar, Self, TypeVar

from pydantic import (
    AliasChoices,
    BaseModel,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, ErrorDetails, PydanticCustomError
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sessile.errors import InvalidRequest, TooLong

SUBJECT = re.compile(r"^\w+ should\b")
"""How pydantic's messages begin (Input should, String should, List should …), where ours name the field instead."""

NAME_CHARS_MAX = 100
"""Most that is repeated of a field's name: it is the client's, and may be as long as the body."""

THREAD_BYTES = 32_768
"""Parsing or tokenising more than this goes to a thread, so that it does not hold up the streams of others."""

ANYTHING = None
"""For Body.tolerated: the field means nothing here, whatever its value."""

Tolerated = Mapping[str, tuple[Any, ...] | None]
"""Field → values at which it has no effect, or ANYTHING."""
NO_EFFECT = "x-no-effect"
"""What marks such a field in the OpenAPI."""


class BodyTooLarge(TooLong):
    """The request body is over the limit; code differs from a prompt that is too long."""

    code = "body_too_large"


class BodyLimit:
    """ASGI middleware that refuses a body over the limit as soon as that is known: announced, or while reading."""

    def __init__(self, app: ASGIApp, *, bytes_max: int, is_streamed: Callable[[Scope], bool]) -> None:
        """is_streamed: whether the route reads the body in portions and has a bound of its own."""
        self._app = app
        self._bytes_max = bytes_max
        self._is_streamed = is_streamed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or self._is_streamed(scope):
            await self._app(scope, receive, send)
            return
        announced = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        read_bytes = 0

        async def limited_receive() -> Message:
            nonlocal read_bytes
            if int(announced) > self._bytes_max:
                raise self._refusal()
            message = await receive()
            if message["type"] == "http.request":
                read_bytes += len(message.get("body", b""))
                if read_bytes > self._bytes_max:
                    raise self._refusal()
            return message

        await self._app(scope, limited_receive, send)

    def _refusal(self) -> BodyTooLarge:
        return BodyTooLarge(f"the request body is over the limit of {self._bytes_max} bytes")


class Body(BaseModel):
    """Base of all bodies and of the objects in them.

    tolerated: fields of the APIs we are compatible with that are accepted at the listed values (or null) and have no
    effect, at any value if that is ANYTHING. Every other value, and every other field, is refused by name.
    """

    model_config = ConfigDict(
        strict=True, extra="allow", allow_inf_nan=False, frozen=True,
        use_attribute_docstrings=True,  # what stands below a field describes it in the OpenAPI, too
    )  # fmt: skip
    tolerated: ClassVar[Tolerated] = {}

    @model_validator(mode="after")
    def _refuse_other_fields(self) -> Self:
        for name, value in (self.model_extra or {}).items():
            if name not in self.tolerated:
                raise field_fault(name, "unknown field")
            accepted = self.tolerated[name]
            # 0 == False and 1 == True in Python, but not in JSON.
            if value is None or accepted is ANYTHING or any(value == a and type(value) is type(a) for a in accepted):
                continue
            raise field_fault(name, "not supported by this server")
        return self

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """The same for whoever reads the description: every field that is accepted, and no other."""
        described = handler(core_schema)
        schema = handler.resolve_ref_schema(described)
        fields = schema.setdefault("properties", {})
        for field in cls.model_fields.values():
            names = field.validation_alias.choices if isinstance(field.validation_alias, AliasChoices) else []
            fields |= {name: fields[names[0]] for name in names[1:]}
        for name, values in cls.tolerated.items():
            fields.setdefault(name, _without_effect(values))
        schema["additionalProperties"] = False
        return described


def _without_effect(values: tuple[Any, ...] | None) -> dict[str, Any]:
    """A field that is accepted without effect, in the OpenAPI."""
    accepted: dict[str, Any] = {} if values is ANYTHING else {"enum": [*values, None]}
    return {**accepted, "description": "Accepted without effect.", NO_EFFECT: True}


def shortened(text: str) -> str:
    """What is repeated of a text that a client chose."""
    return text if len(text) <= NAME_CHARS_MAX else text[: NAME_CHARS_MAX - 1] + "…"


def field_fault(field: str, message: str) -> PydanticCustomError:
    """What a model's own validator raises for one of its fields."""
    return PydanticCustomError("field", "{message}", {"field": field, "message": message})


AnyBody = TypeVar("AnyBody", bound=Body)


def says(message: str) -> WrapValidator:
    """Annotation: report any fault of the value with this one message, where pydantic would list a union's branches.

    But for a field of an object in it that is at fault by itself, such as an unknown one: that is named.
    """

    def validate(value: Any, check: ValidatorFunctionWrapHandler) -> Any:
        try:
            return check(value)
        except ValidationError as error:
            for fault in error.errors(include_url=False):
                if fault["type"] == "field":
                    inner = [str(part) for part in fault["loc"][1:]]  # the first names the branch
                    raise field_fault(".".join([*inner, fault["ctx"]["field"]]), fault["ctx"]["message"]) from None
            raise PydanticCustomError("value", "{message}", {"message": message}) from None

    return WrapValidator(validate)


TokenIds = Annotated[list[Annotated[int, Field(ge=0, lt=1 << 31)]], says("must be a list of token ids, integers ≥ 0")]


async def read_body(request: Request, model: type[AnyBody]) -> AnyBody:
    """The request's JSON body as a checked model, whatever its content type. Raises InvalidRequest or BodyTooLarge."""
    check_coding(request)
    raw = await request.body()
    if len(raw) > THREAD_BYTES:
        return await asyncio.to_thread(parse_body, raw, model)
    return parse_body(raw, model)


def check_coding(request: Request) -> None:
    """Raise InvalidRequest for a compressed body."""
    coding = request.headers.get("content-encoding", "identity")
    if coding != "identity":
        raise InvalidRequest(f"content-encoding: send the body as it is; {shortened(repr(coding))} is not supported")


def parse_body(raw: bytes, model: type[AnyBody]) -> AnyBody:
    """The JSON text as a checked model. Raises InvalidRequest naming the first field at fault."""
    try:
        return model.model_validate_json(raw)
    except ValidationError as error:
        raise _refusal(error.errors(include_url=False)[0]) from None


def _refusal(fault: ErrorDetails) -> InvalidRequest:
    path = ".".join(str(part) for part in fault["loc"])
    message = fault["msg"]
    if fault["type"] == "json_invalid":
        return InvalidRequest("the body is not valid JSON: " + message.removeprefix("Invalid JSON: "))
    if fault["type"] == "field":
        path = f"{path}.{fault['ctx']['field']}" if path else fault["ctx"]["field"]
    elif fault["type"] == "value_error":
        message = message.removeprefix("Value error, ")
    elif fault["type"] == "missing":
        message = "is required"
    else:
        message = SUBJECT.sub("must", message)
    path = shortened(path)
    if not path:
        return InvalidRequest(f"the body {message}" if fault["type"] == "model_type" else message)
    return InvalidRequest(f"{path}: {message}{_got(fault)}", param=path)


def _got(fault: ErrorDetails) -> str:
    """The refused value, where it is a short scalar."""
    value = fault["input"]
    if fault["type"] in ("field", "missing") or isinstance(value, (dict, list, BaseModel)):
        return ""
    shown = repr(value)
    return f", got {shown}" if len(shown) <= 60 else ""


def takes(model: type[Body]) -> dict[str, Any]:
    """For a route's openapi_extra: the JSON body it reads. (The routes read it themselves, so FastAPI cannot know.)"""
    schema = model.model_json_schema()
    inlined = _inline(schema, schema.pop("$defs", {}))
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": inlined}}}}


def _inline(schema: Any, definitions: Mapping[str, Any]) -> Any:
    """The schema with every reference replaced by what it names; bodies do not refer to themselves."""
    if isinstance(schema, list):
        return [_inline(part, definitions) for part in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        return _inline(definitions[schema["$ref"].rpartition("/")[2]], definitions)
    return {name: _inline(part, definitions) for name, part in schema.items()}

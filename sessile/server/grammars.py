"""What a body may ask of the output's form: the fields of every surface, and the one grammar that they come to.

What is wrong with a grammar is found by the engine, which compiles it, and told under the field's name.
"""

import json
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AliasChoices, Field, model_validator

from sessile.contract.messages import Grammar
from sessile.server.body import ANYTHING, Body, Tolerated, field_fault, says

CHOICES_MAX = 1024
SOURCE_CHARS_MAX = 131_072
"""Longest grammar that is sent on; the engine counts bytes."""

Schema = Annotated[str | dict[str, Any] | bool, says("must be a JSON schema, or the text of one")]
Source = Annotated[str, Field(min_length=1, max_length=SOURCE_CHARS_MAX)]


class GrammarFields(Body):
    """Grammars by the names that they have in SGLang; one at most."""

    json_schema: Schema | None = None
    """The output is JSON that is valid under this schema."""
    regex: Source | None = None
    """The whole output matches this regular expression, in the syntax of Rust's regex crate."""
    ebnf: Source | None = None
    """The output is derived from the rule root of this GBNF grammar, or from start of a Lark grammar."""

    @model_validator(mode="after")
    def _check_one_grammar(self) -> Self:
        # A schema may be false: nothing is valid under it, which is for the engine to say.
        given = [name for name in self._grammar_names() if getattr(self, name) is not None]
        if len(given) > 1:
            raise field_fault(given[1], f"give {given[0]} or {given[1]}, not both")
        if self.json_schema is not None:
            _check_length("json_schema", schema_text(self.json_schema))
        return self

    def _grammar_names(self) -> tuple[str, ...]:
        return "json_schema", "regex", "ebnf"

    def grammar_in(self, place: str = "") -> Grammar | None:
        """The grammar that these fields ask for. place: what stands before their names in the body, with a dot."""
        if self.json_schema is not None:
            return Grammar("json_schema", schema_text(self.json_schema), f"{place}json_schema")
        if self.regex is not None:
            return Grammar("regex", self.regex, f"{place}regex")
        if self.ebnf is not None:
            return Grammar("ebnf", self.ebnf, f"{place}ebnf")
        return None


class NativeGrammarFields(GrammarFields):
    """Those of sampling_params."""

    json_object: bool | None = None
    """The output is a JSON object, whatever is in it."""

    def _grammar_names(self) -> tuple[str, ...]:
        names = super()._grammar_names()
        return (*names, "json_object") if self.json_object else names

    def grammar_in(self, place: str = "") -> Grammar | None:
        """See GrammarFields."""
        if self.json_object:
            return Grammar("json_object", "", f"{place}json_object")
        return super().grammar_in(place)


class NamedSchema(Body):
    """response_format.json_schema. strict: a schema is kept to the letter either way."""

    name: str | None = None
    given: Schema | None = Field(default=None, validation_alias=AliasChoices("schema"))
    strict: bool | None = None

    tolerated: ClassVar[Tolerated] = {"description": ANYTHING}

    @model_validator(mode="after")
    def _check_schema(self) -> Self:
        if self.given is None:
            raise field_fault("schema", "is required")
        _check_length("schema", schema_text(self.given))
        return self


class ResponseFormat(Body):
    """response_format of OpenAI's API."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None

    @model_validator(mode="after")
    def _check_schema(self) -> Self:
        if self.type == "json_schema" and self.json_schema is None:
            raise field_fault("json_schema", "is required")
        if self.type != "json_schema" and self.json_schema is not None:
            raise field_fault("json_schema", "needs type: json_schema")
        return self

    @property
    def grammar(self) -> Grammar | None:
        """The grammar that it asks for."""
        if self.type == "json_object":
            return Grammar("json_object", "", "response_format")
        if self.json_schema is None or self.json_schema.given is None:
            return None
        return Grammar("json_schema", schema_text(self.json_schema.given), "response_format.json_schema.schema")


class TextFormat(Body):
    """text.format of a response. strict: a schema is kept to the letter either way."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = Field(default=None, pattern=r"^[a-zA-Z0-9_-]{1,64}$")
    given: dict[str, Any] | None = Field(default=None, validation_alias="schema")
    """The JSON schema under which the output is valid."""
    strict: bool | None = None
    description: str | None = None
    """Of the format, for people; the model is not told of it."""

    @model_validator(mode="after")
    def _check_schema(self) -> Self:
        beside = {"name": self.name, "schema": self.given, "strict": self.strict, "description": self.description}
        if self.type != "json_schema":
            for name, value in beside.items():
                if value is not None:
                    raise field_fault(name, "needs type: json_schema")
            return self
        for name in ("name", "schema"):
            if beside[name] is None:
                raise field_fault(name, "is required")
        _check_length("schema", schema_text(self.given or {}))
        return self

    @property
    def shown(self) -> dict[str, Any]:
        """The format as the response shows it."""
        if self.type != "json_schema":
            return {"type": self.type}
        shown = {"name": self.name, "schema": self.given, "strict": bool(self.strict), "description": self.description}
        return {"type": self.type, **shown}


class TextSettings(Body):
    """text of a response."""

    format: TextFormat | None = None

    tolerated: ClassVar[Tolerated] = {"verbosity": ("medium",)}

    @property
    def grammar(self) -> Grammar | None:
        """The grammar that it asks for."""
        if self.format is None or self.format.type == "text":
            return None
        if self.format.given is None:
            return Grammar("json_object", "", "text.format")
        return Grammar("json_schema", schema_text(self.format.given), "text.format.schema")

    @property
    def shown(self) -> dict[str, Any]:
        """The settings as the response shows them."""
        return {"format": {"type": "text"} if self.format is None else self.format.shown, "verbosity": "medium"}


class StructuredOutputs(Body):
    """structured_outputs of vLLM; one of its fields at most."""

    given: Schema | None = Field(default=None, validation_alias=AliasChoices("json"))
    regex: Source | None = None
    grammar: Source | None = None
    choice: list[str] | None = Field(default=None, min_length=1, max_length=CHOICES_MAX)
    """The output is one of these texts."""
    json_object: bool | None = None

    tolerated: ClassVar[Tolerated] = {
        "structural_tag": (),
        "disable_fallback": ANYTHING,
        "disable_any_whitespace": (False,),
        "disable_additional_properties": (False,),
        "whitespace_pattern": (),
    }

    @model_validator(mode="after")
    def _check_one_grammar(self) -> Self:
        if sum([each is not None for each in (self.given, self.regex, self.grammar, self.choice)]) > 1:
            raise field_fault("regex", "give one of json, regex, grammar and choice")
        if self.choice is not None and not all(self.choice):
            raise field_fault("choice", "no text may be empty")
        if self.asked is not None:
            _check_length(self.asked.field.rpartition(".")[2], self.asked.source)
        return self

    @property
    def asked(self) -> Grammar | None:
        """The grammar that they ask for."""
        if self.given is not None:
            return Grammar("json_schema", schema_text(self.given), "structured_outputs.json")
        if self.regex is not None:
            return Grammar("regex", self.regex, "structured_outputs.regex")
        if self.grammar is not None:
            return Grammar("ebnf", self.grammar, "structured_outputs.grammar")
        if self.choice is not None:
            texts = " | ".join([json.dumps(text, ensure_ascii=False) for text in self.choice])
            return Grammar("lark", f"start: {texts}", "structured_outputs.choice")
        return Grammar("json_object", "", "structured_outputs.json_object") if self.json_object else None


class OpenAIGrammarFields(GrammarFields):
    """Those of OpenAI's bodies: response_format, and SGLang's and vLLM's names beside it."""

    response_format: ResponseFormat | None = None
    """The form of the output, as OpenAI has it: text, any JSON object, or JSON under a schema."""
    structured_outputs: StructuredOutputs | None = None
    """The form of the output, as vLLM has it."""

    @model_validator(mode="after")
    def _check_one_format(self) -> Self:
        names = [grammar.field.partition(".")[0] for grammar in self._asked()]
        if len(names) > 1:
            raise field_fault(names[0], f"give {names[0]} or {names[1]}, not both")
        return self

    @property
    def grammar(self) -> Grammar | None:
        """The grammar that the body asks for."""
        return next(iter(self._asked()), None)

    def _asked(self) -> list[Grammar]:
        formatted = None if self.response_format is None else self.response_format.grammar
        structured = None if self.structured_outputs is None else self.structured_outputs.asked
        return [grammar for grammar in (formatted, structured, self.grammar_in()) if grammar is not None]


def schema_text(schema: str | dict[str, Any] | bool) -> str:
    """A schema as the text of one: properties stay in their order, which outputs follow."""
    return schema if isinstance(schema, str) else json.dumps(schema, ensure_ascii=False)


def _check_length(name: str, text: str) -> None:
    if len(text) > SOURCE_CHARS_MAX:
        raise field_fault(name, f"longer than {SOURCE_CHARS_MAX} characters")

"""What each route answers, for /openapi.json: the shapes of successes, and of errors by surface.

Bodies of requests describe themselves (body.py); replies are written field by field, so their shapes stand here. A test
holds them against what is answered, and so does a fuzzer (docs/CLIENTS.md). Every field that is listed is there.
"""

from typing import Any

from fastapi import FastAPI

from sessile.server.replies import Surface

Schema = dict[str, Any]

TEXT: Schema = {"type": "string"}
FLAG: Schema = {"type": "boolean"}
COUNT: Schema = {"type": "integer", "minimum": 0}
NUMBER: Schema = {"type": "number"}
ANY_OBJECT: Schema = {"type": "object"}


def shape(**fields: Schema) -> Schema:
    """An object with at least these fields."""
    return {"type": "object", "required": list(fields), "properties": fields}


def named(kind: str) -> Schema:
    """One word and no other."""
    return {"type": "string", "const": kind}


def maybe(schema: Schema) -> Schema:
    """That, or null."""
    return {"anyOf": [schema, {"type": "null"}]}


def listed(schema: Schema) -> Schema:
    """A list of such."""
    return {"type": "array", "items": schema}


def page_of(schema: Schema, **more: Schema) -> Schema:
    """A list as OpenAI's API gives it."""
    return shape(object=named("list"), data=listed(schema), **more)


ERRORS: dict[Surface, Schema] = {
    Surface.NATIVE: shape(error=shape(message=TEXT)),
    Surface.OPENAI: shape(error=shape(message=TEXT, type=TEXT, param=maybe(TEXT), code=maybe(TEXT))),
    Surface.RESOURCES: shape(error=shape(message=TEXT, type=TEXT, param=maybe(TEXT), code=maybe(TEXT))),
    Surface.ANTHROPIC: shape(type=named("error"), error=shape(type=TEXT, message=TEXT)),
}
NATIVE_FAILURE = {"anyOf": [shape(success=FLAG, message=TEXT), ERRORS[Surface.NATIVE]]}
"""Of the native routes of corpora: a success that says false, or what is refused before it gets there."""

MODEL = shape(id=TEXT, object=named("model"), created=COUNT, owned_by=TEXT, root=TEXT, max_model_len=COUNT)
USAGE = shape(
    prompt_tokens=COUNT,
    completion_tokens=COUNT,
    total_tokens=COUNT,
    prompt_tokens_details=shape(cached_tokens=COUNT),
    completion_tokens_details=shape(reasoning_tokens=COUNT),
)
CHOICE = {"index": COUNT, "logprobs": maybe(ANY_OBJECT), "finish_reason": TEXT}
COMPLETION = shape(
    id=TEXT,
    object=named("text_completion"),
    created=COUNT,
    model=TEXT,
    choices=listed(shape(text=TEXT, **CHOICE)),
    usage=USAGE,
)
CHAT = shape(
    id=TEXT,
    object=named("chat.completion"),
    created=COUNT,
    model=TEXT,
    choices=listed(shape(message=shape(role=named("assistant"), content=maybe(TEXT)), **CHOICE)),
    usage=USAGE,
)
GENERATED = shape(
    text=TEXT,
    output_ids=listed(COUNT),
    meta_info=shape(
        id=TEXT,
        finish_reason=shape(type=TEXT),
        prompt_tokens=COUNT,
        cached_tokens=COUNT,
        completion_tokens=COUNT,
        e2e_latency=NUMBER,
    ),
)
ITEM = shape(id=TEXT, type=TEXT)
ITEMS = page_of(ITEM, first_id=TEXT, last_id=TEXT, has_more=FLAG)
RESPONSE = shape(
    id=TEXT,
    object=named("response"),
    created_at=COUNT,
    status={"enum": ["queued", "in_progress", "completed", "incomplete", "cancelled", "failed"]},
    model=TEXT,
    output=listed(ITEM),
    usage=maybe(shape(input_tokens=COUNT, input_tokens_details=shape(cached_tokens=COUNT), output_tokens=COUNT)),
)
CONVERSATION = shape(id=TEXT, object=named("conversation"), created_at=COUNT, metadata=ANY_OBJECT)
MESSAGE = shape(
    id=TEXT,
    type=named("message"),
    role=named("assistant"),
    model=TEXT,
    content=listed(shape(type=TEXT)),
    stop_reason=TEXT,
    stop_sequence=maybe(TEXT),
    usage=shape(input_tokens=COUNT, output_tokens=COUNT, cache_read_input_tokens=COUNT),
)
SESSION = shape(object=named("session"), id=TEXT, phase=TEXT, tokens=COUNT, turns=COUNT)
SIZE = shape(tokens=COUNT, bytes=COUNT)
CORPUS = shape(object=named("corpus"), id=TEXT, state=TEXT, tokens=COUNT, documents=COUNT, bytes=COUNT)
POOL = shape(object=named("pool"), page_tokens=COUNT, pages=shape(total=COUNT, free=COUNT), holders=listed(ANY_OBJECT))


def deleted(kind: str) -> Schema:
    """What says that something is gone."""
    return shape(id=TEXT, object=named(kind), deleted=FLAG)


JSON_ANSWERS: dict[str, Schema] = {
    "POST /generate": {"anyOf": [GENERATED, listed(GENERATED)]},
    "POST /open_session": TEXT,
    "GET /flush_cache": shape(success=FLAG),
    "POST /flush_cache": shape(success=FLAG),
    "GET /get_model_info": shape(model_path=TEXT, served_model_name=TEXT, vocab_size=COUNT, context_length=COUNT),
    "GET /get_server_info": shape(version=TEXT, settings=ANY_OBJECT, internal_states=listed(ANY_OBJECT)),
    "POST /tokenize": shape(tokens=listed(COUNT), count=COUNT, max_model_len=COUNT),
    "POST /detokenize": shape(text=TEXT),
    "POST /add_external_corpus": shape(success=FLAG, corpus_id=TEXT, message=TEXT, loaded_token_count=COUNT),
    "POST /remove_external_corpus": shape(success=FLAG, message=TEXT),
    "GET /list_external_corpora": shape(success=FLAG, corpus_token_counts=ANY_OBJECT, message=TEXT),
    "GET /v1/models": page_of(MODEL),
    "GET /v1/models/{model}": MODEL,
    "POST /v1/completions": COMPLETION,
    "POST /v1/chat/completions": CHAT,
    "POST /v1/responses": RESPONSE,
    "GET /v1/responses/{response}": RESPONSE,
    "DELETE /v1/responses/{response}": deleted("response"),
    "POST /v1/responses/{response}/cancel": RESPONSE,
    "GET /v1/responses/{response}/input_items": ITEMS,
    "POST /v1/conversations": CONVERSATION,
    "GET /v1/conversations/{conversation}": CONVERSATION,
    "POST /v1/conversations/{conversation}": CONVERSATION,
    "DELETE /v1/conversations/{conversation}": deleted("conversation.deleted"),
    "POST /v1/conversations/{conversation}/items": ITEMS,
    "GET /v1/conversations/{conversation}/items": ITEMS,
    "GET /v1/conversations/{conversation}/items/{item}": ITEM,
    "DELETE /v1/conversations/{conversation}/items/{item}": CONVERSATION,
    "POST /v1/messages": MESSAGE,
    "POST /v1/messages/count_tokens": shape(input_tokens=COUNT),
    "POST /v1/sessions": SESSION,
    "GET /v1/sessions": page_of(SESSION, has_more=FLAG, total=COUNT),
    "GET /v1/sessions/{session}": SESSION,
    "GET /v1/sessions/{session}/tokens": shape(id=TEXT, tokens=listed(COUNT)),
    "DELETE /v1/sessions/{session}": shape(id=TEXT, object=named("session")),
    "POST /v1/sessions/{session}/append": shape(id=TEXT, object=named("session"), tokens=COUNT, appended_tokens=COUNT),
    "POST /v1/sessions/{session}/fork": SESSION,
    "POST /v1/sessions/{session}/rewind": SESSION,
    "GET /v1/pool": POOL,
    "POST /v1/corpora": CORPUS,
    "GET /v1/corpora": page_of(CORPUS, budget=shape(used=SIZE, left=SIZE)),
    "GET /v1/corpora/{corpus}": CORPUS,
    "DELETE /v1/corpora/{corpus}": deleted("corpus"),
}
"""Route → its JSON reply. What is not here answers nothing but its status, or text."""
STREAMS = {
    "POST /generate", "POST /v1/completions", "POST /v1/chat/completions", "POST /v1/responses", "POST /v1/messages",
}  # fmt: skip
"""Routes that answer with events where they are asked to."""
TEXTS = {"GET /metrics"}
ACCEPTED = {"POST /v1/corpora"}
"""Routes that may answer before all is done, with 202."""
FAILURES = {"POST /add_external_corpus", "POST /remove_external_corpus", "GET /list_external_corpora"}


class DescribedApp(FastAPI):
    """An application whose OpenAPI says what is answered. FastAPI knows of replies only that they are replies."""

    def openapi(self) -> dict[str, Any]:
        """The description; made when it is first asked for."""
        if self.openapi_schema is None:
            description = super().openapi()
            for path, methods in description["paths"].items():
                for method, operation in methods.items():
                    operation["responses"] = answers_of(f"{method.upper()} {path}", path)
            description.get("components", {}).pop("schemas", None)  # of errors as FastAPI would write them
            self.openapi_schema = description
        return self.openapi_schema


def answers_of(route: str, path: str) -> dict[str, Any]:
    """What a route answers, by status."""
    content: dict[str, Any] = {}
    if route in JSON_ANSWERS:
        content["application/json"] = {"schema": JSON_ANSWERS[route]}
    if route in STREAMS:
        content["text/event-stream"] = {}
    if route in TEXTS:
        content["text/plain"] = {"schema": TEXT}
    success = {"description": "Done", **({"content": content} if content else {})}
    error = NATIVE_FAILURE if route in FAILURES else ERRORS[Surface.of(path)]
    refusal = {"content": {"application/json": {"schema": error}}}
    return {
        "200": success,
        **({"202": {**success, "description": "Begun"}} if route in ACCEPTED else {}),
        "4XX": {"description": "Refused: what the client asked is at fault, or more than it may have", **refusal},
        "503": {"description": "Not ready, or on the way out: try again after a while", **refusal},
    }

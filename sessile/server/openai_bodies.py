"""Bodies of the OpenAI-compatible routes. What means nothing here and what is refused stands in one table below."""

from typing import Annotated, Any, ClassVar, Self

from pydantic import Field, WithJsonSchema, model_validator

from sessile.server.body import ANYTHING, Body, TokenIds, Tolerated, field_fault, says
from sessile.server.drafts import DraftFields
from sessile.server.grammars import OpenAIGrammarFields
from sessile.server.message_schemas import CHAT_MESSAGES
from sessile.server.names import SessionId
from sessile.server.sampling import ANSWERS_MAX, LOGPROBS_MAX, Answers, Count, Priority, SamplingFields
from sessile.server.tools import ToolFields

PROMPTS_MAX = 128
COMPLETION_TOKENS_DEFAULT = 16
"""What /v1/completions generates if max_tokens is not given, as in OpenAI's API."""

TOLERATED: Tolerated = {
    # OpenAI's own, about accounts, billing and storage: nothing of that exists here
    "user": ANYTHING,
    "metadata": ANYTHING,
    "store": ANYTHING,
    "service_tier": ANYTHING,
    "safety_identifier": ANYTHING,
    "prompt_cache_key": ANYTHING,
    "prompt_cache_retention": ANYTHING,
    # accepted where they ask for nothing
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "web_search_options": (),
    # SGLang's and vLLM's
    "structural_tag": (),
    "lora_path": (),
    "return_hidden_states": (False,),
    "separate_reasoning": (True, False),
    "stream_reasoning": (True, False),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "use_beam_search": (False,),
    "length_penalty": (1.0, 1),
    "include_stop_str_in_output": (False,),
    "spaces_between_special_tokens": (True,),
    "detokenize": (True,),
    "prompt_logprobs": (),
}

Prompt = Annotated[
    str | list[str] | TokenIds | list[TokenIds],
    says("must be a string, a list of token ids, or a list of either"),
]


class StreamOptions(Body):
    """stream_options of both routes."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    """As in vLLM: every chunk has the usage of its answer so far. Needs include_usage."""

    tolerated: ClassVar[Tolerated] = {"include_obfuscation": ANYTHING}

    @model_validator(mode="after")
    def _check_continuous(self) -> Self:
        if self.continuous_usage_stats and not self.include_usage:
            raise field_fault("continuous_usage_stats", "needs include_usage: true")
        return self


class OpenAIBody(SamplingFields, DraftFields, OpenAIGrammarFields):
    """What both routes have in common."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Count | None = None
    min_tokens: Count | None = None
    rid: str | None = Field(default=None, min_length=1, max_length=256)
    priority: Priority | None = None
    n: Answers | None = None
    """How many answers to each prompt; the i-th from 0 on has the seed plus i."""
    best_of: Answers | None = None

    tolerated: ClassVar[Tolerated] = {**TOLERATED, "session_id": ()}

    @model_validator(mode="after")
    def _check_best_of(self) -> Self:
        if self.best_of not in (None, self.answers):
            raise field_fault("best_of", "must be n: all answers are given, none is chosen")
        return self

    @property
    def answers(self) -> int:
        """How many answers to each prompt."""
        return self.n or 1

    @model_validator(mode="after")
    def _check_stream_options(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise field_fault("stream_options", "needs stream: true")
        return self

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with its usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def counts_on(self) -> bool:
        """Whether every chunk of a stream has the usage so far."""
        return bool(self.stream_options and self.stream_options.continuous_usage_stats)


class CompletionBody(OpenAIBody):
    """The body of /v1/completions."""

    prompt: Prompt
    echo: bool | None = None
    logprobs: int | None = Field(default=None, ge=0, le=LOGPROBS_MAX)

    @model_validator(mode="after")
    def _check_prompts(self) -> Self:
        prompts = self.prompts
        if len(prompts) > PROMPTS_MAX:
            raise field_fault("prompt", f"at most {PROMPTS_MAX} prompts")
        if len(prompts) * self.answers > ANSWERS_MAX:
            raise field_fault("n", f"at most {ANSWERS_MAX} answers to all prompts together")
        if not prompts or not all(prompts):
            raise field_fault("prompt", "must not be empty")
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts as a list, whatever form they were given in."""
        prompt: Any = self.prompt
        if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)):
            return [prompt]
        return list(prompt)


class ChatBody(OpenAIBody, ToolFields):
    """The body of /v1/chat/completions. The messages are checked by sessile.text.template."""

    tolerated: ClassVar[Tolerated] = TOLERATED

    messages: Annotated[Any, WithJsonSchema(CHAT_MESSAGES)]
    session_id: SessionId | None = None
    """The dialogue to go on with: of the messages, only those that its turns do not have are computed."""
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=LOGPROBS_MAX)
    chat_template_kwargs: dict[str, Any] | None = None
    separate_reasoning: bool | None = None
    stream_reasoning: bool | None = None

    @model_validator(mode="after")
    def _check_max_tokens(self) -> Self:
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise field_fault("max_completion_tokens", "differs from max_tokens: send one of them")
        return self

    @model_validator(mode="after")
    def _check_session(self) -> Self:
        if self.session_id is not None and self.answers > 1:
            raise field_fault("n", "a session's turn has one answer; leave session_id out, or ask for one at a time")
        if self.session_id is not None and self.counts_on:
            raise field_fault(
                "stream_options.continuous_usage_stats",
                "how long a session's history is, is told at the end; leave session_id out, or this",
            )
        return self

    @model_validator(mode="after")
    def _check_logprobs(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise field_fault("top_logprobs", "needs logprobs: true")
        return self

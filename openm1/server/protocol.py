"""What OpenAI's clients send, field by field.

A field that is not here is refused by name. Fields marked "No effect" are taken because clients
send them and no reply could depend on them.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
Budget = Annotated[int, Field(ge=-1, description="Tokens; -1 is free, 0 is no thought.")]
Probability = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
NO_EFFECT = "No effect."


class Body(BaseModel):
    """Fields beyond those named are refused, and "5" is no 5."""

    model_config = ConfigDict(extra="forbid", strict=True)


class OpenBody(BaseModel):
    """For what clients send back as they got it: other fields are left unread."""

    model_config = ConfigDict(extra="allow", strict=True)


class TemplateOptions(Body):
    enable_thinking: bool | None = None
    thinking_budget: Budget | None = None


class ReasoningOptions(Body):
    """OpenAI's and OpenRouter's."""

    effort: Effort | None = None
    max_tokens: Budget | None = None
    exclude: bool | None = None
    enabled: bool | None = None
    summary: Literal["auto", "concise", "detailed"] | None = Field(
        None, description="No effect: the thought itself is shown, there is no summary."
    )
    generate_summary: Literal["auto", "concise", "detailed"] | None = Field(
        None, description=NO_EFFECT
    )


class ThinkingOptions(Body):
    """Anthropic's."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Annotated[int, Field(ge=0)] | None = None
    display: Literal["summarized", "omitted"] | None = None


class OutputFormat(Body):
    """Anthropic's."""

    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(Body):
    """Anthropic's."""

    effort: Effort | None = None
    format: OutputFormat | None = None


class ThinkingControls(Body):
    """All names for one thing; `server.thinking` says which vendor's they are."""

    reasoning_effort: Effort | None = None
    reasoning: ReasoningOptions | None = None
    thinking: ThinkingOptions | None = None
    enable_thinking: bool | None = None
    thinking_budget: Budget | None = None
    thinking_token_budget: Budget | None = None
    thinking_budget_tokens: Budget | None = None
    chat_template_kwargs: TemplateOptions | None = None
    include_reasoning: bool | None = None
    output_config: OutputConfig | None = None


class StreamOptions(Body):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = Field(None, description="Usage so far in every chunk.")
    include_obfuscation: bool | None = Field(None, description=NO_EFFECT)


class Sampling(Body):
    """What all endpoints that write have in common."""

    model: str | None = Field(None, description="The served model; may be left out.")
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = Field(None, description="0 and -1 keep all.")
    min_p: Probability | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.1, le=10)] | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[Annotated[int, Field(ge=0)]] | None = None
    ignore_eos: bool = False
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Count | None = None
    priority: int = Field(0, ge=-(2**31), lt=2**31, description="Higher goes first.")
    return_token_ids: bool = Field(
        False,
        description="Adds exact ids: prompt_token_ids, and per choice token_ids, token_logprobs, "
        "forced and policy_versions.",
    )
    user: str | None = Field(None, description=NO_EFFECT)
    metadata: dict[str, Any] | None = Field(None, description=NO_EFFECT)
    service_tier: str | None = Field(None, description=NO_EFFECT)
    store: bool | None = Field(None, description="No effect: nothing is stored.")
    safety_identifier: str | None = Field(None, description=NO_EFFECT)
    prompt_cache_key: str | None = Field(None, description="No effect: the cache finds prefixes.")
    prompt_cache_retention: str | None = Field(None, description=NO_EFFECT)


class TextPart(OpenBody):
    type: Literal["text"]
    text: str


class FunctionCall(OpenBody):
    name: Annotated[str, Field(min_length=1)]
    arguments: str | dict[str, Any] | None = None


class MessageToolCall(OpenBody):
    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


class ChatMessage(OpenBody):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[MessageToolCall] | None = None
    tool_call_id: str | None = None
    name: str | None = None


class FunctionSpec(Body):
    name: Annotated[str, Field(min_length=1)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = Field(
        None,
        description="Arguments fit the schema with tool_choice auto too; those of a required call "
        "always do.",
    )


class ToolParam(Body):
    type: Literal["function"]
    function: FunctionSpec


class FlatToolParam(FunctionSpec):
    """As the model vendor's guide and OpenAI's Responses write it."""

    type: Literal["function"] = "function"


class NamedFunction(Body):
    name: Annotated[str, Field(min_length=1)]


class NamedToolChoice(Body):
    type: Literal["function"]
    function: NamedFunction

    @staticmethod
    def of(name: str) -> NamedToolChoice:
        return NamedToolChoice(type="function", function=NamedFunction(name=name))


ToolChoice = Literal["none", "auto", "required"] | NamedToolChoice


class JsonSchemaFormat(Body):
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = Field(None, description="No effect: a schema is always kept to.")


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema", "regex"]
    json_schema: JsonSchemaFormat | None = None
    pattern: Annotated[str | None, Field(description="For type regex.")] = None

    @staticmethod
    def of_schema(schema: dict[str, Any]) -> ResponseFormat:
        form = JsonSchemaFormat.model_validate({"schema": schema})
        return ResponseFormat(type="json_schema", json_schema=form)


class ChatRequest(Sampling, ThinkingControls):
    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0)] | None = None
    tools: list[ToolParam | FlatToolParam] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    modalities: list[Literal["text"]] | None = None
    verbosity: Literal["low", "medium", "high"] | None = Field(None, description=NO_EFFECT)


def chat_request(**fields: Any) -> ChatRequest:
    """One of parts that have been checked already; None stands for a field that was not sent."""
    return ChatRequest.model_construct(
        **{name: value for name, value in fields.items() if value is not None}
    )


class CompletionRequest(Sampling):
    """Raw text or token ids, continued as they stand, thought and all."""

    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: Count | None = 16
    logprobs: Annotated[int, Field(ge=0)] | None = None
    echo: bool | None = Field(None, description="Puts the prompt's text before the reply's.")
    best_of: int | None = Field(None, description="Only n is allowed.")
    suffix: None = None
    thinking_budget: Budget | None = None
    enable_thinking: bool | None = None
    response_format: ResponseFormat | None = None


class TokenizeRequest(Body):
    """Either a text, or a conversation as chat/completions takes it."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1)] | None = None
    tools: list[ToolParam | FlatToolParam] | None = None
    add_generation_prompt: bool = True
    add_special_tokens: bool = Field(
        False, description="Whether special tokens written out in `prompt` are taken as such."
    )
    return_token_strs: bool = False


class DetokenizeRequest(Body):
    model: str | None = None
    tokens: list[Annotated[int, Field(ge=0)]]


class TemplateRequest(Body):
    """What /apply-template turns into the text of a prompt."""

    model: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    tools: list[ToolParam | FlatToolParam] | None = None
    add_generation_prompt: bool = True


class PauseRequest(Body):
    mode: Literal["keep"] = Field(
        "keep", description="Replies under way keep all they have and go on after resume."
    )


class WeightUpdate(Body):
    path: Annotated[str, Field(min_length=1)] = Field(
        description="A checkpoint folder that the server can read."
    )
    version: Annotated[int, Field(ge=0, lt=2**63)]
    in_flight: Literal["recompute", "keep"] = Field(
        "recompute", description="What replies under way do with the caches they have."
    )

"""What replies look like, for the OpenAPI document. Replies are written without passing here."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict


class Document(BaseModel):
    model_config = ConfigDict(extra="allow")


class ErrorDetail(Document):
    message: str
    type: str
    code: str
    param: str | None = None


class ErrorReply(Document):
    error: ErrorDetail


class AnthropicErrorReply(Document):
    type: Literal["error"]
    error: ErrorDetail


class CachedDetails(Document):
    cached_tokens: int


class ReasoningDetails(Document):
    reasoning_tokens: int


class Usage(Document):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedDetails
    completion_tokens_details: ReasoningDetails


class CalledFunction(Document):
    name: str
    arguments: str


class CalledTool(Document):
    id: str
    type: Literal["function"]
    function: CalledFunction


class AssistantMessage(Document):
    role: Literal["assistant"]
    content: str | None
    reasoning_content: str | None
    reasoning: str | None
    tool_calls: list[CalledTool] | None = None


class ChatChoice(Document):
    index: int
    message: AssistantMessage
    finish_reason: Literal["stop", "length", "tool_calls"]
    stop_reason: str | None
    logprobs: dict[str, Any] | None = None


class ChatCompletion(Document):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class TextChoice(Document):
    index: int
    text: str
    finish_reason: Literal["stop", "length"]
    stop_reason: str | None
    logprobs: dict[str, Any] | None = None


class TextCompletion(Document):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage


class ResponseReply(Document):
    id: str
    object: Literal["response"]
    created_at: int
    model: str
    status: Literal["completed", "incomplete"]
    output: list[dict[str, Any]]
    usage: dict[str, Any]


class AnthropicMessage(Document):
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[dict[str, Any]]
    stop_reason: Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]
    stop_sequence: str | None
    usage: dict[str, Any]


class TokenCount(Document):
    input_tokens: int


class ModelCard(Document):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int


class ModelList(Document):
    object: Literal["list"]
    data: list[ModelCard]


class Tokenized(Document):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class Detokenized(Document):
    prompt: str


class AppliedTemplate(Document):
    prompt: str


class Health(Document):
    status: str


class CacheReply(Document):
    budget_bytes: int
    in_use_bytes: int
    cached_bytes: int
    hit_rate: float


class PolicyState(Document):
    is_paused: bool
    version: int


EVENT: dict[str, Any] = {
    "type": "object",
    "properties": {"data": {"type": "string"}, "event": {"type": "string"}},
    "required": ["data"],
}
EVENTS: dict[str, Any] = {
    "content": {"text/event-stream": {"schema": EVENT}},
    "description": "The reply; with `stream`, server-sent events.",
}


def refusals(*statuses: int, anthropic: bool = False) -> dict[int | str, dict[str, Any]]:
    """The documented refusals of a route."""
    model = AnthropicErrorReply if anthropic else ErrorReply
    return {status: {"model": model, "description": _WHY[status]} for status in statuses}


_WHY = {
    400: "The request is wrong; `message` says what and what is allowed.",
    401: "The key is missing or wrong.",
    403: "The server has no admin key.",
    404: "There is no such model.",
    408: "The body took too long.",
    429: "This key has too many requests under way; `Retry-After` says when to come back.",
    503: "The queue is full or the server is shutting down; `Retry-After` says when to come back.",
}

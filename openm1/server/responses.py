"""What OpenAI's Responses API is sent, and the same as a chat request. Nothing is stored here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from openm1.server.errors import bad_request
from openm1.server.protocol import (
    NO_EFFECT,
    Body,
    ChatMessage,
    ChatRequest,
    Count,
    FlatToolParam,
    NamedToolChoice,
    OpenBody,
    ReasoningOptions,
    ResponseFormat,
    StreamOptions,
    ToolChoice,
    chat_request,
)


class ContentPart(OpenBody):
    type: Literal["input_text", "output_text", "text"]
    text: str


class InputMessage(OpenBody):
    type: Literal["message"] | None = None
    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[ContentPart]


class FunctionCallItem(OpenBody):
    type: Literal["function_call"]
    call_id: Annotated[str, Field(min_length=1)]
    name: Annotated[str, Field(min_length=1)]
    arguments: str


class FunctionOutputItem(OpenBody):
    type: Literal["function_call_output"]
    call_id: Annotated[str, Field(min_length=1)]
    output: str | list[ContentPart]


class ReasoningPart(OpenBody):
    type: Literal["reasoning_text", "summary_text"]
    text: str


class ReasoningItem(OpenBody):
    type: Literal["reasoning"]
    content: list[ReasoningPart] | None = None


InputItem = FunctionCallItem | FunctionOutputItem | ReasoningItem | InputMessage


class TextFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class TextOptions(Body):
    format: TextFormat | None = None
    verbosity: Literal["low", "medium", "high"] | None = Field(None, description=NO_EFFECT)


class NamedResponseTool(Body):
    type: Literal["function"]
    name: Annotated[str, Field(min_length=1)]


class ResponsesRequest(Body):
    model: str | None = None
    input: str | Annotated[list[InputItem], Field(min_length=1)]
    instructions: str | None = None
    max_output_tokens: Count | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    tools: list[FlatToolParam] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedResponseTool | None = None
    parallel_tool_calls: bool | None = None
    reasoning: ReasoningOptions | None = None
    text: TextOptions | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    truncation: Literal["disabled"] | None = Field(
        None, description="A conversation that is too long is refused, never cut."
    )
    background: bool | None = Field(None, description="Only false is allowed.")
    previous_response_id: None = Field(
        None, description="Responses are not stored: send the whole conversation."
    )
    conversation: None = None
    include: list[str] | None = Field(None, description="No effect: all there is, is sent.")
    store: bool | None = Field(None, description="No effect: nothing is stored.")
    metadata: dict[str, str] | None = Field(None, description="Sent back as it came.")
    user: str | None = Field(None, description=NO_EFFECT)
    service_tier: str | None = Field(None, description=NO_EFFECT)
    safety_identifier: str | None = Field(None, description=NO_EFFECT)
    prompt_cache_key: str | None = Field(None, description=NO_EFFECT)
    prompt_cache_retention: str | None = Field(None, description=NO_EFFECT)
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None


def responses_as_chat(request: ResponsesRequest) -> ChatRequest:
    """The same request in the chat API's words; raises ApiError for what has none."""
    if request.background:
        raise bad_request("background is True; allowed is false, nothing is stored", "background")
    system = [ChatMessage(role="system", content=request.instructions)]
    return chat_request(
        model=request.model,
        messages=[*(system if request.instructions else []), *_messages(request.input)],
        max_tokens=request.max_output_tokens,
        temperature=request.temperature,
        top_p=request.top_p,
        seed=request.seed,
        tools=request.tools,
        tool_choice=_tool_choice(request.tool_choice),
        parallel_tool_calls=request.parallel_tool_calls,
        reasoning=request.reasoning,
        response_format=_response_format(request.text),
        stream=request.stream,
    )


def _messages(items: str | Sequence[InputItem]) -> list[ChatMessage]:
    if isinstance(items, str):
        return [ChatMessage(role="user", content=items)]
    messages: list[ChatMessage] = []
    turn: dict[str, Any] = {}
    for item in items:
        # Thought, answer and calls of one turn are items of their own here.
        if _belongs_to_turn(item) and not (isinstance(item, ReasoningItem) and turn):
            _add_to_turn(turn, item)
            continue
        messages += _closed(turn)
        turn = {}
        if isinstance(item, ReasoningItem):
            _add_to_turn(turn, item)
        elif isinstance(item, FunctionOutputItem):
            content = _joined(item.output)
            messages.append(ChatMessage(role="tool", content=content, tool_call_id=item.call_id))
        elif isinstance(item, InputMessage):
            messages.append(ChatMessage(role=item.role, content=_joined(item.content)))
    return [*messages, *_closed(turn)]


def _belongs_to_turn(item: InputItem) -> bool:
    if isinstance(item, InputMessage):
        return item.role == "assistant"
    return isinstance(item, ReasoningItem | FunctionCallItem)


def _add_to_turn(turn: dict[str, Any], item: InputItem) -> None:
    if isinstance(item, ReasoningItem):
        turn["reasoning_content"] = "".join(part.text for part in item.content or ())
    elif isinstance(item, FunctionCallItem):
        function = {"name": item.name, "arguments": item.arguments}
        call = {"id": item.call_id, "type": "function", "function": function}
        turn.setdefault("tool_calls", []).append(call)
    elif isinstance(item, InputMessage):
        turn["content"] = turn.get("content", "") + _joined(item.content)


def _closed(turn: dict[str, Any]) -> Iterable[ChatMessage]:
    if turn:
        yield ChatMessage.model_validate({"role": "assistant", **turn})


def _joined(content: str | Sequence[ContentPart]) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)


def _tool_choice(choice: Any) -> ToolChoice | None:
    if isinstance(choice, NamedResponseTool):
        return NamedToolChoice.of(choice.name)
    return choice


def _response_format(text: TextOptions | None) -> ResponseFormat | None:
    wanted = None if text is None else text.format
    if wanted is None:
        return None
    if wanted.type != "json_schema":
        return ResponseFormat(type=wanted.type)
    if wanted.schema_ is None:
        raise bad_request("text.format of type json_schema needs schema", "text")
    return ResponseFormat.of_schema(wanted.schema_)

"""What Anthropic's clients send, and the same as a chat request.

Fields of content blocks that no reply could depend on (`cache_control`, `citations`) are left
unread; kinds of blocks and tools that this server has not are refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
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
    OutputConfig,
    Probability,
    ResponseFormat,
    TextPart,
    ThinkingOptions,
    ToolChoice,
    chat_request,
)


class ThinkingBlock(OpenBody):
    type: Literal["thinking"]
    thinking: str
    signature: str = Field("", description="Not checked.")


class ToolUseBlock(OpenBody):
    type: Literal["tool_use"]
    id: Annotated[str, Field(min_length=1)]
    name: Annotated[str, Field(min_length=1)]
    input: dict[str, Any]


class ToolResultBlock(OpenBody):
    type: Literal["tool_result"]
    tool_use_id: str
    content: str | list[TextPart] | None = None
    is_error: bool | None = None


Block = Annotated[
    TextPart | ThinkingBlock | ToolUseBlock | ToolResultBlock, Field(discriminator="type")
]


class MessageParam(OpenBody):
    role: Literal["user", "assistant", "system"]
    content: str | list[Block]


class AnthropicTool(OpenBody):
    type: Literal["custom"] | None = None
    name: Annotated[str, Field(min_length=1)]
    description: str | None = None
    input_schema: dict[str, Any]
    strict: bool | None = None


class AnthropicToolChoice(Body):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = Field(None, description="For type tool.")
    disable_parallel_tool_use: bool | None = None


class CountTokensRequest(Body):
    model: str | None = None
    messages: Annotated[list[MessageParam], Field(min_length=1)]
    system: str | list[TextPart] | None = None
    tools: list[AnthropicTool] | None = None
    tool_choice: AnthropicToolChoice | None = None
    thinking: ThinkingOptions | None = None
    output_config: OutputConfig | None = None
    cache_control: dict[str, Any] | None = Field(None, description=NO_EFFECT)


class MessagesRequest(CountTokensRequest):
    max_tokens: Count
    temperature: Probability | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    metadata: dict[str, Any] | None = Field(None, description=NO_EFFECT)
    service_tier: str | None = Field(None, description=NO_EFFECT)


def as_chat(request: CountTokensRequest) -> ChatRequest:
    """The same request in OpenAI's words; raises ApiError for what cannot be said in them."""
    if request.messages[-1].role == "assistant":
        raise bad_request(
            "the last message is the assistant's; a reply cannot be begun for it here, allowed is "
            "a user message at the end",
            "messages",
        )
    choice = request.tool_choice
    sampling: dict[str, Any] = {}
    if isinstance(request, MessagesRequest):
        sampling = {
            "max_tokens": request.max_tokens,
            "temperature": request.temperature,
            "top_p": request.top_p,
            "top_k": request.top_k,
            "stop": request.stop_sequences,
            "stream": request.stream,
        }
    return chat_request(
        model=request.model,
        messages=[*_system(request), *(m for each in request.messages for m in _turns(each))],
        tools=_tools(request.tools),
        tool_choice=None if choice is None else _tool_choice(choice),
        parallel_tool_calls=choice and not choice.disable_parallel_tool_use,
        thinking=request.thinking,
        output_config=request.output_config,
        response_format=_response_format(request.output_config),
        **sampling,
    )


def _system(request: CountTokensRequest) -> list[ChatMessage]:
    if not request.system:
        return []
    return [ChatMessage(role="system", content=_joined(request.system))]


def _joined(content: str | list[TextPart]) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)


def _turns(message: MessageParam) -> Iterable[ChatMessage]:
    """Tool results are messages of their own, in front of what the user says beside them."""
    if isinstance(message.content, str):
        yield ChatMessage(role=message.role, content=message.content)
        return
    text, thought, calls = "", None, []
    for block in message.content:
        if isinstance(block, ToolResultBlock):
            _need(message, "user", "tool_result")
            content = "" if block.content is None else _joined(block.content)
            yield ChatMessage(role="tool", content=content, tool_call_id=block.tool_use_id)
        elif isinstance(block, ToolUseBlock):
            _need(message, "assistant", "tool_use")
            function = {"name": block.name, "arguments": json.dumps(block.input)}
            calls.append({"id": block.id, "type": "function", "function": function})
        elif isinstance(block, ThinkingBlock):
            _need(message, "assistant", "thinking")
            thought = (thought or "") + block.thinking
        else:
            text += block.text
    only_results = all(isinstance(block, ToolResultBlock) for block in message.content)
    if not (message.content and only_results):
        yield ChatMessage.model_validate(
            {
                "role": message.role,
                "content": text,
                "reasoning_content": thought,
                "tool_calls": calls or None,
            }
        )


def _need(message: MessageParam, role: str, block: str) -> None:
    if message.role != role:
        raise bad_request(f"a {block} block belongs to role {role!r}, not {message.role!r}")


def _tools(tools: list[AnthropicTool] | None) -> list[Any] | None:
    if tools is None:
        return None
    return [
        FlatToolParam(
            name=tool.name,
            description=tool.description,
            parameters=tool.input_schema,
            strict=tool.strict,
        )
        for tool in tools
    ]


def _tool_choice(choice: AnthropicToolChoice) -> ToolChoice:
    if choice.type == "tool":
        if not choice.name:
            raise bad_request("tool_choice of type tool needs a name", "tool_choice")
        return NamedToolChoice.of(choice.name)
    names: dict[str, Literal["auto", "required", "none"]] = {"any": "required"}
    return names.get(choice.type, choice.type)  # type: ignore[return-value]


def _response_format(output: OutputConfig | None) -> ResponseFormat | None:
    if output is None or output.format is None:
        return None
    return ResponseFormat.of_schema(output.format.schema_)

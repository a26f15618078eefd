"""Which grammar an answer is held to: what a request says of tools and forms, read together."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from openm1.chat.tokenizer import Tokenizer
from openm1.server.config import ServerConfig
from openm1.server.errors import bad_request
from openm1.server.grammar import (
    AnswerGrammar,
    form_or_calls_source,
    json_object_source,
    json_schema_source,
    landing_tokens,
    regex_source,
    text_or_calls_source,
    tool_calls_source,
)
from openm1.server.protocol import (
    ChatRequest,
    FlatToolParam,
    NamedToolChoice,
    ResponseFormat,
    ToolChoice,
    ToolParam,
)
from openm1.types import ToolSpec


def answer_grammar(
    request: ChatRequest,
    choice: ToolChoice,
    tools: list[ToolSpec],
    tokenizer: Tokenizer,
    config: ServerConfig,
) -> AnswerGrammar | None:
    """None where the model may write what it likes. Raises ApiError."""
    if isinstance(choice, NamedToolChoice) or choice == "required":
        return _calls_grammar(request, choice, tools, tokenizer)
    grammar = format_grammar(request.response_format, tokenizer, config)
    if choice == "none" or not tools:
        return grammar
    strict = _strict_names(request.tools)
    parallel = request.parallel_tool_calls is not False
    if grammar is not None:
        source = form_or_calls_source(grammar.source, tools, strict, parallel=parallel)
        return AnswerGrammar(tokenizer, source, "tools")
    if parallel and not strict:
        return None
    source = text_or_calls_source(tools, strict, parallel=parallel)
    return AnswerGrammar(tokenizer, source, "tools", has_form=False)


def format_grammar(
    wanted: ResponseFormat | None, tokenizer: Tokenizer, config: ServerConfig
) -> AnswerGrammar | None:
    """For an answer without calls."""
    if wanted is None or wanted.type == "text":
        return None
    param = "response_format"
    if wanted.type == "json_object":
        source = json_object_source()
    elif wanted.type == "json_schema":
        if wanted.json_schema is None:
            raise bad_request("type json_schema needs json_schema.schema", param)
        schema = wanted.json_schema.schema_
        check_size(json_size(schema, param), param, config)
        source = json_schema_source(schema, param)
    else:
        if wanted.pattern is None:
            raise bad_request("type regex needs pattern", param)
        check_size(len(wanted.pattern.encode("utf-8", "replace")), param, config)
        source = regex_source(wanted.pattern)
    return AnswerGrammar(tokenizer, source, param)


def _calls_grammar(
    request: ChatRequest, choice: ToolChoice, tools: list[ToolSpec], tokenizer: Tokenizer
) -> AnswerGrammar:
    """For a reply that must be a call."""
    name = choice.function.name if isinstance(choice, NamedToolChoice) else None
    if request.response_format is not None and request.response_format.type != "text":
        raise bad_request(
            f"tool_choice is {choice if name is None else 'a function'} and response_format asks "
            "for an answer; a reply is one or the other",
            "tool_choice",
        )
    if name is not None:
        tools = [tool for tool in tools if tool.name == name]
    if not tools:
        raise bad_request(
            f"tool_choice wants {name or 'any'!r}, which is not in tools", "tool_choice"
        )
    parallel = request.parallel_tool_calls is not False and name is None
    source = tool_calls_source(tools, parallel=parallel)
    landing = landing_tokens(tokenizer, tools)
    return AnswerGrammar(tokenizer, source, "tools", landing_tokens=landing)


def _strict_names(tools: Sequence[ToolParam | FlatToolParam] | None) -> set[str]:
    """Of the tools whose arguments must fit their schemas."""
    functions = [tool.function if isinstance(tool, ToolParam) else tool for tool in tools or ()]
    return {function.name for function in functions if function.strict}


def check_size(num_bytes: int, param: str, config: ServerConfig) -> None:
    if num_bytes > config.max_schema_bytes:
        raise bad_request(
            f"{param} is {num_bytes} bytes as JSON; allowed are {config.max_schema_bytes}",
            param,
            "limit_exceeded",
        )


def json_size(value: Any, param: str) -> int:
    try:
        return len(json.dumps(value))
    except RecursionError as error:
        raise bad_request(f"{param} is nested too deeply", param, "limit_exceeded") from error

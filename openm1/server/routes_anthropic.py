"""Paths that Anthropic's clients know: messages and their tokens."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from openm1.server import documents
from openm1.server.anthropic import CountTokensRequest, MessagesRequest, as_chat
from openm1.server.documents import EVENTS, refusals
from openm1.server.gate import key_name
from openm1.server.messages import anthropic_message, message_events
from openm1.server.orders import read_tools
from openm1.server.serving import Serving

WRITING = refusals(400, 401, 404, 408, 429, 503, anthropic=True)
READING = refusals(400, 401, 404, 408, anthropic=True)


def anthropic_routes(serving: Serving) -> APIRouter:
    router = APIRouter(tags=["Anthropic"])
    served, config, desk = serving.served, serving.config, serving.desk

    @router.post(
        "/v1/messages",
        responses={**WRITING, 200: {"model": documents.AnthropicMessage, **EVENTS}},
    )
    async def messages(body: MessagesRequest, request: Request) -> Response:
        key_name(request.headers, config)
        orders, thinking = desk.chat(as_chat(body))
        num_prompt_tokens = len(orders[0].prompt_ids)
        return await serving.respond(
            request,
            orders,
            lambda replies: anthropic_message(replies[0], served, thinking),
            lambda items: message_events(items, served, thinking, num_prompt_tokens),
            anthropic=True,
        )

    @router.post(
        "/v1/messages/count_tokens",
        responses={**READING, 200: {"model": documents.TokenCount}},
    )
    async def count_tokens(body: CountTokensRequest, request: Request) -> Response:
        key_name(request.headers, config)
        desk.check_model(body.model)
        chat = as_chat(body)
        tools = [] if chat.tool_choice == "none" else read_tools(chat.tools, config)
        ids, _ = desk.prompt(chat.messages, tools)
        counted: dict[str, Any] = {"input_tokens": len(ids)}
        return JSONResponse(counted)

    return router

"""Paths that OpenAI's clients know: chat, completions, responses, models."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from openm1.server import documents
from openm1.server.chat import chat_chunks, chat_completion
from openm1.server.completions import text_chunks, text_completion
from openm1.server.documents import EVENTS, refusals
from openm1.server.gate import key_name
from openm1.server.protocol import ChatRequest, CompletionRequest
from openm1.server.response_events import response_events, response_object
from openm1.server.responses import ResponsesRequest, responses_as_chat
from openm1.server.serving import Serving

WRITING = refusals(400, 401, 404, 408, 429, 503)


def openai_routes(serving: Serving) -> APIRouter:
    router = APIRouter(tags=["OpenAI"])
    served, config, desk = serving.served, serving.config, serving.desk

    @router.post(
        "/v1/chat/completions",
        responses={**WRITING, 200: {"model": documents.ChatCompletion, **EVENTS}},
    )
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        key_name(request.headers, config)
        orders, thinking = desk.chat(body)
        ids = orders[0].prompt_ids
        return await serving.respond(
            request,
            orders,
            lambda replies: chat_completion(replies, served, body, thinking, ids),
            lambda items: chat_chunks(items, served, body, thinking, ids),
        )

    @router.post(
        "/v1/completions",
        responses={**WRITING, 200: {"model": documents.TextCompletion, **EVENTS}},
    )
    async def completions(body: CompletionRequest, request: Request) -> Response:
        key_name(request.headers, config)
        groups = desk.completion(body)
        orders = [order for group in groups for order in group]
        return await serving.respond(
            request,
            orders,
            lambda replies: text_completion(replies, groups, served, body),
            lambda items: text_chunks(items, groups, served, body),
        )

    @router.post(
        "/v1/responses",
        responses={**WRITING, 200: {"model": documents.ResponseReply, **EVENTS}},
    )
    async def responses(body: ResponsesRequest, request: Request) -> Response:
        key_name(request.headers, config)
        orders, thinking = desk.chat(responses_as_chat(body))
        return await serving.respond(
            request,
            orders,
            lambda replies: response_object(replies[0], served, body, thinking),
            lambda items: response_events(items, served, body, thinking),
        )

    @router.get("/v1/models", responses={**refusals(401), 200: {"model": documents.ModelList}})
    async def models(request: Request) -> Response:
        key_name(request.headers, config)
        card = _card(serving)
        more = {"has_more": False, "first_id": served.name, "last_id": served.name}
        return JSONResponse({"object": "list", "data": [card], **more})

    @router.get(
        "/v1/models/{name:path}",
        responses={**refusals(401, 404), 200: {"model": documents.ModelCard}},
    )
    async def model(name: str, request: Request) -> Response:
        key_name(request.headers, config)
        desk.check_model(name)
        return JSONResponse(_card(serving))

    return router


def _card(serving: Serving) -> dict[str, Any]:
    """One model, with the fields of both vendors."""
    served = serving.served
    return {
        "id": served.name,
        "object": "model",
        "type": "model",
        "created": served.created,
        "created_at": datetime.fromtimestamp(served.created, UTC).isoformat(),
        "owned_by": "openm1",
        "display_name": served.name,
        "max_model_len": served.context_tokens,
    }

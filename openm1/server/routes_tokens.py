"""Paths about tokens: texts and conversations to ids and back, and to the text of a prompt."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from openm1.server import documents
from openm1.server.documents import refusals
from openm1.server.errors import bad_request
from openm1.server.gate import key_name
from openm1.server.orders import read_messages, read_tools
from openm1.server.protocol import DetokenizeRequest, TemplateRequest, TokenizeRequest
from openm1.server.serving import Serving

READING = refusals(400, 401, 404, 408)


def token_routes(serving: Serving) -> APIRouter:
    router = APIRouter(tags=["Server"])
    served, config, desk = serving.served, serving.config, serving.desk

    @router.post("/tokenize", responses={**READING, 200: {"model": documents.Tokenized}})
    async def tokenize(body: TokenizeRequest, request: Request) -> Response:
        key_name(request.headers, config)
        desk.check_model(body.model)
        ids = _ids(serving, body)
        reply = {"count": len(ids), "max_model_len": served.context_tokens, "tokens": ids}
        if body.return_token_strs:
            texts = [served.tokenizer.token_bytes(i).decode("utf-8", "replace") for i in ids]
            reply["token_strs"] = texts
        return JSONResponse(reply)

    @router.post("/detokenize", responses={**READING, 200: {"model": documents.Detokenized}})
    async def detokenize(body: DetokenizeRequest, request: Request) -> Response:
        key_name(request.headers, config)
        desk.check_model(body.model)
        try:
            return JSONResponse({"prompt": served.tokenizer.decode(body.tokens)})
        except ValueError as error:
            raise bad_request(str(error), "tokens") from error

    @router.post(
        "/apply-template", responses={**READING, 200: {"model": documents.AppliedTemplate}}
    )
    async def apply_template(body: TemplateRequest, request: Request) -> Response:
        """The text of the prompt that a conversation becomes."""
        key_name(request.headers, config)
        desk.check_model(body.model)
        chat_format = desk.chat_format
        conversation, tools = read_messages(body.messages), read_tools(body.tools, config)
        try:
            text = chat_format.render(conversation, tools, body.add_generation_prompt)
        except ValueError as error:
            raise bad_request(str(error), "messages") from error
        return JSONResponse({"prompt": text})

    return router


def _ids(serving: Serving, body: TokenizeRequest) -> list[int]:
    if (body.prompt is None) == (body.messages is None):
        raise bad_request("give either prompt or messages", "prompt")
    try:
        if body.messages is None:
            return serving.served.tokenizer.encode(
                body.prompt or "", allow_special=body.add_special_tokens
            )
        conversation = read_messages(body.messages)
        tools = read_tools(body.tools, serving.config)
        return serving.desk.chat_format.encode(conversation, tools, body.add_generation_prompt)
    except ValueError as error:
        raise bad_request(str(error), "prompt" if body.messages is None else "messages") from error

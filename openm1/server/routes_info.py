"""Everything around the replies: tokens, health, metrics, the cache, the page."""

from __future__ import annotations

from dataclasses import asdict
from functools import cache
from importlib.resources import files

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response

from openm1.server import documents
from openm1.server.documents import refusals
from openm1.server.errors import ApiError, bad_request
from openm1.server.gate import key_name
from openm1.server.orders import read_messages, read_tools
from openm1.server.protocol import DetokenizeRequest, TemplateRequest, TokenizeRequest
from openm1.server.serving import Serving

READING = refusals(400, 401, 404, 408)
# The page may talk to its own server and to nobody else.
PAGE_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
        "img-src data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def info_routes(serving: Serving) -> APIRouter:
    router = APIRouter(tags=["Server"])
    served, config, desk = serving.served, serving.config, serving.desk

    @router.get("/", include_in_schema=False)
    async def page() -> Response:
        return HTMLResponse(_page(), headers=PAGE_HEADERS)

    @router.get("/health", responses={200: {"model": documents.Health}})
    async def health() -> Response:
        """Whether the process answers at all."""
        return JSONResponse({"status": "ok"})

    @router.get("/ready", responses={**refusals(503), 200: {"model": documents.Health}})
    async def ready() -> Response:
        """Whether new requests are welcome."""
        if serving.gate.is_draining:
            raise ApiError(
                503, "the server is shutting down", code="shutting_down", retry_after_s=1
            )
        return JSONResponse({"status": "ready"})

    @router.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        text = serving.metrics.text()
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    @router.get("/v1/cache", responses={**refusals(401), 200: {"model": documents.CacheReply}})
    async def cache_now(request: Request) -> Response:
        """The hybrid cache at this moment, and how much of all prompts it has saved."""
        key_name(request.headers, config)
        read = serving.metrics.prompt_tokens
        found = serving.metrics.cached_tokens
        counts = asdict(served.cache_counts())
        waiting = serving.gate.num_waiting
        return JSONResponse(
            {
                **counts,
                "num_waiting": counts["num_waiting"] + waiting,
                "prompt_tokens": read,
                "cached_tokens": found,
                "hit_rate": found / read if read else 0.0,
            }
        )

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
        if served.chat_format is None:
            raise bad_request("this model has no chat template", code="no_chat_template")
        conversation, tools = read_messages(body.messages), read_tools(body.tools, config)
        try:
            text = served.chat_format.render(conversation, tools, body.add_generation_prompt)
        except ValueError as error:
            raise bad_request(str(error), "messages") from error
        return JSONResponse({"prompt": text})

    return router


def _ids(serving: Serving, body: TokenizeRequest) -> list[int]:
    if (body.prompt is None) == (body.messages is None):
        raise bad_request("give either prompt or messages", "prompt")
    if body.messages is not None:
        tools = read_tools(body.tools, serving.config)
        generate = body.add_generation_prompt
        ids, _ = serving.desk.prompt(body.messages, tools, add_generation_prompt=generate)
        return ids
    try:
        return serving.served.tokenizer.encode(
            body.prompt or "", allow_special=body.add_special_tokens
        )
    except ValueError as error:
        raise bad_request(str(error), "prompt") from error


@cache
def _page() -> str:
    return files("openm1.server").joinpath("web/index.html").read_text("utf-8")

"""Everything around the replies: health, metrics, the cache, the page."""

from __future__ import annotations

from dataclasses import asdict
from functools import cache
from importlib.resources import files

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response

from openm1.server import documents
from openm1.server.documents import refusals
from openm1.server.errors import ApiError
from openm1.server.gate import key_name
from openm1.server.serving import Serving

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
    served, config = serving.served, serving.config

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

    return router


@cache
def _page() -> str:
    return files("openm1.server").joinpath("web/index.html").read_text("utf-8")

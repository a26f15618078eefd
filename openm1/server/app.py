"""The application: routes, errors in the client's own words, the OpenAPI document."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

import openm1
from openm1.server.config import ServerConfig
from openm1.server.errors import ApiError, bad_request, internal_error
from openm1.server.guard import Guard, speaks_anthropic
from openm1.server.routes_admin import admin_routes
from openm1.server.routes_anthropic import anthropic_routes
from openm1.server.routes_info import info_routes
from openm1.server.routes_openai import openai_routes
from openm1.server.routes_tokens import token_routes
from openm1.server.served import ServedModel
from openm1.server.serving import Serving, start_serving
from openm1.server.stream import Disconnected

CLIENT_CLOSED_REQUEST = 499


def build_app(served: ServedModel, config: ServerConfig) -> FastAPI:
    """Raises ValueError where the usage database cannot be opened."""
    serving = start_serving(served, config)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[None, None]:
        yield
        serving.meter.close()

    app = FastAPI(
        title="OpenM1",
        version=openm1.__version__,
        summary="MiniMax-M1-class reasoning models behind the APIs of OpenAI and Anthropic.",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
    )
    app.state.serving = serving
    app.add_middleware(Guard, config=config, metrics=serving.metrics)
    _add_error_handlers(app)
    for routes in (openai_routes, anthropic_routes, token_routes, info_routes, admin_routes):
        app.include_router(routes(serving))
    _document(app)
    return app


def serving_of(app: FastAPI) -> Serving:
    return app.state.serving


def _add_error_handlers(app: FastAPI) -> None:
    def refuse(request: Request, error: ApiError) -> Response:
        body = error.body(anthropic=speaks_anthropic(request.url.path))
        return JSONResponse(body, error.status, error.headers)

    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> Response:
        return refuse(request, error)

    @app.exception_handler(RequestValidationError)
    async def validation_error(request: Request, error: RequestValidationError) -> Response:
        return refuse(request, _readable(error))

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "bad_request")
        refused = ApiError(error.status_code, str(error.detail), code=code)
        response = refuse(request, refused)
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(Disconnected)
    async def gone(request: Request, error: Disconnected) -> Response:
        # Nobody reads it; it is there for the log.
        return Response(status_code=CLIENT_CLOSED_REQUEST)

    @app.exception_handler(Exception)
    async def fault(request: Request, error: Exception) -> Response:
        return refuse(request, internal_error(error))


def _readable(error: RequestValidationError) -> ApiError:
    """The first thing that is wrong with a body, where a union was tried the deepest."""
    first = max(error.errors(), key=lambda each: len(each["loc"]))
    if first["type"] == "json_invalid":
        reason = first.get("ctx", {}).get("error", "")
        return bad_request(f"the body is not valid JSON: {reason}", code="invalid_json")
    param = ".".join(str(part) for part in first["loc"][1:]) or "the body"
    allowed = "this field is not known" if first["type"] == "extra_forbidden" else first["msg"]
    return bad_request(f"{param}: {allowed}", param, "invalid_request")


def _document(app: FastAPI) -> None:
    """The OpenAPI document: refusals are 400 here, never 422."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = get_openapi(
                title=app.title, version=app.version, summary=app.summary, routes=app.routes
            )
            for path in document["paths"].values():
                for operation in path.values():
                    operation["responses"].pop("422", None)
            for name in ("HTTPValidationError", "ValidationError"):
                document["components"]["schemas"].pop(name, None)
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = openapi

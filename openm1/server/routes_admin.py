"""The verbs of reinforcement learning: pause, new weights, resume. Behind the admin key."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from openm1.server import documents
from openm1.server.documents import refusals
from openm1.server.errors import bad_request
from openm1.server.gate import check_admin
from openm1.server.protocol import PauseRequest, WeightUpdate
from openm1.server.serving import Serving

REPLIES = {**refusals(400, 401, 403, 408), 200: {"model": documents.PolicyState}}


def admin_routes(serving: Serving) -> APIRouter:
    router = APIRouter(tags=["Reinforcement learning"])
    served, config = serving.served, serving.config
    is_paused = False

    def state() -> Response:
        return JSONResponse({"is_paused": is_paused, "version": served.policy_version()})

    @router.get("/rl/state", responses=REPLIES)
    async def rl_state(request: Request) -> Response:
        check_admin(request.headers, config)
        return state()

    @router.post("/rl/pause", responses=REPLIES)
    async def pause(body: PauseRequest, request: Request) -> Response:
        """Answers when no step runs; none will until /rl/resume. New requests wait."""
        nonlocal is_paused
        check_admin(request.headers, config)
        await served.policy.pause()
        is_paused = True
        return state()

    @router.post("/rl/resume", responses=REPLIES)
    async def resume(request: Request) -> Response:
        nonlocal is_paused
        check_admin(request.headers, config)
        served.policy.resume()
        is_paused = False
        return state()

    @router.post("/rl/update_weights", responses=REPLIES)
    async def update_weights(body: WeightUpdate, request: Request) -> Response:
        """Weights of a checkpoint folder, between two steps; each token says which wrote it."""
        check_admin(request.headers, config)
        try:
            tensors = await asyncio.to_thread(lambda: list(served.read_weights(body.path)))
            await served.policy.update_weights(
                tensors, version=body.version, in_flight=body.in_flight
            )
        except (ValueError, OSError, KeyError) as error:
            raise bad_request(f"the weights cannot be loaded: {error}", "path") from error
        return state()

    return router

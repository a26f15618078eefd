"""Paths that Anthropic's clients know: messages and their tokens."""

from __future__ import annotations

from fastapi import APIRouter

from openm1.server.serving import Serving


def anthropic_routes(serving: Serving) -> APIRouter:
    return APIRouter(tags=["Anthropic"])

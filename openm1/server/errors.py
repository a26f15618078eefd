"""What a client is told when a request cannot be served, in either vendor's shape."""

from __future__ import annotations

import logging
from typing import Any

_LOG = logging.getLogger("openm1.server")

# What each vendor calls a failure of this HTTP status.
_OPENAI_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    503: "server_overloaded",
}
_ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    503: "overloaded_error",
}


class ApiError(Exception):
    """A refusal: HTTP status, a sentence, a code for programs, and the field at fault if any."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str,
        param: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.retry_after_s = retry_after_s

    @property
    def headers(self) -> dict[str, str]:
        if self.status == 401:
            return {"WWW-Authenticate": "Bearer"}
        return {} if self.retry_after_s is None else {"Retry-After": str(self.retry_after_s)}

    def body(self, *, anthropic: bool = False) -> dict[str, Any]:
        if anthropic:
            kind = _ANTHROPIC_TYPES.get(self.status, _other(self.status, "api_error"))
            error = {"type": kind, "message": self.message, "code": self.code}
            return {"type": "error", "error": error}
        kind = _OPENAI_TYPES.get(self.status, _other(self.status, "server_error"))
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}


def bad_request(message: str, param: str | None = None, code: str = "invalid_value") -> ApiError:
    return ApiError(400, message, code=code, param=param)


def internal_error(error: Exception) -> ApiError:
    """For a fault of ours: the log has all of it, the client learns that it was not theirs."""
    _LOG.error("a request failed", exc_info=error)
    return ApiError(500, "the server failed on this request; its log says why", code="internal")


def _other(status: int, server: str) -> str:
    return "invalid_request_error" if status < 500 else server

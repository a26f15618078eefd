"""What one server allows and how long it waits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerConfig:
    """Limits of one server. A request beyond one is refused with a reason, never cut in silence."""

    host: str = "127.0.0.1"
    port: int = 8000
    """0 takes a free one."""
    api_keys: Mapping[str, str] = field(default_factory=dict)
    """Key by the name its usage is metered under; none lets everybody in, as "anonymous"."""
    admin_key: str | None = None
    """For the RL verbs; without one there are none."""
    max_running_requests: int = 256
    """Replies written at a time; what comes beyond waits in the queue."""
    max_queued_requests: int = 1024
    """Replies that may wait; what comes beyond gets 503."""
    max_requests_per_key: int | None = None
    """Replies of one key at a time, waiting ones included; what comes beyond gets 429."""
    default_max_tokens: int = 8192
    """Tokens of a reply where the request names none, as far as the context has room."""
    thinking_budget: int | None = None
    """Tokens of thought where the request says nothing; None is free."""
    effort_budgets: Mapping[str, int] = field(
        default_factory=lambda: {
            "minimal": 512,
            "low": 4096,
            "medium": 16_384,
            "high": 40_000,
            "xhigh": 80_000,
            "max": 80_000,
        }
    )
    """Tokens of thought that each word of `reasoning_effort` stands for."""
    max_body_bytes: int = 16 * 2**20
    max_n: int = 128
    max_stop_strings: int = 16
    max_stop_characters: int = 256
    """Of one stop string."""
    max_top_logprobs: int = 20
    max_tools: int = 128
    max_schema_bytes: int = 256 * 2**10
    """Of a JSON schema, a regular expression, or all tools together, as JSON."""
    header_timeout_s: float = 15.0
    """For the request line and headers, and again for a kept connection's next ones."""
    body_timeout_s: float = 60.0
    drain_timeout_s: float = 600.0
    """How long running replies may go on after SIGTERM."""
    usage_url: str = "sqlite://"
    """Where usage is metered, as SQLAlchemy writes it; "sqlite://" forgets it with the process."""
    log_prompts: bool = False
    """Whether the request log holds what was asked and answered."""

    def __post_init__(self) -> None:
        for name in ("max_running_requests", "default_max_tokens", "max_body_bytes", "max_n"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; allowed is at least 1")
        for name in ("max_queued_requests", "max_stop_strings", "max_top_logprobs"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; allowed is at least 0")
        if self.thinking_budget is not None and self.thinking_budget < 0:
            raise ValueError(
                f"thinking_budget is {self.thinking_budget}; allowed is None or at least 0"
            )
        if not 0 <= self.port < 2**16:
            raise ValueError(f"port is {self.port}; allowed are 0 to 65535")
        if not all(self.api_keys.values()) or self.admin_key == "":
            raise ValueError("a key is empty; allowed are keys of at least one character")

"""What Prometheus may know: the names that serving engines have in common, under `openm1:`."""

from __future__ import annotations

import time
from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from openm1.server.gate import Gate
from openm1.server.served import ServedModel
from openm1.types import Completion

_LONG_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
_TOKENS = (1, 10, 100, 1_000, 10_000, 32_000, 128_000, 1_000_000)


class Metrics:
    """Counters and histograms of one server."""

    def __init__(self, served: ServedModel, gate: Gate) -> None:
        self.registry = CollectorRegistry()
        self._label = (served.name,)
        histograms = {
            "request_queue_time_seconds": ("Time a reply waited for its turn", _LONG_S),
            "time_to_first_token_seconds": ("From a request's arrival to its first token", _LONG_S),
            "time_per_output_token_seconds": ("Mean time from token to token of a reply", _TOKEN_S),
            "e2e_request_latency_seconds": ("From a request's arrival to its last token", _LONG_S),
            "request_prompt_tokens": ("Tokens of a prompt", _TOKENS),
            "request_generation_tokens": ("Tokens of a reply", _TOKENS),
            "request_reasoning_tokens": ("Tokens of a thought", _TOKENS),
        }
        self._histograms = {
            name: Histogram(
                f"openm1:{name}", text, ["model_name"], buckets=buckets, registry=self.registry
            ).labels(*self._label)
            for name, (text, buckets) in histograms.items()
        }
        counters = {
            "prompt_tokens": "Prompt tokens, cached ones included",
            "generation_tokens": "Tokens written",
            "reasoning_tokens": "Tokens written inside thoughts",
            "prefix_cache_queries": "Prompt tokens looked up in the cache",
            "prefix_cache_hits": "Prompt tokens found in the cache",
        }
        self._counters = {
            name: Counter(f"openm1:{name}", text, ["model_name"], registry=self.registry).labels(
                *self._label
            )
            for name, text in counters.items()
        }
        self._finished = Counter(
            "openm1:request_success",
            "Replies by how they ended",
            ["model_name", "finished_reason"],
            registry=self.registry,
        )
        self._responses = Counter(
            "openm1:http_responses",
            "HTTP responses",
            ["model_name", "path", "status"],
            registry=self.registry,
        )
        self.prompt_tokens = self.cached_tokens = 0
        self.registry.register(_Now(served, gate))

    def queued(self, waited_s: float) -> None:
        self._histograms["request_queue_time_seconds"].observe(waited_s)

    def finished(self, completion: Completion, timing: Timing) -> None:
        """Counts one reply, ended in whatever way."""
        num_tokens = len(completion.token_ids)
        self.prompt_tokens += completion.num_prompt_tokens
        self.cached_tokens += completion.cached_tokens
        counts = {
            "prompt_tokens": completion.num_prompt_tokens,
            "generation_tokens": num_tokens,
            "reasoning_tokens": completion.num_reasoning_tokens,
            "prefix_cache_queries": completion.num_prompt_tokens,
            "prefix_cache_hits": completion.cached_tokens,
        }
        for name, count in counts.items():
            self._counters[name].inc(count)
        self._finished.labels(*self._label, completion.finish_reason).inc()
        observed = {
            "request_prompt_tokens": completion.num_prompt_tokens,
            "request_generation_tokens": num_tokens,
            "request_reasoning_tokens": completion.num_reasoning_tokens,
            "e2e_request_latency_seconds": time.monotonic() - timing.came,
        }
        if timing.first_token is not None:
            observed["time_to_first_token_seconds"] = timing.first_token - timing.came
            if num_tokens > 1:
                writing = time.monotonic() - timing.first_token
                observed["time_per_output_token_seconds"] = writing / (num_tokens - 1)
        for name, value in observed.items():
            self._histograms[name].observe(value)

    def responded(self, path: str, status: int) -> None:
        self._responses.labels(*self._label, path, status).inc()

    def text(self) -> bytes:
        """The exposition format, version 0.0.4."""
        return generate_latest(self.registry)


class Timing:
    """When a reply was asked for and when it began."""

    def __init__(self) -> None:
        self.came = time.monotonic()
        self.first_token: float | None = None


class _Now(Collector):
    """What is read when somebody asks rather than counted."""

    def __init__(self, served: ServedModel, gate: Gate) -> None:
        self._served, self._gate = served, gate

    def collect(self) -> Iterable[Metric]:
        counts = self._served.cache_counts()
        usage = counts.in_use_bytes / counts.budget_bytes if counts.budget_bytes else 0.0
        values = {
            "num_requests_running": ("Replies being written", self._gate.num_running),
            "num_requests_waiting": ("Replies waiting for their turn", self._gate.num_waiting),
            "kv_cache_usage_perc": ("Share of the cache's memory in use, 1 being all", usage),
            "num_cache_pages_in_use": ("Pages of keys and values", counts.num_pages_in_use),
            "num_cache_states_in_use": ("States of lightning layers", counts.num_states_in_use),
            "policy_version": ("Version of the weights", self._served.policy_version()),
        }
        for name, (text, value) in values.items():
            family = GaugeMetricFamily(f"openm1:{name}", text, labels=["model_name"])
            family.add_metric([self._served.name], value)
            yield family

"""What the server counts, in Prometheus' format."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250)


class Metrics:
    """The metrics of one server, which has a registry of its own."""

    def __init__(self, rows_in_use: Callable[[], float], waiting: Callable[[], float]) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "dsb_requests", "HTTP requests that were answered", ["path", "status"],
            registry=registry,
        )  # fmt: skip
        self.prompt_tokens = Counter(
            "dsb_prompt_tokens", "tokens of the prompts that were taken", registry=registry
        )
        self.tokens = Counter(
            "dsb_tokens", "tokens of the answers, each up to its first EOS inclusive",
            registry=registry,
        )  # fmt: skip
        self.forwards = Counter(
            "dsb_forwards", "forwards, each counted once for every row that took part",
            registry=registry,
        )  # fmt: skip
        self.first_token = Histogram(
            "dsb_time_to_first_token_seconds",
            "from a streamed request's arrival to its first finished token",
            buckets=SECONDS, registry=registry,
        )  # fmt: skip
        self.last_token = Histogram(
            "dsb_time_to_last_token_seconds", "from a request's arrival to the end of each answer",
            buckets=SECONDS, registry=registry,
        )  # fmt: skip
        rows = Gauge("dsb_rows_in_use", "rows that are decoded now", registry=registry)
        rows.set_function(rows_in_use)
        queue = Gauge("dsb_queue_length", "rows that wait for room", registry=registry)
        queue.set_function(waiting)

    def text(self) -> bytes:
        return generate_latest(self.registry)

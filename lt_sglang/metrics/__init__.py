"""Prometheus metrics ``lt_*`` on SGLang's own /metrics, from every rank of the engine.

SGLang sets PROMETHEUS_MULTIPROC_DIR as it starts, and prometheus_client looks at it when it is first
imported. So nothing in this package imports prometheus_client before a scheduler publishes.
"""

from __future__ import annotations

from typing import Any

from lt_sglang.metrics.publisher import Publisher, Ticker
from lt_sglang.metrics.state import read_state

__all__ = ["ticker_for"]


def ticker_for(reporter: Any) -> Ticker:
    """What publishes the metrics of the scheduler that SGLang's ``reporter`` belongs to."""
    publisher: Publisher | None = None

    def publish() -> None:
        nonlocal publisher
        state = read_state(reporter.scheduler)
        if state is None:
            return
        if publisher is None:
            labels = reporter.metrics_collector.labels
            publisher = Publisher(labels, first_rank=reporter.is_stats_logging_rank)
        publisher.publish(state)

    return Ticker(publish)

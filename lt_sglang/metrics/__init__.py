"""Prometheus metrics ``lt_*`` on SGLang's own /metrics, from every rank of the engine.

SGLang sets PROMETHEUS_MULTIPROC_DIR as it starts, and prometheus_client looks at it when it is first
imported. So nothing in this package imports prometheus_client before a scheduler publishes.
"""

from __future__ import annotations

import logging
import time
from typing import Any

from lt_sglang.metrics.publisher import Publisher, Ticker
from lt_sglang.metrics.state import read_state

__all__ = ["ticker_for"]

logger = logging.getLogger(__name__)

# Two scrapes at the interval of the chart and of k8s/ray, and some.
LAST_SCRAPES_SECONDS = 35


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

    ticker = Ticker(publish)

    def before_stop() -> None:
        ticker.publish()
        logger.error(
            "check_tables: the ranks chose different layers; this engine serves nothing any more, and stops "
            "in %d s, when Prometheus has read lt_table_checks_total",
            LAST_SCRAPES_SECONDS,
        )
        time.sleep(LAST_SCRAPES_SECONDS)

    dynamic = getattr(reporter.scheduler.tp_worker.model_runner, "dynamic", None)
    if dynamic is not None:
        dynamic.before_stop = before_stop
    return ticker

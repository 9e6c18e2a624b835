"""SGLang's own count of what it did, from /metrics."""

from __future__ import annotations

from collections.abc import Mapping

import requests
from prometheus_client.parser import text_string_to_metric_families

# Our name -> SGLang's. Counters and the sums of histograms, over all labels.
COUNTERS = {
    "input_tokens": "prompt_tokens_total",
    "output_tokens": "generation_tokens_total",
    "requests": "num_requests_total",
    "ttft_seconds": "time_to_first_token_seconds_sum",
    "ttft_count": "time_to_first_token_seconds_count",
    "e2e_seconds": "e2e_request_latency_seconds_sum",
    "e2e_count": "e2e_request_latency_seconds_count",
}


def scrape(url: str, timeout_seconds: float = 30.0) -> dict[str, float] | None:
    """The counters of COUNTERS, 0 for those not shown yet; None if the server has no /metrics."""
    try:
        answer = requests.get(f"{url}/metrics", timeout=timeout_seconds)
    except requests.RequestException:
        return None
    if answer.status_code != 200:
        return None
    return read(answer.text)


def read(page: str) -> dict[str, float]:
    """The counters of COUNTERS in the text of a page."""
    totals: dict[str, float] = {}
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            name = sample.name.replace("sglang:", "").removeprefix("sglang_")
            totals[name] = totals.get(name, 0.0) + sample.value
    return {ours: totals.get(theirs, 0.0) for ours, theirs in COUNTERS.items()}


def between(before: Mapping[str, float] | None, after: Mapping[str, float] | None) -> dict[str, float] | None:
    """What happened between two scrapes, with the mean TTFT and E2E latency in milliseconds."""
    if before is None or after is None:
        return None
    change = {name: after[name] - before[name] for name in COUNTERS}
    for series in ("ttft", "e2e"):
        count = change[f"{series}_count"]
        if count:
            change[f"mean_{series}_ms"] = 1000 * change[f"{series}_seconds"] / count
    return change

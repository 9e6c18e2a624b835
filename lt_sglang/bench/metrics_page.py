"""SGLang's own count of what it did, from /metrics."""

from __future__ import annotations

from typing import Any

import requests
from prometheus_client.parser import text_string_to_metric_families

# Our name -> SGLang's. Counters and the sums of histograms, over all labels.
COUNTERS = {
    "input_tokens": "prompt_tokens_total",
    "output_tokens": "generation_tokens_total",
    "cached_tokens": "cached_tokens_total",
    "requests": "num_requests_total",
    "retractions": "num_retracted_requests_total",
    "ttft_seconds": "time_to_first_token_seconds_sum",
    "ttft_count": "time_to_first_token_seconds_count",
    "e2e_seconds": "e2e_request_latency_seconds_sum",
    "e2e_count": "e2e_request_latency_seconds_count",
}
# lt_* figures are published once a second.
PUBLISHED_S = 1.2
IDENTIFICATION, LAZY_REQUESTS = "lt_identification_seconds_total", "lt_layer_lazy_requests_total"


def scrape(url: str, timeout_seconds: float = 30.0) -> str | None:
    """The page of /metrics; None if the server has none."""
    try:
        answer = requests.get(f"{url}/metrics", timeout=timeout_seconds)
    except requests.RequestException:
        return None
    return answer.text if answer.status_code == 200 else None


def totals(page: str) -> dict[str, float]:
    """Every sample in the text of a page, summed over its labels, by SGLang's name without the prefix."""
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            name = sample.name.replace("sglang:", "").removeprefix("sglang_")
            found[name] = found.get(name, 0.0) + sample.value
    return found


def read(page: str) -> dict[str, float]:
    """The counters of COUNTERS in the text of a page, 0 for those not shown yet."""
    found = totals(page)
    return {ours: found.get(theirs, 0.0) for ours, theirs in COUNTERS.items()}


def lazy_layers(page: str | None) -> dict[str, float]:
    """The lt_* figures of a page that are no histograms and no times, by name and labels."""
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(page or ""):
        if not family.name.startswith("lt_") or family.type == "histogram":
            continue
        for sample in family.samples:
            if not sample.name.endswith("_created"):
                labels = ", ".join(f"{name} {value}" for name, value in sorted(sample.labels.items()))
                found[f"{sample.name} ({labels})" if labels else sample.name] = sample.value
    return found


def choices(before: str | None, after: str | None) -> dict[str, Any]:
    """How layers were chosen between two pages; empty where a page has no lt_* figures.

    lazy_requests: by layer, requests that ended and in which it was lazy. identification_seconds: what
    scoring and choosing took on the first GPU; dynamic mode only.
    """
    found: dict[str, float] = {}
    for sign, page in ((-1, before), (1, after)):
        for family in text_string_to_metric_families(page or ""):
            for sample in family.samples:
                if sample.name in (IDENTIFICATION, LAZY_REQUESTS):
                    key = sample.labels.get("layer", IDENTIFICATION)
                    found[key] = found.get(key, 0.0) + sign * sample.value
    seconds = found.pop(IDENTIFICATION, None)
    chosen: dict[str, Any] = {} if seconds is None else {"identification_seconds": round(seconds, 4)}
    if found:
        chosen["lazy_requests"] = {layer: int(found[layer]) for layer in sorted(found, key=int)}
    return chosen


def between(before: str | None, after: str | None) -> dict[str, float] | None:
    """What happened between two pages, with the mean TTFT and E2E latency in milliseconds."""
    if before is None or after is None:
        return None
    first, last = read(before), read(after)
    change = {name: last[name] - first[name] for name in COUNTERS}
    for series in ("ttft", "e2e"):
        count = change[f"{series}_count"]
        if count:
            change[f"mean_{series}_ms"] = 1000 * change[f"{series}_seconds"] / count
    return change

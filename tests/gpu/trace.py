"""What a GPU did in a torch profiler trace: time by kernel, and time without any.

python tests/gpu/trace.py TRACE.json.gz
"""

from __future__ import annotations

import gzip
import json
import re
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

GAP_US = 20.0


def summary(trace: Path, most: int = 24) -> dict[str, Any]:
    """Milliseconds: from the first kernel to the last, busy, in gaps of more than GAP_US, and by kernel."""
    with gzip.open(trace, "rt") as file:
        events = json.load(file)["traceEvents"]
    runs = sorted(
        (event["ts"], event["ts"] + event["dur"], event["name"])
        for event in events
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")
    )
    busy = idle = 0.0
    gaps: list[float] = []
    last = runs[0][0]
    by_kernel: dict[str, list[float]] = defaultdict(list)
    for start, end, name in runs:
        if start - last > GAP_US:
            gaps.append(start - last)
        idle += max(start - last, 0.0)
        busy += max(end - max(start, last), 0.0)
        last = max(last, end)
        by_kernel[short(name)].append(end - start)
    top = sorted(by_kernel.items(), key=lambda item: -sum(item[1]))[:most]
    return {
        "span_ms": (last - runs[0][0]) / 1e3,
        "busy_ms": busy / 1e3,
        "idle_ms": idle / 1e3,
        "longest_gaps_ms": [gap / 1e3 for gap in sorted(gaps, reverse=True)[:8]],
        "kernels": [[name, sum(times) / 1e3, len(times)] for name, times in top],
    }


def short(name: str) -> str:
    """A kernel's name without template arguments and namespaces, and long enough to tell it from others."""
    plain = re.sub(r"<.*", "", name.removeprefix("void "))
    return f"{plain.split('::')[-1]}{'*' if '<' in name else ''}"[:60]


def lines(found: dict[str, Any]) -> list[str]:
    """The summary as text."""
    gaps = " ".join(f"{gap:.1f}" for gap in found["longest_gaps_ms"])
    head = (
        f"span {found['span_ms']:.1f} ms, busy {found['busy_ms']:.1f}, idle {found['idle_ms']:.1f} ({gaps})"
    )
    return [head, *(f"  {ms:9.2f} ms {count:6d}  {name}" for name, ms, count in found["kernels"])]


if __name__ == "__main__":
    print("\n".join(lines(summary(Path(sys.argv[1])))))

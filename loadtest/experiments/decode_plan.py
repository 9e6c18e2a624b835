"""Decode attention under FlashInfer's plan and under ours (lt_sglang/attention/decode_plan.py), on a GPU.

    python -m loadtest.experiments.decode_plan OUT.json

One layer of 32 query and 8 KV heads of 128, bfloat16, rows in random order. ``host``: FlashInfer plans the
very lists. ``longest``: its plan of lists as long as the longest, all that the host can do in dynamic mode.
``device``: ours, by chunks a place, and by rounds of lists of one length. Microseconds: the median over
replays of a CUDA graph of RUNS runs. Outputs are held to the host plan's. Exits with 1 if one is off.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from loadtest.experiments.offline import stamped
from loadtest.experiments.timing import (
    DIM,
    HEADS,
    KV_HEADS,
    PagedDecode,
    decode_workspace,
    graph_clock,
)
from lt_sglang.attention import decode_plan
from lt_sglang.attention.decode_plan import DecodePlan, decode_plans
from lt_sglang.attention.flashinfer_plans import host_indptr
from lt_sglang.attention.flashinfer_private import plan_info, planned

ROWS = 2_800_000
RUNS = 20
LAYERS = 32
CASES = {
    "47 x 16K": [16384] * 47,
    "24 x 16K, 23 x 1K": [16384, 1024] * 23 + [16384],
    "16 x 8K, 16 x 1K": [8192, 1024] * 16,
    "6 x 32K, 6 x 1K": [32768, 1024] * 6,
    "12 x 32K": [32768] * 12,
    "8 x 16K": [16384] * 8,
    "99 x 4K": [4096] * 99,
    "1 x 32K": [32768],
    "47 x 1K": [1024] * 47,
    "95 x 1K": [1024] * 95,
    "168 x 1K": [1024] * 168,
    # Three quarters of the layers lazy on an H200: in static mode, and in dynamic mode.
    "168 x 16K": [16384] * 168,
    "42 x 16K, 126 x 1K": [16384, 1024, 1024, 1024] * 42,
    "177 x 8K": [8192] * 177,
}
LIMITS = ((2, 0), (3, 0), (4, 0), (6, 0), (3, 8), (3, 16), (3, 32))
TOLERANCE = 4e-3


def measure(
    lengths: list[int], cache: tuple[torch.Tensor, torch.Tensor], workspace: torch.Tensor
) -> dict[str, Any]:
    """Microseconds by plan, and the largest difference of ours from the host plan's output."""
    requests = len(lengths)
    indptr = host_indptr(lengths)
    pointers = indptr.cuda()
    rows = torch.randperm(ROWS, device="cuda")[: sum(lengths)].to(torch.int32)
    decode = PagedDecode(requests, ROWS, (HEADS, KV_HEADS, DIM), workspace)
    wrapper = decode.wrapper

    def plan(lens: list[int]) -> None:
        decode.plan(lens, rows)
        wrapper._paged_kv_indptr_buf.copy_(pointers)

    query = decode.query()
    plan(lengths)
    expected = wrapper.run(query, cache)
    found: dict[str, Any] = {
        "host": graph_clock(lambda: wrapper.run(query, cache), RUNS)(),
        "device": {},
        "difference": 0.0,
    }
    plan([max(lengths)] * requests)
    found["longest"] = graph_clock(lambda: wrapper.run(query, cache), RUNS)()
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    ours = decode_plan.CHUNKS_PER_PLACE, decode_plan.ROUNDS
    for limits in LIMITS:
        decode_plan.CHUNKS_PER_PLACE, decode_plan.ROUNDS = limits
        device = DecodePlan.like(plan_info(wrapper), requests, HEADS, KV_HEADS, DIM, processors)
        out = torch.zeros((1, device.end), dtype=torch.uint8, device="cuda")
        decode_plans(out, pointers, device)

        def run(device: DecodePlan = device, out: torch.Tensor = out) -> torch.Tensor:
            with planned(wrapper, device.info, out[0]):
                return wrapper.run(query, cache)

        difference = (run().float() - expected.float()).abs().max().item()
        found["difference"] = max(found["difference"], difference)
        found["device"]["{}, {} rounds".format(*limits)] = graph_clock(run, RUNS)()
        if limits == ours:
            every = torch.zeros((LAYERS, device.end), dtype=torch.uint8, device="cuda")
            all_pointers = host_indptr(lengths * LAYERS).cuda()
            found["planning, 32 layers"] = graph_clock(
                lambda: decode_plans(every, all_pointers, device),  # noqa: B023
                RUNS,
            )()
    decode_plan.CHUNKS_PER_PLACE, decode_plan.ROUNDS = ours
    bytes_read = sum(lengths) * KV_HEADS * DIM * 2 * 2
    found["host TB/s"] = bytes_read / found["host"] / 1e6
    found["device TB/s"] = bytes_read / found["device"]["{}, {} rounds".format(*ours)] / 1e6
    return found


def main() -> None:
    torch.manual_seed(0)
    shape = (ROWS, 1, KV_HEADS, DIM)
    keys, values = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    workspace = decode_workspace()
    what = "microseconds of decode attention in one layer, 32 query and 8 KV heads of 128, bfloat16"
    report = stamped("decode-plan", what)
    results: dict[str, Any] = report.setdefault("lists", {})
    wrong = False
    for name, lengths in CASES.items():
        found = results[name] = measure(lengths, (keys, values), workspace)
        wrong |= found["difference"] > TOLERANCE
        device = "  ".join(f"{limits}: {us:.1f}" for limits, us in found["device"].items())
        print(
            f"{name:20s} host {found['host']:7.1f}  longest {found['longest']:7.1f}  device {device}  "
            f"({found['host TB/s']:.2f}, {found['device TB/s']:.2f} TB/s)  "
            f"planning {found['planning, 32 layers']:.1f}  difference {found['difference']:.1e}",
            flush=True,
        )
    Path(sys.argv[1]).write_text(json.dumps(report, indent=1) + "\n")
    sys.exit(wrong)


if __name__ == "__main__":
    main()

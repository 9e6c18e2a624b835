"""Attention and copies on a GPU by where a layer's K and V rows lie: the choice for elastic memory.

    python -m loadtest.experiments.kv_layouts OUT_FOLDER [--gib 52] [--repeats 5]

One buffer holds K and V of all layers; only the views of it differ, so every layout reads the same bytes.

    split      each layer's K and V in a range of its own, as the fixed split has it
    region     g = gcd(P, L - P) regions; in each, P/g full and (L - P)/g streaming lanes, K beside V
    region-kv  the same with K and V in regions of their own, 2 g of them
    envelope   all full layers of a token side by side, K beside V (SGLang's --enable-unified-memory)

Decode runs FlashInfer's tensor-core kernel at page size 1 in a CUDA graph over all layers of a kind: full
ones over whole requests, lazy ones over 1,024 rows each. Rows come in random order by pages of 16 or one by
one, or in line. ``gather`` copies the rows of 32K tokens, as a prefill does. ``move`` copies 1,024 pages of
16 tokens within the buffer, as compaction does. ``swap`` exchanges 16K rows between a full and a streaming
layer. Microseconds a layer, one value a repeat; repeats go round the layouts. Outputs over equal rows must
be equal, or it exits with 1.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from loadtest.experiments.offline import stamped
from loadtest.experiments.timing import PagedDecode, graph_clock

HEADS, KV_HEADS, DIM = 32, 8, 128
ROW = KV_HEADS * DIM  # elements of one token's K in one layer
PAGE = 16
WINDOW = 1024
REPLAYS = 5
SEED = 0
LAYOUTS = ("split", "region", "region-kv", "envelope")
# P full layers, L - P lazy ones.
SHAPES = {"16+16": (16, 16), "8+24": (8, 24), "13+19": (13, 19)}
ORDERS = ("pages", "rows", "in line")

View = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Views:
    """K and V of each full and each lazy layer; slots: rows of each kind that fit beside one another."""

    full: list[View]
    lazy: list[View]
    slots: tuple[int, int]


def views(raw: torch.Tensor, layout: str, full: int, lazy: int, slots: tuple[int, int]) -> Views:
    """Views of ``raw`` (bfloat16 [n]) for ``slots`` rows of each kind."""

    def strided(offset: int, stride: int, rows: int) -> torch.Tensor:
        return torch.as_strided(raw, (rows, 1, KV_HEADS, DIM), (stride, stride, DIM, 1), offset)

    def lanes(start: int, layers: int, rows: int, regions: int, size: int, apart: bool) -> list[View]:
        """``layers`` spread over regions of ``size`` elements; apart: K and V in different ones."""
        here = layers // regions
        width = here * ROW * (1 if apart else 2)
        found = []
        for layer in range(layers):
            region, lane = divmod(layer, here)
            if apart:
                base = start + 2 * region * size + lane * ROW
                found.append((strided(base, width, rows), strided(base + size, width, rows)))
            else:
                base = start + region * size + 2 * lane * ROW
                found.append((strided(base, width, rows), strided(base + ROW, width, rows)))
        return found

    def both(regions: int, apart: bool) -> Views:
        parts = regions * (2 if apart else 1)
        lane = ROW * (1 if apart else 2)
        full_size = full // regions * lane * slots[0]
        size = full_size + lazy // regions * lane * slots[1]
        assert size * parts <= raw.numel()
        return Views(
            lanes(0, full, slots[0], regions, size, apart),
            lanes(full_size, lazy, slots[1], regions, size, apart),
            slots,
        )

    if layout == "split":
        size = 2 * ROW
        at = [layer * size * slots[0] for layer in range(full)]
        after = full * size * slots[0]
        at_lazy = [after + layer * size * slots[1] for layer in range(lazy)]
        return Views(
            [(strided(a, ROW, slots[0]), strided(a + ROW * slots[0], ROW, slots[0])) for a in at],
            [(strided(a, ROW, slots[1]), strided(a + ROW * slots[1], ROW, slots[1])) for a in at_lazy],
            slots,
        )
    return both(1 if layout == "envelope" else math.gcd(full, lazy), layout == "region-kv")


def rows_in_order(count: int, slots: int, order: str) -> torch.Tensor:
    """int32 [count], distinct rows below ``slots``; row 0 is padding."""
    if order == "in line":
        return torch.arange(1, count + 1, device="cuda", dtype=torch.int32)
    if order == "rows":
        return (torch.randperm(slots - 1, device="cuda")[:count] + 1).to(torch.int32)
    pages = torch.randperm(slots // PAGE - 1, device="cuda")[: -(-count // PAGE)] + 1
    return (pages[:, None] * PAGE + torch.arange(PAGE, device="cuda")).flatten()[:count].to(torch.int32)


class Decode:
    """FlashInfer's decode over ``lengths`` tokens a request; its plan serves every layer and layout."""

    def __init__(self, lengths: list[int], rows: torch.Tensor, workspace: torch.Tensor) -> None:
        decode = PagedDecode(len(lengths), len(rows), (HEADS, KV_HEADS, DIM), workspace)
        decode.plan(lengths, rows)
        self.query, self.wrapper = decode.query(), decode.wrapper

    def run(self, layers: list[View]) -> torch.Tensor:
        """Attend in each layer; the last one's output."""
        for layer in layers:
            out = self.wrapper.run(self.query, layer)
        return out


def check(raw: torch.Tensor, full: int, lazy: int, slots: tuple[int, int], workspace: torch.Tensor) -> float:
    """The largest difference of any layout's output from the first one's, over equal rows."""
    lengths = [1024, 500, 3000]
    rows = rows_in_order(sum(lengths), slots[1], "rows")
    data = [torch.randn(len(rows), 1, KV_HEADS, DIM, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    decode = Decode(lengths, rows, workspace)
    worst = 0.0
    expected = None
    for layout in LAYOUTS:
        found = views(raw, layout, full, lazy, slots)
        for layer in (found.full[0], found.full[-1], found.lazy[0], found.lazy[-1]):
            for part, values in zip(layer, data, strict=True):
                part.index_copy_(0, rows.long(), values)
            out = decode.run([layer]).float()
            expected = out if expected is None else expected
            worst = max(worst, (out - expected).abs().max().item())
    return worst


Tasks = dict[str, tuple[int, Callable[[], Any]]]


def tasks(found: Views, layout: str, decodes: dict[str, tuple[Decode, Decode]]) -> Tasks:
    """What is timed, and over how many layers."""
    work: Tasks = {}
    full, lazy = len(found.full), len(found.lazy)
    for order, (whole, windows) in decodes.items():
        work[f"decode full, {order}"] = full, partial(whole.run, found.full)
        work[f"decode lazy, {order}"] = lazy, partial(windows.run, found.lazy)
    spread = rows_in_order(32768, found.slots[0], "pages").long()
    parts = [part for layer in found.full for part in layer]
    work["gather 32K"] = full, lambda: [part.index_select(0, spread) for part in parts]
    target = rows_in_order(16384, found.slots[0], "pages").long()
    window = rows_in_order(16384, found.slots[1], "pages").long()

    def swap() -> None:
        for one, other in zip(found.full[0], found.lazy[0], strict=True):
            kept = one.index_select(0, target)
            one.index_copy_(0, target, other.index_select(0, window))
            other.index_copy_(0, window, kept)

    work["swap 16K"] = 1, swap
    pages = torch.randperm(found.slots[0] // PAGE, device="cuda")[:2048]
    pieces = _page_pieces(found.full, layout, full, lazy)

    def move() -> None:
        for piece in pieces:
            piece.index_copy_(0, pages[:1024], piece.index_select(0, pages[1024:]))

    work["move 1,024 pages"] = full, move
    return work


def _page_pieces(layers: list[View], layout: str, full: int, lazy: int) -> list[torch.Tensor]:
    """The buffer's full rows as [pages, elements], one piece for each range that is contiguous by page."""
    regions = {"split": full, "envelope": 1}.get(layout, math.gcd(full, lazy))
    lanes = full // regions
    pieces = []
    for layer in layers[::lanes]:
        apart = layout in ("split", "region-kv")
        for part in layer if apart else layer[:1]:
            stride = part.stride(0)
            shape = (part.shape[0] // PAGE, PAGE * stride)
            pieces.append(torch.as_strided(part, shape, (PAGE * stride, 1), part.storage_offset()))
    return pieces


def measure(
    raw: torch.Tensor, full: int, lazy: int, repeats: int, workspace: torch.Tensor
) -> dict[str, dict[str, list[float]]]:
    """By layout and task, microseconds a layer, one value a repeat."""
    requests, length = 47, 16384
    # As many requests of 16K as fit with their windows.
    bytes_of = 2 * ROW * 2
    requests = min(requests, int(raw.numel() * 2 / (bytes_of * (full * length + lazy * WINDOW)) * 0.98))
    slots = (requests * length + PAGE * 64) // PAGE * PAGE, max(requests * WINDOW + PAGE * 64, 20480)
    decodes = {}
    for order in ORDERS:
        long_rows = rows_in_order(requests * length, slots[0], order)
        short_rows = rows_in_order(requests * WINDOW, slots[1], order)
        decodes[order] = (
            Decode([length] * requests, long_rows, workspace),
            Decode([WINDOW] * requests, short_rows, workspace),
        )
    times: dict[str, dict[str, list[float]]] = {layout: {} for layout in LAYOUTS}
    names = list(tasks(views(raw, "split", full, lazy, slots), "split", decodes))
    for name in names:
        clocks = {}
        for layout in LAYOUTS:
            count, run = tasks(views(raw, layout, full, lazy, slots), layout, decodes)[name]
            clocks[layout] = count, graph_clock(run, replays=REPLAYS)
        for _ in range(repeats):
            for layout, (count, clock) in clocks.items():
                times[layout].setdefault(name, []).append(round(clock() / count, 2))
    return times


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gib", type=float, default=52, help="of the buffer")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.manual_seed(SEED)
    raw = torch.empty(int(args.gib * 2**30) // 2, dtype=torch.bfloat16, device="cuda").normal_()
    workspace = torch.empty(384 << 20, dtype=torch.uint8, device="cuda")
    result = stamped(
        "kv-layouts",
        "microseconds a layer, one value a repeat",
        heads=HEADS,
        kv_heads=KV_HEADS,
        dim=DIM,
        window_rows=WINDOW,
        dtype="bfloat16",
    )
    result["shapes"] = {}
    args.folder.mkdir(parents=True, exist_ok=True)
    out = args.folder / "kv-layouts.json"
    wrong = False
    for name, (full, lazy) in SHAPES.items():
        difference = check(raw, full, lazy, (65536, 65536), workspace)
        wrong |= difference != 0
        raw.normal_()
        times = measure(raw, full, lazy, args.repeats, workspace)
        result["shapes"][name] = {"largest_difference": difference, "us_per_layer": times}
        out.write_text(json.dumps(result, indent=1) + "\n")
        print(f"{name}: outputs differ by {difference}", flush=True)
        for task in times["split"]:
            middle = {layout: median(times[layout][task]) for layout in LAYOUTS}
            shown = "  ".join(
                f"{layout} {us:9.1f} ({us / middle['split']:.3f})" for layout, us in middle.items()
            )
            print(f"  {task:24s} {shown}", flush=True)
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())

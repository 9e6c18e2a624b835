"""Decode attention of one layer by kernel and type of the KV cache, on a GPU: what bandwidth each reaches.

    python -m loadtest.experiments.decode_kernels OUT.json

32 query and 8 KV heads of 128, pages of 1 and of 16 in random order. fa2: FlashInfer's tensor-core decode,
which serves lazy layers and stock SGLang's flashinfer. fa3: stock SGLang's FlashAttention-3 (left out where
its kernels are missing), with queries of the cache's type, as SGLang has it. Microseconds: the median over
replays of a CUDA graph of RUNS runs. TB/s count K and V once. Outputs are held to float32 attention over the
first list; exits with 1 if one is off.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
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

ROWS = 1_800_000
RUNS = 20
PAGES = (1, 16)
LISTS = {
    "12 x 16K": (12, 16384),
    "50 x 16K": (50, 16384),
    "100 x 16K": (100, 16384),
    "25 x 32K": (25, 32768),
    "100 x 8K": (100, 8192),
    "100 x 1K": (100, 1024),
}
DTYPES = {"bfloat16": torch.bfloat16, "fp8_e4m3": torch.float8_e4m3fn}
# Largest difference of an output from float32's: rounded probabilities and, in fa3, rounded queries.
TOLERANCE = {"bfloat16": 4e-3, "fp8_e4m3": 4e-2}
Cache = tuple[torch.Tensor, torch.Tensor]


def expected(query: torch.Tensor, cache: Cache, rows: torch.Tensor) -> torch.Tensor:
    """Attention in float32 of one query [HEADS, DIM] over ``rows`` of the cache [ROWS, KV_HEADS, DIM]."""
    keys, values = (part[rows.long()].float().transpose(0, 1) for part in cache)
    grouped = query.float().view(KV_HEADS, -1, DIM)
    weights = torch.softmax(grouped @ keys.transpose(1, 2) * DIM**-0.5, dim=-1)
    return (weights @ values).view(HEADS, DIM)


def flashinfer_decode(
    query: torch.Tensor, cache: Cache, rows: torch.Tensor, page: int, workspace: torch.Tensor
) -> Callable[[], torch.Tensor]:
    """FlashInfer's decode of lists ``rows`` [requests, length]."""
    requests, length = rows.shape
    decode = PagedDecode(requests, rows.numel() // page, (HEADS, KV_HEADS, DIM), workspace, cache[0].dtype)
    decode.plan([length // page] * requests, (rows[:, ::page] // page).flatten(), page)
    paged = tuple(part.view(-1, page, KV_HEADS, DIM) for part in cache)
    return lambda: decode.wrapper.run(query, paged)


def fa3_decode(
    query: torch.Tensor, cache: Cache, rows: torch.Tensor, page: int
) -> Callable[[], torch.Tensor]:
    """FlashAttention-3's decode of lists ``rows`` [requests, length], called as SGLang calls it."""
    from sglang.kernels.ops.attention.flash_attention import flash_attn_with_kvcache

    requests, length = rows.shape
    keys, values = (part.view(-1, page, KV_HEADS, DIM) for part in cache)
    table = (rows[:, ::page] // page).contiguous()
    lengths = torch.full((requests,), length, dtype=torch.int32, device="cuda")
    ends = torch.arange(requests + 1, dtype=torch.int32, device="cuda")
    scales = {}
    if keys.dtype != torch.bfloat16:
        one = torch.ones((requests, KV_HEADS), device="cuda")
        scales = {"k_descale": one, "v_descale": one}
    return lambda: flash_attn_with_kvcache(
        q=query.to(keys.dtype),
        k_cache=keys,
        v_cache=values,
        page_table=table,
        cache_seqlens=lengths,
        cu_seqlens_q=ends,
        max_seqlen_q=1,
        softmax_scale=DIM**-0.5,
        causal=True,
        **scales,
    )


def has_fa3() -> bool:
    """Whether SGLang finds its FlashAttention-3 kernels."""
    try:
        import sglang.kernels.ops.attention.flash_attention  # noqa: F401
    except ImportError as error:
        print(f"fa3 is left out: {error}", flush=True)
        return False
    return True


def measure(
    requests: int, length: int, cache: Cache, workspace: torch.Tensor, page: int, with_fa3: bool
) -> dict[str, Any]:
    """By kernel: microseconds, TB/s, and the largest difference of the first output from float32's."""
    pages = torch.randperm(ROWS // page, device="cuda")[: requests * length // page].to(torch.int32)
    offsets = torch.arange(page, dtype=torch.int32, device="cuda")
    rows = (pages[:, None] * page + offsets).view(requests, length)
    query = torch.randn(requests, HEADS, DIM, device="cuda", dtype=torch.bfloat16)
    right = expected(query[0], cache, rows[0])
    runs = {"fa2": flashinfer_decode(query, cache, rows, page, workspace)}
    if with_fa3:
        runs["fa3"] = fa3_decode(query, cache, rows, page)
    found: dict[str, Any] = {}
    for name, run in runs.items():
        difference = (run()[0].float() - right).abs().max().item()
        us = graph_clock(run, RUNS)()
        size = 2 * rows.numel() * KV_HEADS * DIM * cache[0].element_size()
        found[name] = {"us": us, "TB/s": size / us / 1e6, "difference": difference}
    return found


def main() -> None:
    torch.manual_seed(0)
    workspace, with_fa3 = decode_workspace(), has_fa3()
    what = "microseconds of decode attention in one layer, 32 query and 8 KV heads of 128"
    report = stamped("decode-kernels", what)
    results: dict[str, Any] = report.setdefault("lists", {})
    wrong = False
    for dtype, kind in DTYPES.items():
        keys, values = (
            torch.randn((ROWS, KV_HEADS, DIM), device="cuda", dtype=torch.bfloat16).to(kind) for _ in range(2)
        )
        for page in PAGES:
            for name, (requests, length) in LISTS.items():
                found = measure(requests, length, (keys, values), workspace, page, with_fa3)
                results.setdefault(dtype, {}).setdefault(f"pages of {page}", {})[name] = found
                wrong |= any(one["difference"] > TOLERANCE[dtype] for one in found.values())
                told = "  ".join(
                    f"{kernel} {one['us']:.1f} us, {one['TB/s']:.2f} TB/s (off by {one['difference']:.1e})"
                    for kernel, one in found.items()
                )
                print(f"{dtype:9s} pages of {page:2d}  {name:10s} {told}", flush=True)
                Path(sys.argv[1]).write_text(json.dumps(report, indent=1) + "\n")
        del keys, values
    sys.exit(wrong)


if __name__ == "__main__":
    main()

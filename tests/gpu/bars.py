"""Both modes against stock SGLang on one GPU of 80 GB, memory full: 4K to 32K decode, one 32K prompt.

    python tests/gpu/bars.py OUT_FOLDER [--only fa3,16k,8k,4k,32k,room,prefill] [--budget-s 540]

Mistral-7B's shape, half of the layers lazy; each engine is split for the length it is measured at. In dynamic
mode every request has layers of its own. room: 32K prompts in dynamic mode with less staging memory, or none.
See run.py for the table and the files.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.gpu.dynamic import dynamic_step
from tests.gpu.run import PREFILL_32K, Run, Step, arguments, cell, lazy_step, run_cells, stock_step
from tests.gpu.shapes import MISTRAL_7B

# Prompt tokens: requests sent to stock SGLang and to lazy layers, a few more than 80 GB hold.
LENGTHS = {4096: (106, 165), 8192: (55, 96), 16384: (29, 52), 32768: (14, 28)}
QUICK: dict[str, Any] = {
    "disable_prefill_cuda_graph": True,
    "cuda_graph_bs_decode": [1, 2, 4, *range(8, 168, 8)],
}


def static(tokens: int, *more: dict[str, Any]) -> Step:
    """Half of the layers lazy, a fixed list."""
    return lazy_step(tokens, "half", [cell(tokens, LENGTHS[tokens][1]), *more], 150, **QUICK)


def dynamic(tokens: int, name: str = "dynamic", *more: dict[str, Any], **options: Any) -> Step:
    """Half of the layers lazy, others for every request. options: keys of the configuration."""
    cells, name = [*more, cell(tokens, LENGTHS[tokens][1])], f"{name}_{tokens // 1024}k"
    options = {"score": "lighttransfer", **options}
    return dynamic_step(name, cells, 150, MISTRAL_7B, QUICK, tokens=tokens, **options)


def steps() -> dict[str, list[Step]]:
    """The engines of each part; all have the same flags."""
    stock = [cell(tokens, requests) for tokens, (requests, _) in LENGTHS.items()]

    def by_chunk(name: str, score: str) -> Step:
        options = {"score": score, "decide": "first-chunk"}
        return dynamic_step(name, [PREFILL_32K], 90, MISTRAL_7B, QUICK, **options)

    return {
        "fa3": [stock_step("fa3", [PREFILL_32K, *stock], 240, **QUICK)],
        "16k": [static(16384, PREFILL_32K), dynamic(16384)],
        "8k": [static(8192), dynamic(8192)],
        "4k": [static(4096)],
        "32k": [static(32768, PREFILL_32K), dynamic(32768)],
        # Prompts of whole chunks of 8,192 tokens: all but the last one wait.
        "room": [
            dynamic(32768, "dynamic_staging", staging_tokens=32768 - 8192),
            dynamic(32768, "dynamic_first_chunk", PREFILL_32K, decide="first-chunk"),
        ],
        "prefill": [
            by_chunk("dynamic_first_chunk", "lighttransfer"),
            by_chunk("dynamic_residual_first_chunk", "residual-error"),
            stock_step("flashinfer", [PREFILL_32K], 90, **QUICK),
        ],
        "fa3_prefill": [stock_step("fa3", [PREFILL_32K], 90, **QUICK)],
        "static_32k": [static(32768, PREFILL_32K)],
    }


def main() -> None:
    parts = steps()
    every = ",".join(name for name in parts if name not in ("fa3_prefill", "static_32k"))  # parts of others
    args, common = arguments(argparse.ArgumentParser(description=__doc__), every)
    run = Run(args.folder, args.budget_s, common)
    try:
        run_cells(run, [step for name in args.only.split(",") for step in parts[name]])
    finally:
        run.save()
        run.close()
    print("\n" + "\n".join(run.table), flush=True)


if __name__ == "__main__":
    main()

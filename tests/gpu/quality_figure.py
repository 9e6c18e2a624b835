"""Divergence against discarded attention mass, from what tests/gpu/quality.py measured.

    python -m tests.gpu.quality_figure FOLDER/report.json FIGURE.png

One dot a text and configuration; texts that were not cached have none. Across: the mean attention mass that
the text's last queries lose in its lazy layers, summed over those (the term of the paper's Theorem 5.1), read
off the paper's own score, so ``lighttransfer-50`` must be in the report. Up: KL divergence from full
attention. Prints Spearman's rank correlation over all dots, and each configuration's means.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scipy.stats import spearmanr

from lt_sglang.config import parse_layers
from lt_sglang.eval.plots import require_matplotlib

RATIOS = "lighttransfer-50"


def dots(report: dict[str, Any]) -> dict[str, list[tuple[float, float]]]:
    """(summed discarded mass, KL in nats) of each text, by configuration."""
    ratios = [decision["laziness"] for decision in report[RATIOS]["kl"]["decisions"]]
    found = {}
    for name, entry in report.items():
        if "kl" not in entry:
            continue
        told = (entry["lighttransfer"] or {}).get("lazy_layers", "none")
        static = parse_layers(told) if isinstance(told, str) else tuple(told)
        pairs = []
        for mass, decision, kl in zip(ratios, entry["kl"]["decisions"], entry["kl"]["texts"], strict=True):
            if kl is None:
                continue
            lazy = decision["lazy_layers"] if decision else static
            pairs.append((sum(1 - mass[layer] for layer in lazy), kl))
        found[name] = pairs
    return found


def spearman(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Rank correlation; None where all masses are equal."""
    mass, kl = zip(*pairs, strict=True)
    return float(spearmanr(mass, kl).statistic) if len(set(mass)) > 1 else None


def draw(found: dict[str, list[tuple[float, float]]], path: Path) -> None:
    """The figure."""
    figure, axis = require_matplotlib().subplots(figsize=(7, 4.5))
    for name, pairs in found.items():
        mass, kl = zip(*pairs, strict=True)
        axis.scatter(mass, [max(value, 1e-6) for value in kl], s=10, label=name)
    axis.set_yscale("log")
    axis.set_xlabel("mean discarded attention mass, summed over lazy layers")
    axis.set_ylabel("KL divergence, nats")
    axis.legend(fontsize=6)
    figure.savefig(path, dpi=150, bbox_inches="tight")


def main() -> None:
    """Draw, and print the correlation."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("report", type=Path)
    parser.add_argument("figure", type=Path)
    args = parser.parse_args()
    found = dots(json.loads(args.report.read_text()))
    for name, pairs in found.items():
        mass, kl = (statistics.fmean(values) for values in zip(*pairs, strict=True))
        print(f"{name:26s} discarded mass {mass:.3f}  KL {kl:.5f}")
    draw(found, args.figure)
    every = [pair for pairs in found.values() for pair in pairs]
    print(f"Spearman {spearman(every)} over {len(every)} dots")


if __name__ == "__main__":
    main()

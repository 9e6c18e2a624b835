"""Result files, tables of docs/quality.md and the figure, from what the experiments on quality wrote.

    python -m loadtest.experiments.quality_results keys RESULT.json REPORT.json... [--against residual-50,..]
    python -m loadtest.experiments.quality_results kl RESULT.json REPORT.json [--figure FIGURE.png]
    python -m loadtest.experiments.quality_results kvpress RESULT.json FILE.json

keys, kl: of quality.py; kvpress: of kvpress_baselines.py. Reports of several runs with the same prompts
are merged; each must hold full attention. With --against, each configuration is also compared with these,
prompt by prompt. Files may be gzipped.

The figure has a dot a text and configuration; texts that were not cached have none. Across: the mean
attention mass that the text's last queries lose in its lazy layers, summed over those (the term of the
paper's Theorem 5.1), read off the paper's own score, so ``lighttransfer-50`` must be in the report. Up: KL
divergence from full attention.
"""

from __future__ import annotations

import argparse
import gzip
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scipy.stats import spearmanr

from loadtest.experiments.quality import FULL
from lt_sglang.config import parse_layers
from lt_sglang.eval.intervals import paired_rates, sign_test
from lt_sglang.eval.plots import require_matplotlib

RATIOS = "lighttransfer-50"
Report = dict[str, Any]
Dots = dict[str, list[tuple[float, float]]]


def load(path: Path) -> Report:
    """JSON, gzipped or not."""
    raw = path.read_bytes()
    report: Report = json.loads(gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw)
    return report


def merge(reports: list[Report]) -> Report:
    """Configurations of all reports; of one that several hold, the first."""
    merged: Report = {}
    for report in reports:
        if FULL not in report["configurations"]:
            raise SystemExit("a report without full attention: its differences have nothing to refer to")
        for name, entry in report["configurations"].items():
            merged.setdefault(name, entry)
    return merged


def without_decisions(kl: dict[str, Any]) -> dict[str, Any]:
    """A divergence as it is kept."""
    return {name: value for name, value in kl.items() if name != "decisions"}


def keys_entries(found: Report, against: Sequence[str]) -> Report:
    """Each configuration without its single answers; its difference from each of ``against``, paired."""
    hits = {name: [trial["found"] for trial in entry["trials"]] for name, entry in found.items()}
    entries: Report = {}
    for name, entry in found.items():
        entries[name] = {"config": entry["config"], "cells": entry["cells"], "differences": {}}
        if "kl" in entry:
            entries[name]["kl"] = without_decisions(entry["kl"])
        for other in against:
            difference = paired_rates(hits[other], hits[name])
            entries[name]["differences"][other] = {
                "mean": (sum(hits[name]) - sum(hits[other])) / len(hits[name]),
                "interval": [difference.low, difference.high],
                "sign_test_p": sign_test(hits[other], hits[name]),
            }
    return entries


def dots(found: Report) -> Dots:
    """(summed discarded mass, KL in nats) of each text, by configuration."""
    ratios = [decision["laziness"] for decision in found[RATIOS]["kl"]["decisions"]]
    masses: Dots = {}
    for name, entry in found.items():
        if "kl" not in entry:
            continue
        told = (entry["lighttransfer"] or {}).get("lazy_layers", "none")
        static = parse_layers(told) if isinstance(told, str) else tuple(told)
        masses[name] = [
            (sum(1 - mass[layer] for layer in (decision["lazy_layers"] if decision else static)), kl)
            for mass, decision, kl in zip(ratios, entry["kl"]["decisions"], entry["kl"]["texts"], strict=True)
            if kl is not None
        ]
    return masses


def spearman(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Rank correlation; None where all masses are equal."""
    mass, kl = zip(*pairs, strict=True)
    return float(spearmanr(mass, kl).statistic) if len(set(mass)) > 1 else None


def kl_entries(found: Report, masses: Dots) -> Report:
    """Each configuration's divergence, and its texts' discarded mass."""
    return {
        name: {
            "config": found[name]["config"],
            "kl": without_decisions(found[name]["kl"]),
            "discarded_mass": [mass for mass, _ in pairs],
            "spearman_of_its_texts": spearman(pairs),
        }
        for name, pairs in masses.items()
    }


def draw(masses: Dots, path: Path) -> None:
    """The figure."""
    figure, axis = require_matplotlib().subplots(figsize=(7, 4.5))
    for name, pairs in masses.items():
        mass, kl = zip(*pairs, strict=True)
        axis.scatter(mass, [max(value, 1e-6) for value in kl], s=10, label=name)
    axis.set_yscale("log")
    axis.set_xlabel("mean discarded attention mass, summed over lazy layers")
    axis.set_ylabel("KL divergence, nats")
    axis.legend(fontsize=6)
    figure.savefig(path, dpi=150, bbox_inches="tight")


def row(label: str, cells: Sequence[str]) -> None:
    """Print a row of a Markdown table."""
    print(f"| {' | '.join([label, *cells])} |")


def head(columns: Sequence[str], first: str = "") -> None:
    """Print a Markdown table's head."""
    row(first, columns)
    print("|---" * (len(columns) + 1) + "|")


def told(interval: Sequence[float]) -> str:
    """In a table."""
    return f"{interval[0]:.2f} to {interval[1]:.2f}"


def keys(reports: list[Report], args: argparse.Namespace) -> Report:
    """Answers, and how sure their differences are."""
    against = [name for name in args.against.split(",") if name]
    entries = keys_entries(merge(reports), against)
    cells = list(entries[FULL]["cells"])
    head([*cells, "difference from full, 95 %", *(f"from {other}" for other in against)])
    for name, entry in entries.items():
        counts = [str(entry["cells"][cell]["found"]) for cell in cells]
        full = "" if name == FULL else told(entry["cells"]["all"]["difference_interval"])
        others = [
            "" if name == other else told(difference["interval"])
            for other, difference in entry["differences"].items()
        ]
        row(name, [*counts, full, *others])
    return {"configurations": entries}


def kl(reports: list[Report], args: argparse.Namespace) -> Report:
    """Divergence, and the term of Theorem 5.1 beside it."""
    found = merge(reports)
    masses = dots(found)
    entries = kl_entries(found, masses)
    head(["KL, nats", "median", "largest text", "discarded mass", "texts", "seen"])
    for name, entry in sorted(entries.items(), key=lambda item: float(item[1]["kl"]["mean"])):
        one = entry["kl"]
        largest = max(value for value in one["texts"] if value is not None)
        figures = [f"{value:.4f}" for value in (one["mean"], one["median"], largest)]
        mass = f"{statistics.fmean(entry['discarded_mass']):.2f}"
        row(name, [*figures, mass, f"{one['counted']} of {one['of']}", f"{one['seen']:.3f}"])
    every = [pair for pairs in masses.values() for pair in pairs]
    print(f"\nSpearman {spearman(every):.3f} over {len(every)} dots")
    if args.figure:
        draw(masses, args.figure)
    return {"spearman": spearman(every), "configurations": entries}


def kvpress(reports: list[Report], args: argparse.Namespace) -> Report:
    """Answers by cell, and the memory by length."""
    methods = reports[0]["methods"]
    cells = list(methods[FULL]["cells"])
    head([*cells, "all", "difference, 95 %", "memory"])
    for name, entry in methods.items():
        if "failed" in entry:
            row(name, [entry["failed"]])
            continue
        memory = ", ".join(f"{share:.0%}" for share in entry["memory_share"].values())
        difference = "" if name == FULL else told(entry["difference_interval"])
        row(name, [*(str(entry["cells"][cell]) for cell in cells), str(entry["found"]), difference, memory])
    return {"methods": methods}


KINDS = {"keys": keys, "kl": kl, "kvpress": kvpress}


def main() -> None:
    """Write and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("kind", choices=list(KINDS))
    parser.add_argument("result", type=Path, help="DATE-MACHINE-SCENARIO.json in loadtest/results")
    parser.add_argument("reports", type=Path, nargs="+")
    parser.add_argument("--against", default="", help="configurations, with commas")
    parser.add_argument("--note", help="what a reader must know of this run")
    parser.add_argument("--figure", type=Path)
    args = parser.parse_args()
    reports = [load(path) for path in args.reports]
    common = ("hardware", "versions", "commit", "seed", "command", "workload")
    found = {name: reports[0][name] for name in common}
    found |= {"scenario": f"quality-{args.kind}", **({"note": args.note} if args.note else {})}
    found |= KINDS[args.kind](reports, args)
    args.result.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""What quality.py, kvpress_baselines.py and selection_ideas.py measured, as results files and tables.

    python -m tests.gpu.quality_results --date 2026-11-22 --hardware H200 --commit SHA \\
        [--keys REPORT.json ... [--against residual-50,full-fp8] [--scenario quality-keys]] \\
        [--kl REPORT.json [--figure docs/quality/kl-4096.png]] [--kvpress FILE.json] [--ideas FILE.json]

Writes loadtest/results/DATE-HARDWARE-quality-keys.json (or another --scenario), -quality-kl.json,
-quality-kvpress.json, -quality-ideas.json and the figure of divergence against discarded mass, and prints the
tables of docs/quality.md. Reports of several runs with the same prompts are merged; each must hold full
attention. With --against, each configuration is also compared with these, prompt by prompt. Files may be
gzipped.
"""

from __future__ import annotations

import argparse
import gzip
import json
import statistics
from pathlib import Path
from typing import Any

from lt_sglang.eval.intervals import paired_rates, sign_test
from tests.gpu.quality import FULL
from tests.gpu.quality_figure import dots, draw, spearman

RESULTS = Path(__file__).resolve().parents[2] / "loadtest" / "results"
VERSIONS = {"sglang": "0.5.23", "torch": "2.14.1", "flashinfer": "0.7.2"}
MODEL = "SmolLM2-135M-Instruct, bfloat16, 4 + 1020"
KEYS = "passkey and 3-key, 30 prompts each at 4096 and 8000 tokens"
CPU = "CPU"


def load(path: Path) -> Any:
    """JSON, gzipped or not."""
    raw = path.read_bytes()
    return json.loads(gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw)


def merge(reports: list[dict[str, Any]]) -> dict[str, Any]:
    """Configurations of all reports; of one that several hold, the first."""
    merged: dict[str, Any] = {}
    for report in reports:
        if FULL not in report:
            raise SystemExit("a report without full attention: its differences have nothing to refer to")
        for name, entry in report.items():
            merged.setdefault(name, entry)
    return merged


def row(label: str, cells: list[str]) -> str:
    """Of a Markdown table."""
    return f"| {' | '.join([label, *cells])} |"


def without_decisions(kl: dict[str, Any]) -> dict[str, Any]:
    """A divergence as it is kept."""
    return {name: value for name, value in kl.items() if name != "decisions"}


def keys_entries(report: dict[str, Any], against: list[str]) -> dict[str, Any]:
    """Each configuration without its single answers; its difference from each of ``against``, paired."""
    hits = {name: [trial["found"] for trial in entry["trials"]] for name, entry in report.items()}
    entries: dict[str, Any] = {}
    for name, entry in report.items():
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


def kl_entries(report: dict[str, Any], masses: dict[str, list[tuple[float, float]]]) -> dict[str, Any]:
    """Each configuration's divergence, and its texts' discarded mass."""
    return {
        name: {
            "config": report[name]["config"],
            "kl": without_decisions(report[name]["kl"]),
            "discarded_mass": [mass for mass, _ in pairs],
            "spearman_of_its_texts": spearman(pairs),
        }
        for name, pairs in masses.items()
    }


def told(interval: list[float]) -> str:
    """In a table."""
    return f"{interval[0]:.2f} to {interval[1]:.2f}"


def keys_table(entries: dict[str, Any], against: list[str]) -> None:
    """Answers, and how sure their differences are."""
    cells = list(entries[FULL]["cells"])
    print(row("", [*cells, "difference from full, 95 %", *(f"from {other}" for other in against)]))
    print(row("---", ["---"] * (len(cells) + 1 + len(against))))
    for name, entry in entries.items():
        counts = [str(entry["cells"][cell]["found"]) for cell in cells]
        full = "" if name == FULL else told(entry["cells"]["all"]["difference_interval"])
        others = [
            "" if name == other else told(difference["interval"])
            for other, difference in entry["differences"].items()
        ]
        print(row(name, [*counts, full, *others]))


def kl_table(entries: dict[str, Any]) -> None:
    """Divergence, and the term of Theorem 5.1 beside it."""
    print(row("", ["KL, nats", "median", "largest text", "discarded mass", "texts", "seen"]))
    print(row("---", ["---"] * 6))
    for name, entry in sorted(entries.items(), key=lambda item: float(item[1]["kl"]["mean"])):
        kl = entry["kl"]
        largest = max(value for value in kl["texts"] if value is not None)
        figures = [f"{value:.4f}" for value in (kl["mean"], kl["median"], largest)]
        mass = f"{statistics.fmean(entry['discarded_mass']):.2f}"
        print(row(name, [*figures, mass, f"{kl['counted']} of {kl['of']}", f"{kl['seen']:.3f}"]))


def kvpress_table(report: dict[str, Any]) -> None:
    """Answers by cell, and the memory by length."""
    methods = report["methods"]
    cells = list(methods[FULL]["cells"])
    print(row("", [*cells, "all", "difference, 95 %", "memory"]))
    print(row("---", ["---"] * (len(cells) + 3)))
    for name, entry in methods.items():
        if "failed" in entry:
            print(row(name, [entry["failed"]]))
            continue
        low, high = entry["difference_interval"]
        memory = ", ".join(f"{share:.0%}" for share in entry["memory_share"].values())
        counts = [str(entry["cells"][cell]) for cell in cells]
        difference = "" if name == FULL else f"{low:.2f} to {high:.2f}"
        print(row(name, [*counts, str(entry["found"]), difference, memory]))


def ideas_table(report: dict[str, Any]) -> None:
    """Right answers, relative to full attention, and KL, by layers kept."""
    names: dict[str, dict[int, dict[str, Any]]] = {}
    for name, entry in report["choices"].items():
        idea, _, keep = name.rpartition(" ")
        names.setdefault(idea, {})[int(keep)] = entry
    keeps = sorted({keep for entries in names.values() for keep in entries}, reverse=True)
    print(row("layers kept", [str(keep) for keep in keeps]))
    print(row("---", ["---"] * len(keeps)))
    for idea, entries in names.items():
        found = [entries.get(keep) for keep in keeps]
        print(row(idea, [f"{e['found']} of {e['full']}, {e['kl']:.3f}" if e else "" for e in found]))


def main() -> None:
    """Write and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--date", required=True)
    parser.add_argument("--hardware", required=True, help="H100, H200 or CPU")
    parser.add_argument("--commit", required=True)
    parser.add_argument("--keys", type=Path, nargs="*", default=[])
    parser.add_argument("--scenario", default="quality-keys", help="of --keys; a date may have several")
    parser.add_argument("--against", default="", help="configurations, with commas")
    parser.add_argument("--note", help="what a reader must know of this run")
    parser.add_argument("--questions", default=KEYS, help="what was asked, if not all")
    parser.add_argument("--kl", type=Path)
    parser.add_argument("--kvpress", type=Path)
    parser.add_argument("--ideas", type=Path)
    parser.add_argument("--figure", type=Path)
    args = parser.parse_args()

    def write(scenario: str, what: str, versions: dict[str, str], data: dict[str, Any]) -> None:
        head = {
            "scenario": scenario,
            "hardware": "2 CPU cores" if args.hardware == CPU else f"1 x NVIDIA {args.hardware}",
            "versions": versions,
            "commit": args.commit,
            "seed": 0,
            "workload": {"model": MODEL, "what": what},
            **({"note": args.note} if args.note else {}),
        }
        path = RESULTS / f"{args.date}-{args.hardware.lower()}-{scenario}.json"
        path.write_text(json.dumps({**head, **data}, indent=1) + "\n")
        print(f"\n{path.name}\n")

    if args.keys:
        report = merge([load(path) for path in args.keys])
        against = [name for name in args.against.split(",") if name]
        entries = keys_entries(report, against)
        what = f"{args.questions}; python -m tests.gpu.quality"
        write(args.scenario, what, VERSIONS, {"configurations": entries})
        keys_table(entries, against)
    if args.kl:
        report = load(args.kl)
        masses = dots(report)
        entries = kl_entries(report, masses)
        rank = spearman([pair for pairs in masses.values() for pair in pairs])
        what = "KL along 64 tokens after texts of 4096 tokens; python -m tests.gpu.quality"
        write("quality-kl", what, VERSIONS, {"spearman": rank, "configurations": entries})
        kl_table(entries)
        print(f"\nSpearman {rank:.3f} over {sum(map(len, masses.values()))} dots")
        if args.figure:
            draw(masses, args.figure)
    if args.kvpress:
        report = load(args.kvpress)
        what = f"{args.questions}; python -m tests.gpu.kvpress_baselines"
        write("quality-kvpress", what, report["versions"], {"methods": report["methods"]})
        kvpress_table(report)
    if args.ideas:
        report = load(args.ideas)
        what = f"{args.questions}, answers forced in transformers; python -m tests.gpu.selection_ideas"
        write("quality-ideas", what, {"torch": "2.14.1", "transformers": "5.19.0"}, report)
        ideas_table(report)


if __name__ == "__main__":
    main()

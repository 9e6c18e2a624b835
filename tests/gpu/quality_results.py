"""What quality.py, kvpress_baselines.py and selection_ideas.py measured, as results files and tables.

    python -m tests.gpu.quality_results --date 2026-11-22 --hardware H200 --commit SHA \\
        [--keys REPORT.json ...] [--kvpress FILE.json] [--ideas FILE.json] [--figure docs/quality/kl-4096.png]

Writes loadtest/results/DATE-HARDWARE-quality-kl.json, -quality-kvpress.json, -quality-ideas.json and the
figure of divergence against discarded mass, and prints the tables of docs/quality.md. Reports of several runs
with the same prompts are merged; each must hold full attention. Files may be gzipped.
"""

from __future__ import annotations

import argparse
import gzip
import json
import statistics
from pathlib import Path
from typing import Any

from tests.gpu.quality import FULL
from tests.gpu.quality_figure import dots, draw

RESULTS = Path(__file__).resolve().parents[2] / "loadtest" / "results"
VERSIONS = {"sglang": "0.5.23", "torch": "2.14.1", "flashinfer": "0.7.2"}
MODEL = "SmolLM2-135M-Instruct, bfloat16, 4 + 1020"
KEYS = "passkey and 3-key, 30 prompts each at 4096 and 8000 tokens"


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


def keys_entry(report: dict[str, Any]) -> dict[str, Any]:
    """Each configuration without its single answers."""
    return {
        name: {
            **{key: entry[key] for key in ("config", "cells")},
            **({"kl": {k: v for k, v in entry["kl"].items() if k != "decisions"}} if "kl" in entry else {}),
        }
        for name, entry in report.items()
    }


def keys_table(report: dict[str, Any], masses: dict[str, list[tuple[float, float]]]) -> None:
    """Answers, divergence, and the term of Theorem 5.1 beside it."""
    cells = list(report[FULL]["cells"])
    print(row("", [*cells, "difference, 95 %", "KL, nats", "median", "discarded mass"]))
    print(row("---", ["---"] * (len(cells) + 4)))
    for name, entry in report.items():
        counts = [str(entry["cells"][cell]["found"]) for cell in cells]
        low, high = entry["cells"]["all"]["difference_interval"]
        kl = entry.get("kl")
        told = [f"{kl['mean']:.4f}", f"{kl['median']:.4f}"] if kl else ["", ""]
        mass = f"{statistics.fmean(m for m, _ in masses[name]):.2f}" if name in masses else ""
        print(row(name, [*counts, "" if name == FULL else f"{low:.2f} to {high:.2f}", *told, mass]))


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
    parser.add_argument("--hardware", required=True, help="H100 or H200")
    parser.add_argument("--commit", required=True)
    parser.add_argument("--keys", type=Path, nargs="*", default=[])
    parser.add_argument("--kvpress", type=Path)
    parser.add_argument("--ideas", type=Path)
    parser.add_argument("--figure", type=Path)
    args = parser.parse_args()

    def write(scenario: str, what: str, versions: dict[str, str], data: dict[str, Any]) -> None:
        head = {
            "scenario": scenario,
            "hardware": f"1 x NVIDIA {args.hardware}",
            "versions": versions,
            "commit": args.commit,
            "seed": 0,
            "workload": {"model": MODEL, "what": what},
        }
        path = RESULTS / f"{args.date}-{args.hardware.lower()}-{scenario}.json"
        path.write_text(json.dumps({**head, **data}, indent=1) + "\n")
        print(f"\n{path.name}\n")

    if args.keys:
        report = merge([load(path) for path in args.keys])
        masses = dots(report)
        what = f"{KEYS}; KL along 64 tokens after 16 texts of 4096; python -m tests.gpu.quality"
        entries = keys_entry(report)
        for name, pairs in masses.items():
            entries[name]["discarded_mass"] = [mass for mass, _ in pairs]
        write("quality-kl", what, VERSIONS, {"configurations": entries})
        keys_table(report, masses)
        if args.figure:
            print(f"\nSpearman {draw(masses, args.figure):.3f}")
    if args.kvpress:
        report = load(args.kvpress)
        what = f"{KEYS}; python -m tests.gpu.kvpress_baselines"
        write("quality-kvpress", what, report["versions"], {"methods": report["methods"]})
        kvpress_table(report)
    if args.ideas:
        report = load(args.ideas)
        what = f"{KEYS}, answers forced in transformers; python -m tests.gpu.selection_ideas"
        write("quality-ideas", what, {"torch": "2.14.1", "transformers": "5.19.0"}, report)
        ideas_table(report)


if __name__ == "__main__":
    main()

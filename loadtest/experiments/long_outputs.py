"""Short prompts and long outputs: what lazy layers lose of both, and whether outputs get longer.

    python -m loadtest.experiments.long_outputs OUT [--engines FILE.yaml] [--only full,list-50]
        [--tokens 4096] [--trials 16] [--recent-tokens 1020] [--limit-s 600] [SGLANG_FLAG ...]

A prompt names three pass keys and begins to count. The model counts on, ``tokens`` tokens at most, greedy,
and may end earlier. Then it is asked for each key, behind its own output, which the server has in its cache:
decoded, not computed again. Counting needs what was written last, a key what stands before all windows.

steps: numbers that were right before the first wrong one; they stand for a chain of reasoning, in which a
wrong step spoils the rest. length: tokens until the end. OUT/report.json is a result file. Engines are those
of ``eval --engines``; the first must have full attention. --recent-tokens: of all others.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import requests
import yaml

from loadtest.experiments.offline import stamped
from lt_sglang.demo.smollm2 import ensure_model
from lt_sglang.eval.intervals import paired_groups
from lt_sglang.eval.items import HfTokenizer, rng_of
from lt_sglang.eval.tasks.conversations import PLACES
from lt_sglang.eval.tasks.passkey import DIGITS
from lt_sglang.launch.cpu import cpu_server_args, has_gpu
from lt_sglang.launch.engine import Engine, EngineSpec

KEYS, BEGUN, SEED = 3, 6, 11
KEY_TOKENS = 8
SINKS = "4"


@dataclass(frozen=True)
class Trial:
    """keys: by place. prompt: token ids."""

    keys: dict[str, str]
    prompt: tuple[int, ...]


@dataclass(frozen=True)
class Found:
    """Of one trial. steps, length: as above. right: of each key. cached: of the last question's prompt."""

    steps: int
    length: int
    right: tuple[bool, ...]
    cached: int


def trials_of(tokenizer: HfTokenizer, count: int) -> list[Trial]:
    """Prompts with keys of their own."""
    trials = []
    for number in range(count):
        rng = rng_of(SEED, "long-outputs", 0, number)
        keys = {
            place: "".join(rng.choice("0123456789") for _ in range(DIGITS))
            for place in rng.sample(sorted(PLACES), KEYS)
        }
        stated = " ".join(
            f"The pass key of the {place} is {key}. Remember it." for place, key in keys.items()
        )
        text = f"{stated}\nNow count on, one number after the other.\n" + " ".join(
            f"{step}," for step in range(1, BEGUN)
        )
        trials.append(Trial(keys, (*tokenizer.prefix, *tokenizer.encode(text))))
    return trials


def right_steps(text: str) -> int:
    """How many numbers of ``text`` go on with the count from BEGUN before one does not."""
    found = [part.strip() for part in text.split(",")]
    # What the limit cut off may be the beginning of a number.
    whole = found[:-1]
    wrong = (at for at, part in enumerate(whole) if part != str(BEGUN + at))
    return next(wrong, len(whole))


class Asked:
    """One server; every trial has a name space of the prefix cache."""

    def __init__(self, url: str, tokenizer: HfTokenizer, tokens: int) -> None:
        self._url, self._tokenizer, self._tokens = url, tokenizer, tokens

    def trial(self, trial: Trial) -> Found:
        """Count, then every key."""
        name = uuid.uuid4().hex
        counted, _ = self._generate(trial.prompt, self._tokens, name)
        right, cached = [], 0
        # A model that has ended is asked all the same.
        before = [*trial.prompt, *counted]
        for place, key in trial.keys.items():
            question = self._tokenizer.encode(f"\nWhat is the pass key of the {place}? The pass key is")
            answer, cached = self._generate([*before, *question], KEY_TOKENS, name)
            right.append(self._tokenizer.decode(answer).strip().startswith(key))
        return Found(right_steps(self._tokenizer.decode(counted)), len(counted), tuple(right), cached)

    def _generate(self, ids: Sequence[int], new_tokens: int, name: str) -> tuple[list[int], int]:
        sampling = {"temperature": 0, "max_new_tokens": new_tokens}
        body = {"input_ids": list(ids), "sampling_params": sampling, "extra_key": name}
        reply = requests.post(f"{self._url}/generate", json=body, timeout=3600)
        reply.raise_for_status()
        data = reply.json()
        return data["output_ids"], int(data["meta_info"]["cached_tokens"])


def summary(found: Sequence[Found], full: Sequence[Found]) -> dict[str, Any]:
    """Medians and sums, with full attention's beside; intervals are a paired bootstrap over trials."""
    trials = [number for number, one in enumerate(found) for _ in one.right]
    mine, base = ([float(key) for one in side for key in one.right] for side in (found, full))
    paired = paired_groups(base, mine, trials)
    difference = [round(paired.difference.low, 4), round(paired.difference.high, 4)]
    return {
        "keys_right": int(sum(mine)),
        "of": len(mine),
        "keys_difference": difference,
        "steps_median": statistics.median(one.steps for one in found),
        "length_median": statistics.median(one.length for one in found),
        "length_mean": round(statistics.mean(one.length for one in found), 1),
        "longer_than_full": sum(a.length > b.length for a, b in zip(found, full, strict=True)),
        "shorter_than_full": sum(a.length < b.length for a, b in zip(found, full, strict=True)),
        "cached_least": min(one.cached for one in found),
    }


def specs_of(args: argparse.Namespace, model: str, given: Sequence[str]) -> list[EngineSpec]:
    """The engines asked for, full attention first."""
    engines = yaml.safe_load(Path(args.engines).read_text(encoding="utf-8"))
    names = args.only.split(",") if args.only else list(engines)
    flags = (*given, *("--max-running-requests", str(args.clients), "--context-length", "8192"))
    specs = []
    if not has_gpu():
        flags = (*cpu_server_args(), "--mem-fraction-static", "0.4", *flags)
    for name in names:
        lazy = shlex.split(engines[name] or "")
        stock = () if has_gpu() else ("--attention-backend", "torch_native")
        ours = (*lazy, "--lt-sink-tokens", SINKS, "--lt-recent-tokens", str(args.recent_tokens))
        specs.append(EngineSpec(name, model, flags, ours if lazy else stock, stock=not lazy))
    return specs


def main() -> None:
    """Every engine after the other; what there is is written after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--engines", default="loadtest/conversations.yaml")
    parser.add_argument("--only")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--trials", type=int, default=16)
    parser.add_argument("--recent-tokens", type=int, default=1020)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--limit-s", type=float, default=600.0, help="of a server's start")
    args, flags = parser.parse_known_args()
    out = args.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    model = args.model or ensure_model()
    tokenizer = HfTokenizer(str(model))
    trials = trials_of(tokenizer, args.trials)
    report = stamped("long-outputs", "three pass keys, then counting, then the keys", tokens=args.tokens)
    report |= {"seed": SEED, "window": args.recent_tokens, "trials": len(trials), "engines": {}}
    full: list[Found] = []
    for spec in specs_of(args, str(model), flags):
        with Engine(spec, out / f"{spec.name}.log", start_seconds=args.limit_s) as engine:
            asked = Asked(engine.url, tokenizer, args.tokens)
            with ThreadPoolExecutor(args.clients) as pool:
                found = list(pool.map(asked.trial, trials))
        full = full or found
        told = summary(found, full)
        report["engines"][spec.name] = {"summary": told, "trials": [asdict(one) for one in found]}
        print(f"{spec.name}: {told}", flush=True)
        (out / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

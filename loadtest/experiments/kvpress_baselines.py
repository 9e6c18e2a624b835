r"""Other ways to make the KV cache smaller, at the memory of half lazy layers, on quality.py's questions.

    python -m venv kvpress && kvpress/bin/pip install kvpress==0.5.5
    kvpress/bin/python -m loadtest.experiments.kvpress_baselines PROMPTS.json OUT.json --model FOLDER \
        --calibration SAMPLES.jsonl [--keeps 0.5 0.25] [--methods full,snapkv,...] [--device cpu]

NVIDIA's kvpress in transformers: SnapKV, PyramidKV, StreamingLLM, DuoAttention, SimLayerKV; and MiniCache
(minicache.py). And windows in quality.yaml's lists of layers, with SnapKV in the full ones (lazy_press.py):

    ... --keeps 0.5 --methods full,list,snapkv,list-snapkv,snapkv-same,list-same [--one-prefill]

``list`` is such a list alone; ``list-snapkv`` keeps half of the tokens in its full layers by SnapKV, as in
arXiv 2410.13846, appendix C.2; ``snapkv-same`` is SnapKV in all layers in that memory, ``list-same`` the list
with the most full layers that needs no more.

kvpress wants an older transformers than SGLang and so has an environment of its own; run it from this
project's folder. Accuracy only: nothing here says how fast a method is. PROMPTS.json and the samples come
from ``python -m loadtest.experiments.quality PROMPTS.json --write --calibration SAMPLES.jsonl``.

Every method gets the prompt with its question, prefills it with full attention, shrinks the cache, and
decodes greedily, as dynamic mode does; quality.py's check says which answers are right. The memory is that
of P full layers and sink + recent tokens in the others, at each prompt's length. Three have other knobs.
SimLayerKV's threshold is set on the samples, to make as many layers lazy in the mean. DuoAttention scores its
heads on the samples (kvpress would download texts) and streams as many heads as that memory asks for.
MiniCache merges as many layers as it asks for; ``minicache-deep`` merges the deeper half, as published, and
takes more memory. The memory is reported as it came out.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# Where SGLang's newer ``kernels`` can be imported too, kvpress' transformers takes it for its own, and fails.
if "kernels" not in sys.modules:
    sys.modules["kernels"] = None  # type: ignore[assignment]

import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from loadtest.experiments import lazy_press, minicache
from loadtest.experiments.offline import stamped
from loadtest.experiments.quality import LISTS, MODEL, SINKS, by_cell, counted, found

METHODS = (
    *("full", "snapkv", "pyramidkv", "streamingllm", "duoattention"),
    *("minicache", "minicache-deep", "simlayerkv"),
)
DUO_SINKS, DUO_RECENT = 128, 256  # kvpress' own, when it scores heads itself


class Bench:
    """The model, and what is common to all methods.

    recent: tokens that a lazy layer keeps besides SINKS. samples: texts as token ids.
    """

    def __init__(self, args: argparse.Namespace, recent: int) -> None:
        self.device = args.device
        self.recent = recent
        self.model: Any = AutoModelForCausalLM.from_pretrained(
            args.model, dtype=torch.bfloat16, attn_implementation="sdpa"
        )
        self.model.to(args.device).eval()
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        self.texts = [json.loads(line)["text"] for line in args.calibration.read_text().splitlines()]
        self.samples = [tokenizer.encode(text) for text in self.texts]
        self.layers: int = self.model.config.num_hidden_layers
        self.head_dim: int = self.model.model.layers[0].self_attn.head_dim
        self._thresholds: dict[int, float] = {}

    def share(self, tokens: int, keep: int, kept: float = 1.0) -> float:
        """Of a prompt's full KV cache, with ``keep`` full layers, which keep ``kept`` of their tokens."""
        return lazy_press.share(self.layers, self.layers - keep, (SINKS + self.recent) / tokens, kept)

    def lists(self, keep: int, kept: float = 1.0) -> Any:
        """Windows in quality.yaml's list for ``keep`` full layers; SnapKV keeps ``kept`` of their tokens."""
        from kvpress import SnapKVPress

        return lazy_press.press(SnapKVPress, LISTS[keep], SINKS, self.recent, kept)

    @torch.inference_mode()
    def greedy(
        self,
        prompts: Sequence[Sequence[int]],
        new_tokens: int,
        press: Any = None,
        after: Callable[[DynamicCache], None] | None = None,
    ) -> tuple[list[list[int]], float]:
        """Greedy tokens of prompts of one length, and the cache's share of all layers' prompt tokens."""
        ids = torch.tensor([list(prompt) for prompt in prompts], device=self.device)
        cache = DynamicCache()
        with press(self.model) if press is not None else contextlib.nullcontext():
            logits = self.model(ids, past_key_values=cache, logits_to_keep=1).logits
        if after is not None:
            after(cache)
        held = self._held(cache, ids.shape[1])
        return self._decode(cache, logits, ids.shape[1], new_tokens), held

    @torch.inference_mode()
    def greedy_each(
        self, prompt: Sequence[int], new_tokens: int, presses: dict[str, Any]
    ) -> dict[str, tuple[list[int], float]]:
        """The same of one prompt and of each press, behind one prefill."""
        ids = torch.tensor([list(prompt)], device=self.device)
        with lazy_press.one_prefill(self.model, presses) as caches:
            logits = self.model(ids, past_key_values=DynamicCache(), logits_to_keep=1).logits
        held = {name: self._held(cache, len(prompt)) for name, cache in caches.items()}
        return {
            name: (self._decode(cache, logits, len(prompt), new_tokens)[0], held[name])
            for name, cache in caches.items()
        }

    def _held(self, cache: DynamicCache, tokens: int) -> float:
        return sum(layer.keys.shape[2] for layer in cache.layers) / (self.layers * tokens)

    def _decode(
        self, cache: DynamicCache, logits: torch.Tensor, start: int, new_tokens: int
    ) -> list[list[int]]:
        tokens = [logits[:, -1].argmax(1)]
        for step in range(new_tokens - 1):
            position = torch.full((len(logits), 1), start + step, device=self.device)
            out = self.model(
                tokens[-1][:, None], past_key_values=cache, position_ids=position, logits_to_keep=1
            )
            tokens.append(out.logits[:, -1].argmax(1))
        return torch.stack(tokens, 1).tolist()

    def threshold(self, keep: int) -> float:
        """SimLayerKV's: on the samples, layers - keep of the layers lie above it in the mean."""
        from kvpress import SimLayerKVPress, SnapKVPress

        if not self._thresholds:
            seen: list[float] = []

            class Watch(SimLayerKVPress):
                def is_lazy(self, module: Any, hidden: Any, keys: Any, positions: Any) -> bool:
                    weights = SnapKVPress.compute_window_attention(
                        module, hidden, keys, self.n_last, positions
                    ).mean((0, 1, 2))
                    seen.append(float(weights[: self.n_initial].sum() + weights[-self.n_recent :].sum()))
                    return False

            watch = Watch(lazy_threshold=0.5, n_recent=self.recent + 1, n_initial=SINKS)
            for sample in self.samples:
                self.greedy([sample], 1, watch)
            seen.sort()
            for number in range(1, self.layers):
                at = len(seen) * number // self.layers
                self._thresholds[number] = (seen[at - 1] + seen[at]) / 2
        return self._thresholds[keep]


def press_of(bench: Bench, method: str, tokens: int, keep: int) -> tuple[Any, Any]:
    """A press and what follows prefill, for prompts of ``tokens`` tokens; None, None for full attention."""
    import kvpress

    share = bench.share(tokens, keep)
    if method == "snapkv":
        return kvpress.SnapKVPress(compression_ratio=1 - share), None
    if method == "list":
        return bench.lists(keep), None
    if method == "list-snapkv":
        return bench.lists(keep, lazy_press.SNAPKV_SHARE), None
    if method.endswith("-same"):
        same = bench.share(tokens, keep, lazy_press.SNAPKV_SHARE)
        if method == "snapkv-same":
            return kvpress.SnapKVPress(compression_ratio=1 - same), None
        return bench.lists(max(more for more in LISTS if bench.share(tokens, more) <= same)), None
    if method == "pyramidkv":
        return kvpress.PyramidKVPress(compression_ratio=1 - share), None
    if method == "streamingllm":
        return kvpress.StreamingLLMPress(compression_ratio=1 - share, n_sink=SINKS), None
    if method == "duoattention":
        streaming = min(1.0, (1 - share) / (1 - (DUO_SINKS + DUO_RECENT) / tokens))
        return kvpress.DuoAttentionPress(head_compression_ratio=streaming, on_the_fly_scoring=True), None
    if method == "simlayerkv":
        # It keeps n_recent less n_last tokens.
        options = {"n_recent": bench.recent + 1, "n_initial": SINKS}
        return kvpress.SimLayerKVPress(lazy_threshold=bench.threshold(keep), **options), None
    if method.startswith("minicache"):
        first = first_merged(bench, method, share)
        return None, lambda cache: minicache.merge(cache, first)
    return None, None


def first_merged(bench: Bench, method: str, share: float) -> int:
    """MiniCache's first merged layer: for the memory ``share``, or as published, from the middle on."""
    if method == "minicache-deep":
        return bench.layers // 2
    return minicache.first_for(bench.layers, bench.head_dim, share)


def held_share(bench: Bench, method: str, tokens: int, keep: int, press: Any, held: float) -> float:
    """The memory it would take; ``held`` where the cache really shrank."""
    if method == "duoattention":  # masks its keys instead
        return 1 - float(press.compression_ratio)
    if method.startswith("minicache"):  # restores what it merged
        first = first_merged(bench, method, bench.share(tokens, keep))
        return minicache.memory_share(bench.layers, first, bench.head_dim)
    return held


def score_heads_on(texts: Sequence[str]) -> None:
    """Let DuoAttention's head scoring use ``texts`` instead of a data set that it would download."""
    from kvpress.presses import duo_attention_press

    class Texts:
        """As much of a pandas table as it asks for; it draws more texts than there are."""

        def to_pandas(self) -> Texts:
            return self

        def sample(self, count: int, random_state: int) -> dict[str, Any]:
            return {"chapter": np.array([texts[i % len(texts)] for i in range(count)], dtype=object)}

    duo_attention_press.load_dataset = lambda *_args, **_options: Texts()


def run_method(
    bench: Bench, spec: dict[str, Any], method: str, keep: int, batch: int
) -> tuple[list[bool], dict[str, float]]:
    """Which answers are right, and the memory share by length."""
    keys = spec["keys"]
    answers: list[dict[str, Any] | None] = [None] * len(keys)
    shares: dict[str, float] = {}
    size = 1 if method == "simlayerkv" else batch  # it decides for a batch as a whole
    held_of: dict[int, list[float]] = {}
    for tokens in sorted({len(key["prompt"]) for key in keys}):
        same = [index for index, key in enumerate(keys) if len(key["prompt"]) == tokens]
        for start in range(0, len(same), size):
            group = same[start : start + size]
            press, after = press_of(bench, method, tokens, keep)
            outs, held = bench.greedy(
                [keys[index]["prompt"] for index in group],
                max(keys[index]["new_tokens"] for index in group),
                press,
                after,
            )
            for index, out in zip(group, outs, strict=True):
                answers[index] = {"output_ids": out}
            held_of.setdefault(tokens, []).append(held_share(bench, method, tokens, keep, press, held))
        shares[str(tokens)] = sum(held_of[tokens]) / len(held_of[tokens])
    assert all(answers)
    return found(spec, [answer for answer in answers if answer]), shares


def run_each(
    bench: Bench, spec: dict[str, Any], methods: Sequence[str], keep: int
) -> dict[str, tuple[list[bool], dict[str, float]]]:
    """``run_method`` of several methods that only shrink a cache, with one prefill of each question."""
    outs: dict[str, list[dict[str, Any]]] = {method: [] for method in methods}
    shares: dict[str, dict[str, float]] = {method: {} for method in methods}
    for key in tqdm(spec["keys"], desc="questions"):
        tokens = len(key["prompt"])
        presses = {method: press_of(bench, method, tokens, keep)[0] for method in methods}
        new_tokens = max(map(len, key["answers"]))
        for method, (ids, held) in bench.greedy_each(key["prompt"], new_tokens, presses).items():
            outs[method].append({"output_ids": ids})
            shares[method][str(tokens)] = held
    return {method: (found(spec, outs[method]), shares[method]) for method in methods}


def summarise(spec: dict[str, Any], name: str, hits: list[bool], full: list[bool]) -> dict[str, Any]:
    """Right answers by cell; against full attention in transformers, paired."""
    entry = {"cells": by_cell(spec["keys"], hits), **counted(hits, full)}
    print(f"{name:20s} {entry['cells']} {sum(hits)} of {len(hits)}", flush=True)
    return entry


def main() -> None:
    """Measure each method; the file is written after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("prompts", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", required=True)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--keeps", type=float, nargs="+", default=[0.5, 0.25], help="shares of full layers")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--batch", type=int, default=15)
    parser.add_argument(
        "--one-prefill", action="store_true", help="for all methods; for SnapKV, PyramidKV and lists alone"
    )
    parser.add_argument("--budget-s", type=float, default=3600)
    args = parser.parse_args()
    end = time.monotonic() + args.budget_s
    spec = json.loads(args.prompts.read_text())
    # Imported first: it wraps transformers' attention functions.
    import kvpress

    bench = Bench(args, spec["recent_tokens"])
    score_heads_on(bench.texts)
    lengths = sorted({len(key["prompt"]) for key in spec["keys"]})
    what = f"passkey and 3-key, {len(spec['keys'])} questions of {' and '.join(map(str, lengths))} tokens"
    told = f"{MODEL}, {SINKS} + {spec['recent_tokens']}"
    report: dict[str, Any] = {**stamped("quality-kvpress", what, model=told), "methods": {}}
    assert kvpress.__file__
    full: list[bool] = []
    for share in args.keeps:
        keep = round(share * bench.layers)
        methods = args.methods.split(",")
        each = run_each(bench, spec, methods, keep) if args.one_prefill else {}
        for method in methods:
            fixed = method in ("full", "minicache-deep")
            name = method if fixed else f"{method}-{round(100 * (1 - share))}"
            if name in report["methods"] or time.monotonic() > end:
                continue
            start = time.perf_counter()
            try:
                hits, shares = each.get(method) or run_method(bench, spec, method, keep, args.batch)
            except (RuntimeError, ValueError) as error:
                # One method's failure is a finding; the others are still measured.
                report["methods"][name] = {"failed": f"{type(error).__name__}: {error}"}
                print(f"{name:20s} FAILED: {error}", flush=True)
                continue
            full = full or hits
            entry = summarise(spec, name, hits, full)
            entry["memory_share"] = shares
            if method not in each:
                entry["seconds"] = round(time.perf_counter() - start, 1)
            if not fixed:
                entry["lazy_memory_share"] = {str(n): bench.share(n, keep) for n in lengths}
            report["methods"][name] = entry
            args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()

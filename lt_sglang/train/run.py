"""One run: samples, model, TRL's loop, the folder that is served. Each process of a run calls ``train``."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lt_sglang.config import CONFIG_KEY
from lt_sglang.errors import LightTransferError
from lt_sglang.train.attention import attach
from lt_sglang.train.data import Encoder, Sample, load_samples
from lt_sglang.train.options import TrainOptions, check_same_run, record_of
from lt_sglang.train.output import (
    FIGURE,
    RECORD,
    draw,
    parent_folder,
    require_matplotlib,
    save_model,
    write_json,
)
from lt_sglang.train.samples import sha256_of


def train(options: TrainOptions) -> Path:
    """Train, and return the model's folder, ``options.out``. Raises LightTransferError."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if options.plots:
        require_matplotlib()
    resumed_from = prepare_folder(options)
    import datasets
    from transformers import AutoTokenizer, set_seed

    from lt_sglang.train.trainer import HybridTrainer, arguments, disk_is_full, kept

    datasets.disable_caching()  # nothing is written outside the run's folder
    set_seed(options.seed)
    try:
        tokenizer = AutoTokenizer.from_pretrained(options.model_path, revision=options.revision)
    except (OSError, ValueError) as error:
        raise LightTransferError(f"--model-path {options.model_path}: no tokenizer ({error})") from None
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    # Samples first: bad data is found before a large model is loaded.
    train_set, eval_set = datasets_of(options, Encoder(tokenizer, options.loss_on, stop_tokens(options)))
    model = load_model(options)
    lora = _lora(options) if options.lora_rank else None
    layers = sorted({type(layer).__name__ for layer in model.get_decoder().layers})
    trainer = HybridTrainer(
        model=model,
        args=arguments(options, layers, eval_set is not None),
        train_dataset=train_set,
        eval_dataset=eval_set,
        processing_class=tokenizer,
        peft_config=lora,
    )
    first = trainer.is_world_process_zero()
    try:
        trainer.train(resume_from_checkpoint=str(resumed_from) if resumed_from else None)
    finally:
        if first and options.plots and trainer.state.log_history:
            draw(trainer.state.log_history, options.out / FIGURE)
    try:
        save(trainer, options)
    except Exception as error:
        if not disk_is_full(error):
            raise
        raise LightTransferError(
            f"--out {options.out}: the disk is full; the model was not written, {kept(options.checkpoints)}"
        ) from None
    if first:
        write_json(options.out / "log.json", trainer.state.log_history)
    return options.out


def prepare_folder(options: TrainOptions) -> Path | None:
    """Make the run's folder and record; the checkpoint to go on from, or None.

    Raises:
        LightTransferError: the folder holds another run, or one that was not to be resumed.
    """
    from lt_sglang.train.trainer import last_checkpoint

    record = options.out / RECORD
    now = record_of(options, sha256_of(options.data))
    last = last_checkpoint(options.checkpoints)
    if options.resume:
        if not record.is_file():
            raise LightTransferError(f"--resume: {options.out} holds no run of lt-sglang train")
        check_same_run(json.loads(record.read_text(encoding="utf-8")), now, options.out)
        if last is None:
            raise LightTransferError(f"--resume: {options.checkpoints} holds no complete checkpoint")
        return last
    if last is not None:
        raise LightTransferError(
            f"--out {options.out}: holds a run up to {last.name}; go on with --resume, or give another folder"
        )
    if options.out.exists() and not options.out.is_dir():
        raise LightTransferError(f"--out {options.out}: must be a folder")
    options.out.mkdir(parents=True, exist_ok=True)
    if _first():
        write_json(record, now)
    return None


def stop_tokens(options: TrainOptions) -> tuple[int, ...]:
    """Tokens that end an answer by the model's generation_config.json, if it has one."""
    from transformers import GenerationConfig

    try:
        stops = GenerationConfig.from_pretrained(options.model_path, revision=options.revision).eos_token_id
    except (OSError, ValueError):
        return ()
    return (stops,) if isinstance(stops, int) else tuple(stops or ())


def load_model(options: TrainOptions) -> Any:
    """The model with its mask attached; raises LightTransferError."""
    from transformers import AutoModelForCausalLM

    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            options.model_path,
            # Frozen weights need no more than the arithmetic's precision.
            dtype=getattr(torch, options.precision if options.lora_rank else options.weights),
            attn_implementation="sdpa",
            revision=options.revision,
        )
    except (OSError, ValueError) as error:
        raise LightTransferError(f"--model-path {options.model_path}: cannot be loaded ({error})") from None
    attach(model, options.config)
    # So that every checkpoint on the way can be served as well.
    setattr(model.config, CONFIG_KEY, options.config.to_dict())
    return model


def datasets_of(options: TrainOptions, encoder: Encoder) -> tuple[Any, Any]:
    """Training and evaluation samples as ``datasets.Dataset``, and the report in the run's folder."""
    from datasets import Dataset

    found: list[Any] = []
    reports = {}
    for name, paths in (("training", options.data), ("evaluation", options.eval_data)):
        if not paths:
            found.append(None)
            continue
        samples, report = load_samples(
            paths,
            encoder,
            options.max_length,
            options.config.lazy_tokens,
            options.too_long,
            partial(_progress, name=name),
        )
        reports[name] = report.as_dict()
        if _first():
            for line in report.lines(options.config.lazy_tokens, options.max_length):
                print(f"{name}: {line}", file=sys.stderr)
        found.append(Dataset.from_dict(_columns(samples)))
    if _first():
        write_json(options.out / "data.json", reports)
    return found[0], found[1]


def save(trainer: Any, options: TrainOptions) -> None:
    """The model folder. With LoRA, the adapter beside it, merged into the parent's own weights."""
    from transformers import AutoModelForCausalLM

    parent = parent_folder(options.model_path, options.revision)
    config = replace(options.config, source="lt-sglang train")
    if options.lora_rank:
        adapter = options.out / "adapter"
        trainer.save_model(str(adapter))
        if not trainer.is_world_process_zero():
            return
        from peft import PeftModel

        base: Any = AutoModelForCausalLM.from_pretrained(
            options.model_path, dtype=torch.float32, revision=options.revision
        )
        merged = PeftModel.from_pretrained(base, str(adapter)).merge_and_unload()
        save_model(merged, merged.state_dict(), parent, options.out, config)
        return
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)  # every process takes part
    if trainer.is_world_process_zero():
        save_model(trainer.accelerator.unwrap_model(trainer.model), state, parent, options.out, config)


def how_to_go_on(options: TrainOptions) -> str:
    """What can be done with the folder now, for the terminal."""
    return "\n".join(
        [
            f"{options.out}: the model; its list of lazy layers is in its config.json",
            f"  lt-sglang serve {options.out}",
            f"  lt-sglang eval --tokenizer {options.out} --endpoint parent=URL --endpoint lazy=URL --out Q",
            f"  lt-sglang models --entry {options.out}   (how to make it known by name)",
        ]
    )


def _columns(samples: list[Sample]) -> dict[str, list[list[int]]]:
    return {
        "input_ids": [sample.input_ids for sample in samples],
        "labels": [sample.labels for sample in samples],
    }


def _lora(options: TrainOptions) -> Any:
    from peft import LoraConfig

    return LoraConfig(
        r=options.lora_rank,
        lora_alpha=options.lora_alpha or 2 * options.lora_rank,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )


def _first() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


def _progress(lines: Iterable[Any], name: str) -> Iterable[Any]:
    from tqdm import tqdm

    shown: Iterable[Any] = tqdm(lines, desc=f"{name} samples", unit="", disable=not _first())
    return shown

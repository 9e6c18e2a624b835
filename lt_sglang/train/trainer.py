"""TRL's SFTTrainer, told what a run needs, and stopped where going on would do harm."""

from __future__ import annotations

import errno
import math
import shutil
from pathlib import Path
from typing import Any

import torch
from trl import SFTConfig, SFTTrainer

from lt_sglang.errors import LightTransferError
from lt_sglang.train.masks import BLOCK
from lt_sglang.train.options import TrainOptions

COMPLETE = "trainer_state.json"  # transformers writes it last
SHAPES = 8  # lengths of unpacked batches: a kernel is compiled for each


class HybridTrainer(SFTTrainer):
    """SFTTrainer that ends with a sentence when the loss is not finite or the disk is full."""

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> float:
        norm = float(super()._get_grad_norm(model, grad_norm=grad_norm))
        if not math.isfinite(norm):
            # Before the optimizer's step: no weight has seen it yet.
            raise LightTransferError(
                f"loss: not finite at step {self.state.global_step + 1} (gradient norm {norm}); stopped "
                f"before the weights changed, {kept(Path(self.args.output_dir))}. Lower --learning-rate, or "
                "look at the data"
            )
        return norm

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        try:
            super()._save_checkpoint(model, trial)
        except Exception as error:
            if not disk_is_full(error):
                raise
            if self.is_world_process_zero():
                shutil.rmtree(folder, ignore_errors=True)
            raise LightTransferError(
                f"{folder}: the disk is full; stopped, {kept(folder.parent)}. Make room and go on with "
                "--resume"
            ) from None

    def create_model_card(self, *_args: Any, **_kwargs: Any) -> None:
        """None: it would describe a model of TRL's, not how this one is to be served."""


def disk_is_full(error: BaseException) -> bool:
    """Whether a library's error comes from a full disk; safetensors and torch wrap the system's."""
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    return full or "No space left on device" in str(error) or "os error 28" in str(error)


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was written to its end."""
    found = [path for path in folder.glob("checkpoint-*") if (path / COMPLETE).is_file()]
    return max(found, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def kept(folder: Path) -> str:
    """Where the run can go on from, as a phrase for messages."""
    last = last_checkpoint(folder)
    return f"the last good checkpoint is {last}" if last else "no checkpoint had been written yet"


def padded_to(options: TrainOptions) -> int:
    """Rows are padded to a multiple of this many tokens, so that few shapes are compiled.

    Packed rows are nearly full and get one shape; others at most SHAPES.
    """
    tiles = -(-options.max_length // BLOCK)
    return BLOCK * (tiles if options.packing else -(-tiles // SHAPES))


def arguments(options: TrainOptions, layer_classes: list[str], evaluates: bool) -> SFTConfig:
    """SFTTrainer's own options for a run."""
    fsdp: dict[str, Any] = {}
    if options.gpus > 1:
        fsdp = {
            "fsdp": True,
            "fsdp_config": {
                "version": 2,
                "transformer_layer_cls_to_wrap": layer_classes,
                "activation_checkpointing": options.gradient_checkpointing,
                "cpu_offload": options.offload,
                "state_dict_type": "FULL_STATE_DICT",
            },
        }
    checkpointing = options.gradient_checkpointing and options.gpus == 1
    strategy = {True: "steps", False: "epoch"}
    made = SFTConfig(
        output_dir=str(options.checkpoints),
        use_cpu=options.device == "cpu",
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=options.batch_size,
        gradient_accumulation_steps=options.accumulate,
        num_train_epochs=options.epochs,
        max_steps=options.max_steps,
        learning_rate=options.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=min(options.warmup_share, 0.999),
        weight_decay=options.weight_decay,
        max_grad_norm=options.max_grad_norm,
        bf16=options.precision == "bfloat16",
        gradient_checkpointing=checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if checkpointing else None,
        max_length=options.max_length,
        packing=options.packing,
        packing_strategy="bfd",
        pad_to_multiple_of=padded_to(options),
        save_strategy=strategy[options.save_steps > 0],
        save_steps=options.save_steps or 500,
        save_total_limit=options.keep_checkpoints,
        eval_strategy=strategy[options.eval_steps > 0] if evaluates else "no",
        eval_steps=options.eval_steps or None,
        prediction_loss_only=True,
        logging_steps=1,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        report_to=["tensorboard"] if options.tensorboard else [],
        dataloader_pin_memory=options.device != "cpu" and torch.cuda.is_available(),
        seed=options.seed,
        data_seed=options.seed,
        disable_tqdm=False,
        **fsdp,
    )
    if fsdp and made.bf16:
        made.fsdp_plugin_args["mixed_precision_policy"] = sharding_policy(options.gather)
    return made


def sharding_policy(gather: str) -> Any:
    """torch's MixedPrecisionPolicy of weights that are sharded over GPUs.

    Gathered in float32, they compute as on one GPU: autocast takes bfloat16 for products, and norms and
    sums stay in float32. Gathered in bfloat16, all is computed in it, for half of the bytes on the links and
    of what a layer keeps. accelerate's own policy also returns the loss in bfloat16, and adds gradients up
    in it.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy

    return MixedPrecisionPolicy(
        param_dtype=None if gather == "float32" else torch.bfloat16,
        reduce_dtype=torch.float32,
        output_dtype=torch.float32,
    )

"""``lt-sglang plan --train``: memory and time of a training run."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from typing import Any

from lt_sglang.cli.parser import Parser, numbers, positive
from lt_sglang.cli.train import add_job_options, recipe_overrides
from lt_sglang.config import CONFIG_KEY, LightTransferConfig
from lt_sglang.errors import LightTransferError
from lt_sglang.launch.model_config import read_model_config
from lt_sglang.launch.options import LtOptions, describe, resolve_config, take_options
from lt_sglang.planner.shapes import GIB, GPUS, SHAPES, ModelShape, shape_from_config
from lt_sglang.train.options import read_recipe
from lt_sglang.train.plan import TrainJob, TrainPlan, as_dict, plan_training

BYTES = {"float32": 4, "bfloat16": 2}
DEFAULT_GPU = "h100-80"
DEFAULT_LENGTHS = (4096, 8192, 16384, 32768)
# Hub names of the recipes, whose config.json may not be at hand.
RECIPE_SHAPES = {"Qwen/Qwen2.5-32B-Instruct": "qwen2.5-32b"}
COLUMNS = (
    ("row", "tokens"),
    ("state", "GiB"),
    ("layers", "GiB"),
    ("activations", "GiB"),
    ("total", "GiB"),
    ("fits", ""),
    ("host", "GiB"),
    ("step", "s"),
    ("step, full", "s"),
    ("attention", "share"),
    ("full", "share"),
    ("tokens/s", ""),
    ("run", "hours"),
)
NOTES = """\
On one GPU. state: its share of weights, gradients and AdamW's moments; layers: whole ones,
  gathered for a moment; activations with a layer at work; total with a reserve. host: in its memory, a GPU.
step, full: with full attention in all layers. share: attention's part of a step's operations, lazy and full.
Estimates, from shares of peak that were reached elsewhere: a first step says more."""


def run(argv: list[str]) -> int:
    """Print the plan; raises LightTransferError."""
    options, rest = take_options(argv)
    args = _arguments(rest)
    shape, config = _model(args, options)
    jobs = [
        TrainJob(
            shape=shape,
            gpu=GPUS[args.gpu],
            config=config,
            gpus=args.gpus,
            length=length,
            batch=args.batch_size,
            accumulate=args.accumulate,
            weight_bytes=BYTES[args.weights],
            checkpointing=args.gradient_checkpointing,
            lora_rank=args.lora_rank,
            gather_bytes=BYTES[args.gather],
            offload=args.offload,
            tokens=args.samples * min(args.sample_tokens or length, length) if args.samples else None,
            epochs=args.epochs,
        )
        for length in args.lengths
    ]
    plans = [plan_training(job) for job in jobs]
    if args.json:
        told = [as_dict(job, plan) for job, plan in zip(jobs, plans, strict=True)]
        print(
            json.dumps(
                {"model": shape.name, "gpus": args.gpus, CONFIG_KEY: config.to_dict(), "rows": told}, indent=1
            )
        )
        return 0
    print(_text(jobs, plans))
    return 0


def _text(jobs: list[TrainJob], plans: list[TrainPlan]) -> str:
    job = jobs[0]
    how = f"LoRA of rank {job.lora_rank}" if job.lora_rank else f"all weights in {8 * job.weight_bytes} bits"
    kept = "gradient checkpointing" if job.checkpointing else "no checkpointing"
    head = [
        f"{job.shape.name}, {job.shape.params / 1e9:.1f} billion weights; {describe(job.config)}",
        f"{job.gpus} x {job.gpu.name}, {job.batch} x {job.accumulate} rows a GPU and step; {how}, AdamW, "
        + kept
        + (", state in the host's memory" if job.offload else ""),
        "",
    ]
    rows = [list(column) for column in zip(*COLUMNS, strict=True)]
    for one, plan in zip(jobs, plans, strict=True):
        gib = [f"{value / GIB:.1f}" for value in (plan.state, plan.gathered, plan.activations, plan.total)]
        rows.append(
            [
                str(one.length),
                *gib,
                "yes" if plan.fits else "no",
                f"{plan.host / GIB:.1f}",
                f"{plan.step_seconds:.1f}",
                f"{plan.full_step_seconds:.1f}",
                f"{plan.attention_share:.0%}",
                f"{plan.full_attention_share:.0%}",
                f"{plan.tokens_a_second:.0f}",
                "-" if plan.hours is None else f"{plan.hours:.1f}",
            ]
        )
    widths = [max(len(row[index]) for row in rows) for index in range(len(COLUMNS))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join([*head, *lines, "", NOTES])


def _model(args: argparse.Namespace, options: LtOptions) -> tuple[ModelShape, LightTransferConfig]:
    if options.mode == "dynamic":
        raise LightTransferError("--lt-mode dynamic: training needs one list of layers; leave it out")
    name = args.shape or RECIPE_SHAPES.get(args.model_path or "")
    if name is not None:
        shape = SHAPES[name]
        model_config: dict[str, Any] = {"num_hidden_layers": shape.layers}
        if options.lazy_layers is None and options.config is None and args.lighttransfer is None:
            options = replace(options, lazy_layers="half")
    elif args.model_path is None:
        raise LightTransferError("--model-path, --shape or --recipe: one of them is needed")
    else:
        found = read_model_config(args.model_path, None)
        if found is None:
            raise LightTransferError(
                f"--model-path {args.model_path}: no config.json can be read; use --shape"
            )
        model_config, shape = found, shape_from_config(found, args.model_path)
    config = resolve_config(options, shape.name, model_config, recipe_overrides(options, args))
    assert config is not None
    return shape, config


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = _parser()
    early, _ = parser.parse_known_args([word for word in argv if word not in ("-h", "--help")])
    if early.recipe:
        recipe = read_recipe(early.recipe)
        if "max_length" in recipe:
            parser.set_defaults(lengths=(recipe["max_length"],))
        known = vars(early).keys() | {"lighttransfer"}
        parser.set_defaults(**{key: value for key, value in recipe.items() if key in known})
    return parser.parse_args(argv)


def _parser() -> Parser:
    parser = Parser(
        prog="lt-sglang plan --train",
        description="Memory and time of lt-sglang train, for a model, GPUs and lengths; half of a shape's "
        "layers lazy by default. --lt-lazy-layers, --lt-config and the windows as in lt-sglang train.",
    )
    add_job_options(parser)
    add = parser.add_argument
    add("--shape", choices=sorted(SHAPES), help="a known shape")
    add("--gpu", choices=sorted(GPUS), default=DEFAULT_GPU, help=f"default {DEFAULT_GPU}")
    add("--lengths", type=numbers, default=DEFAULT_LENGTHS, help="tokens of a row, e.g. 8192,16384")
    add("--samples", type=positive, help="for the hours of the whole run")
    add("--sample-tokens", type=positive, help="of a sample, on average; default a whole row")
    add("--json", action="store_true", help="print JSON")
    return parser

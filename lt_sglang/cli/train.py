"""``lt-sglang train``: fine-tune a model for its lazy layers; what comes out is served without a flag."""

from __future__ import annotations

import argparse
import errno
import importlib.util
import os
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lt_sglang.cli.parser import Parser, positive, positive_float
from lt_sglang.config import CONFIG_KEY, LightTransferConfig
from lt_sglang.errors import LightTransferError
from lt_sglang.launch.model_config import read_model_config, unsupported_features
from lt_sglang.launch.options import LtOptions, describe, resolve_config, take_options

LAYERS = ("given", "frequency")
SELECTED = "layers.json"
# Read before anything heavy is imported, so they stand here and not in lt_sglang.train, which imports torch.
LOSS_ON = ("answers", "all")
TOO_LONG = ("truncate", "drop")
DTYPES = ("bfloat16", "float32")
NEEDED = ("trl", "peft", "accelerate", "datasets")
EPILOG = """\
lazy layers, static mode only:
  --lt-lazy-layers LAYERS   with --layers given (default): 5-24,26, or half, ends:0.5 and others (lt-sglang
                            serve --help)
  --lt-config FILE.json     the same from a file, such as calibrate's
  --lt-keep 0.5, --lt-score NAME    with --layers frequency, as of lt-sglang calibrate
  --lt-sink-tokens N, --lt-recent-tokens N    windows, default 4 and 1020

A sample is a JSON line with question + combined_text (long_form_thought_data_5k), messages, prompt +
completion (or question + answer), or text. Options on the command line override those of a recipe.

examples:
  lt-sglang train --model-path ./qwen --data train.jsonl --out ./qwen-lazy --layers frequency --lt-keep 0.5
  lt-sglang train --recipe qwq-32b --data long_form_thought_5k.jsonl --out ./qwq
  lt-sglang train ... --resume              (goes on from the last complete checkpoint)"""


def run(argv: list[str]) -> int:
    """Train; with several GPUs, become their launcher. Raises LightTransferError."""
    check_installed()
    options, rest = take_options(argv)
    args = _arguments(rest)
    config = choose_config(options, args)
    if args.gpus > 1 and "LOCAL_RANK" not in os.environ:
        _launch(args.gpus, options, config, args, rest)
    if args.gpus == 1 and "LOCAL_RANK" not in os.environ:
        # The trainer would spread one process over all GPUs it sees.
        os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]
    from lt_sglang.train.run import how_to_go_on, train

    run_options = as_options(args, config)
    check_device(run_options.device)
    if int(os.environ.get("RANK", "0")) == 0:
        print(describe(config), file=sys.stderr)
    try:
        train(run_options)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise LightTransferError(f"--out {run_options.out}: the disk is full ({error})") from None
    if int(os.environ.get("RANK", "0")) == 0:
        print(how_to_go_on(run_options))
    return 0


def check_installed() -> None:
    """Raise LightTransferError that says how to get what is missing."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise LightTransferError(f"train: needs {', '.join(missing)}: pip install 'lt-sglang[train]'")


def check_device(device: str | None) -> None:
    """Raise LightTransferError if a GPU was asked for and there is none."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise LightTransferError("--device cuda: torch finds no GPU here")


def choose_config(options: LtOptions, args: argparse.Namespace) -> LightTransferConfig:
    """The static list, given or by frequency; raises LightTransferError.

    The processes that a launcher starts find --lt-config on their command line, so that one list is chosen.
    """
    if options.mode == "dynamic":
        raise LightTransferError("--lt-mode dynamic: training needs one list of layers; leave it out")
    if options.decide is not None:
        raise LightTransferError("--lt-decide: only of dynamic mode, which is not trained")
    model_config = read_model_config(args.model_path, args.revision)
    if model_config is None:
        raise LightTransferError(f"--model-path {args.model_path}: its config.json cannot be read")
    wrong = unsupported_features(model_config)
    if wrong:
        raise LightTransferError(
            f"--model-path {args.model_path}: it has {', '.join(wrong)}, which lazy layers do not support"
        )
    plain = replace(options, keep=None, score=None)
    if args.layers == "given":
        for name in ("keep", "score"):
            if getattr(options, name) is not None:
                raise LightTransferError(f"--lt-{name}: only with --layers frequency")
        config = resolve_config(plain, args.model_path, model_config, recipe_overrides(options, args))
        assert config is not None
        if config.dynamic:
            raise LightTransferError(f"{config.source}: has mode 'dynamic'; training needs a static list")
        return config
    if options.config is not None or options.lazy_layers is not None:
        raise LightTransferError(f"--layers {args.layers}: chooses the lazy layers; leave out the list given")
    found = _by_frequency(options, args)
    config = resolve_config(replace(plain, config=str(found)), args.model_path, model_config, {})
    assert config is not None
    return config


def _by_frequency(options: LtOptions, args: argparse.Namespace) -> Path:
    """Let calibrate choose on the training samples; a file that stands is taken as it is."""
    out = args.out / SELECTED
    if out.is_file():
        return Path(out)
    import json

    from lt_sglang.cli import calibrate
    from lt_sglang.train.samples import read_records

    args.out.mkdir(parents=True, exist_ok=True)
    texts = args.out / "calibrate.jsonl"
    with texts.open("w", encoding="utf-8") as file:
        for record in read_records(args.data):
            text = record.text or "\n".join(message["content"] for message in record.messages)
            file.write(json.dumps({"text": text}) + "\n")
    words = ["--model-path", args.model_path, "--data", str(texts), "--out", str(out)]
    words += ["--max-tokens", str(args.max_length), "--seed", str(args.seed)]
    calibrate.run([*words, *([] if args.plots else ["--no-plots"]), *options.as_flags()])
    return Path(out)


def _launch(
    gpus: int, options: LtOptions, config: LightTransferConfig, args: argparse.Namespace, rest: list[str]
) -> None:
    """Become torchrun, with the chosen list in a file. Does not return."""
    import json

    args.out.mkdir(parents=True, exist_ok=True)
    chosen = args.out / SELECTED
    if not (args.layers == "frequency" or (options.config and Path(options.config) == chosen)):
        chosen.write_text(json.dumps({CONFIG_KEY: config.to_dict()}, indent=1) + "\n", encoding="utf-8")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={gpus}"]
    command = [*torchrun, "-m", "lt_sglang", "train", *rest, "--layers", "given", "--lt-config", str(chosen)]
    sys.stdout.flush()
    os.execv(sys.executable, command)


def as_options(args: argparse.Namespace, config: LightTransferConfig) -> Any:
    """``TrainOptions`` of the arguments."""
    from lt_sglang.train.options import TrainOptions

    names = TrainOptions.__dataclass_fields__.keys() - {"config"}
    values = {name: getattr(args, name) for name in names}
    values |= {"data": tuple(args.data), "eval_data": tuple(args.eval_data or ())}
    if values["device"] is None and not _has_cuda():
        values["device"] = "cpu"
    return TrainOptions(config=config, **values)


def _has_cuda() -> bool:
    import torch

    return bool(torch.cuda.is_available())


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = _parser()
    early, _ = parser.parse_known_args([word for word in argv if word not in ("-h", "--help")])
    if early.recipe:
        from lt_sglang.train.options import read_recipe

        parser.set_defaults(**_typed(read_recipe(early.recipe), early.recipe))
    args = parser.parse_args(argv)
    for name, flag in (("model_path", "--model-path"), ("data", "--data"), ("out", "--out")):
        if getattr(args, name) is None:
            raise LightTransferError(f"{flag}: missing; see lt-sglang train --help")
    for path in (*args.data, *(args.eval_data or ())):
        if not path.is_file():
            raise LightTransferError(f"--data {path}: no such file")
    return args


def _typed(recipe: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Checked as if they had been given on the command line."""
    parser = _parser()
    values: dict[str, Any] = {}
    words: list[str] = []
    for key, value in recipe.items():
        flag = f"--{key.replace('_', '-')}"
        if key == CONFIG_KEY:
            values[key] = value
        elif key in ("packing", "gradient_checkpointing", "plots"):
            words += [f"--no-{flag.removeprefix('--')}"] if value is False else []
        elif isinstance(value, bool):
            words += [flag] if value else []
        else:
            for one in value if isinstance(value, list) else [value]:
                words += [flag, str(one)]
    try:
        parsed = vars(parser.parse_args(words))
    except LightTransferError as error:
        raise LightTransferError(f"--recipe {name}: {error}") from None
    plain = vars(parser.parse_args([]))
    return values | {key: value for key, value in parsed.items() if value != plain[key]}


def add_job_options(parser: Parser) -> None:
    """What memory and time of a run depend on; ``lt-sglang plan --train`` has them too."""
    add = parser.add_argument
    add("--recipe", help="a ready one (qwq-32b) or a JSON file: option names and values")
    add("--model-path", "--model", help="a folder or a hub name")
    add("--epochs", type=positive_float, default=1.0, help="default 1")
    add("--batch-size", type=positive, default=1, help="rows a GPU at a time, default 1")
    add("--accumulate", type=positive, default=1, help="batches a step, default 1")
    add("--weights", choices=DTYPES, default=DTYPES[1], help="of trained weights and optimizer state")
    add("--no-gradient-checkpointing", dest="gradient_checkpointing", action="store_false")
    add("--lora-rank", type=int, default=0, help="train adapters of this rank and merge them; 0: all weights")
    add("--gpus", type=positive, default=1, help="processes, weights sharded over them (FSDP2)")
    add(
        "--gather",
        choices=DTYPES,
        default=DTYPES[1],
        help="with --gpus: type in which weights are gathered, default float32",
    )
    add("--offload", action="store_true", help="with --gpus: weights and optimizer in the host's memory")
    parser.set_defaults(lighttransfer=None)


def recipe_overrides(options: LtOptions, args: argparse.Namespace) -> dict[str, Any]:
    """The recipe's list, where --lt-config gives none, as the model's own is given."""
    if not args.lighttransfer or options.config is not None:
        return {}
    return {CONFIG_KEY: {**args.lighttransfer, "source": f"the recipe {args.recipe}"}}


def _parser() -> Parser:
    parser = Parser(
        prog="lt-sglang train",
        description="Fine-tune a model under the mask it will be served with (LightTransfer-Train).",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_job_options(parser)
    add = parser.add_argument
    add("--revision", help="of the hub model")
    add(
        "--data", action="append", type=Path, metavar="FILE.jsonl", help="samples; may be given several times"
    )
    add("--eval-data", action="append", type=Path, metavar="FILE.jsonl", help="held-out samples")
    add("--out", type=Path, help="folder: the model, and checkpoints/ on the way")
    add("--layers", choices=LAYERS, default=LAYERS[0], help="whose lazy layers; default given")
    add("--loss-on", choices=LOSS_ON, default=LOSS_ON[0], help="default answers")
    add("--max-length", type=positive, default=8192, help="tokens of a row, default 8192")
    add("--too-long", choices=TOO_LONG, default=TOO_LONG[0], help="longer samples; default truncate")
    add("--no-packing", dest="packing", action="store_false", help="one sample a row")
    add("--max-steps", type=positive, default=-1, help="instead of epochs")
    add("--learning-rate", type=positive_float, default=1e-5, help="at its highest, then a cosine; 1e-5")
    add("--warmup-share", type=_share, default=0.03, help="of the steps, default 0.03")
    add("--weight-decay", type=_share, default=0.0)
    add("--max-grad-norm", type=positive_float, default=1.0)
    add("--seed", type=int, default=0)
    add("--precision", choices=DTYPES, default=DTYPES[0], help="of the arithmetic")
    add("--lora-alpha", type=int, default=0, help="default twice the rank")
    add("--resume", action="store_true", help="go on from the last complete checkpoint of --out")
    add("--save-steps", type=positive, default=0, help="default once an epoch")
    add("--keep-checkpoints", type=positive, default=2, help="default 2")
    add("--eval-steps", type=positive, default=0, help="default once an epoch")
    add("--tensorboard", action="store_true", help="write its events into OUT/checkpoints/runs")
    add("--no-plots", dest="plots", action="store_false", help="no loss.png")
    add("--device", choices=("cpu", "cuda"), help="default: a GPU if there is one")
    return parser


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share from 0 to below 1")
    return value

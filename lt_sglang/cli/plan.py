"""``lt-sglang plan``: how many requests fit, and the gain to expect."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace

from lt_sglang.cli.parser import Parser, positive, positive_float, share
from lt_sglang.config import LightTransferConfig
from lt_sglang.errors import LightTransferError
from lt_sglang.launch.model_config import check_tp, read_model_config, unsupported_features
from lt_sglang.launch.options import HALF, OPTIONS_HELP, LtOptions, describe, resolve_config, take_options
from lt_sglang.planner.capacity import KV_ELEMENT_BYTES, Deployment, LengthPlan, plan_length
from lt_sglang.planner.report import as_dict, as_text
from lt_sglang.planner.roofline import Hardware
from lt_sglang.planner.shapes import GIB, GPUS, SHAPES, ModelShape, shape_from_config

DEFAULT_LENGTHS = (4096, 8192, 16384, 32768, 65536, 131072)
DEFAULT_GPU = "h100-80"
DEFAULT_OUTPUT = 512
TRAIN = "--train"


def run(argv: list[str]) -> int:
    """Print the plan; raises LightTransferError if nothing can be planned."""
    if TRAIN in argv:
        from lt_sglang.cli import plan_train

        return plan_train.run([word for word in argv if word != TRAIN])
    options, rest = take_options(argv)
    args = _parser().parse_args(rest)
    deployment = build_deployment(args, options)
    plans = plan_lengths(deployment, args)
    if args.json:
        print(json.dumps(as_dict(deployment, plans), indent=2))
    else:
        print(as_text(deployment, plans, describe(deployment.config)))
    return 0


def build_deployment(args: argparse.Namespace, options: LtOptions) -> Deployment:
    """The deployment that the arguments describe; raises LightTransferError."""
    shape, config = _model(args, options)
    heads = {"num_attention_heads": shape.q_heads, "num_key_value_heads": shape.kv_heads}
    check_tp(heads, args.tp, "--tp")
    if args.weights_gib is not None:
        shape = replace(shape, weight_bytes=args.weights_gib * GIB / shape.params, half_params=0.0)
    gpu = GPUS[args.gpu or DEFAULT_GPU]
    if args.gpu_memory_gib is not None:
        gpu = replace(gpu, memory=args.gpu_memory_gib * GIB)
        if args.gpu is None:
            gpu = replace(gpu, name=f"GPU as fast as {gpu.name}")
    return Deployment(
        shape=shape,
        hardware=Hardware(gpu=gpu, tp=args.tp),
        config=config,
        mem_fraction=args.mem_fraction_static,
        weights_bytes=shape.total_weight_bytes,
        kv_cache_dtype=args.kv_cache_dtype,
        chunk_tokens=args.chunked_prefill_size,
    )


def plan_lengths(deployment: Deployment, args: argparse.Namespace) -> list[LengthPlan]:
    """A plan for every length asked for; the default lengths as far as the model's context reaches."""
    lengths: tuple[int, ...] = args.lengths or ((args.input_tokens,) if args.input_tokens else ())
    if not lengths:
        longest = deployment.shape.max_tokens
        lengths = tuple(n for n in DEFAULT_LENGTHS if longest is None or n + args.output_tokens <= longest)
        lengths = lengths or (max(1, (longest or DEFAULT_LENGTHS[0]) - args.output_tokens),)
    return [plan_length(deployment, length, args.output_tokens) for length in lengths]


def _model(args: argparse.Namespace, options: LtOptions) -> tuple[ModelShape, LightTransferConfig]:
    if args.shape is not None:
        shape = SHAPES[args.shape]
        if options.lazy_layers is None and options.config is None and options.mode != "dynamic":
            options = replace(options, lazy_layers=HALF)
        config = resolve_config(options, shape.name, {"num_hidden_layers": shape.layers}, {})
    else:
        model_config = read_model_config(args.model_path, args.revision)
        if model_config is None:
            raise LightTransferError(
                f"--model-path {args.model_path}: its config.json cannot be read; use --shape"
            )
        wrong = unsupported_features(model_config)
        if wrong:
            raise LightTransferError(
                f"--model-path {args.model_path}: it has {', '.join(wrong)}, which lazy layers do not support"
            )
        if args.weights_gib is not None:
            model_config = {key: value for key, value in model_config.items() if key != "quantization_config"}
        shape = shape_from_config(model_config, args.model_path)
        config = resolve_config(options, args.model_path, model_config, {})
    assert config is not None
    return shape, config


def _parser() -> Parser:
    parser = Parser(
        prog="lt-sglang plan",
        description="Say how many requests of which length fit into the KV memory, and the gain to expect. "
        "With --train: memory and time of lt-sglang train (lt-sglang plan --train --help).",
        epilog=OPTIONS_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--model-path", "--model", help="a folder or a hub name: reads its config.json")
    model.add_argument(
        "--shape", choices=sorted(SHAPES), help="a known shape; half of its layers lazy by default"
    )
    parser.add_argument("--revision", help="of the hub model")
    parser.add_argument("--gpu", choices=sorted(GPUS), help=f"default {DEFAULT_GPU}")
    parser.add_argument(
        "--gpu-memory-gib", type=positive_float, help="memory of one GPU, instead of the known one"
    )
    parser.add_argument("--weights-gib", type=positive_float, help="all weights, instead of counting them")
    parser.add_argument(
        "--tp", "--tp-size", type=positive, default=1, help="GPUs (tensor parallel), default 1"
    )
    parser.add_argument("--mem-fraction-static", type=share, default=0.88, help="as SGLang's, default 0.88")
    parser.add_argument(
        "--kv-cache-dtype", choices=sorted(KV_ELEMENT_BYTES), default="auto", help="as SGLang's"
    )
    parser.add_argument(
        "--chunked-prefill-size", type=positive, default=8192, help="as SGLang's, default 8192"
    )
    lengths = parser.add_mutually_exclusive_group()
    lengths.add_argument("--input-tokens", type=positive, help="one prompt length")
    lengths.add_argument(
        "--lengths", type=_lengths, help="prompt lengths, e.g. 4096,8192; default 4096 to 131072"
    )
    parser.add_argument(
        "--output-tokens",
        type=positive,
        default=DEFAULT_OUTPUT,
        help=f"tokens generated, default {DEFAULT_OUTPUT}",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _lengths(text: str) -> tuple[int, ...]:
    return tuple(positive(part.strip()) for part in text.split(","))

"""``lt-sglang plan``: how many requests fit, and the gain to expect."""

from __future__ import annotations

import argparse
import json
import shlex
from dataclasses import replace
from typing import NamedTuple

from lt_sglang.cli.parser import Parser, numbers, positive, positive_float
from lt_sglang.config import LightTransferConfig
from lt_sglang.errors import LightTransferError
from lt_sglang.launch import sglang_args as flags
from lt_sglang.launch.model_config import check_tp, read_model_config, unsupported_features
from lt_sglang.launch.options import OPTIONS_HELP, LtOptions, describe, resolve_config, take_options
from lt_sglang.launch.sglang_args import SglangArgs
from lt_sglang.models import find_config
from lt_sglang.numerals import read_float, read_int
from lt_sglang.planner.capacity import (
    KV_ELEMENT_BYTES,
    Deployment,
    LengthPlan,
    MixPlan,
    plan_length,
    plan_mix,
)
from lt_sglang.planner.mix import Part
from lt_sglang.planner.report import as_dict, as_text
from lt_sglang.planner.roofline import Hardware
from lt_sglang.planner.shapes import GIB, GPUS, SHAPES, Gpu, ModelShape, shape_from_config

DEFAULT_LENGTHS = (4096, 8192, 16384, 32768, 65536, 131072)
DEFAULT_GPU = "h100-80"
DEFAULT_OUTPUT = 512
DEFAULT_MEM_FRACTION = 0.88
DEFAULT_CHUNK = 8192
SHARES_TOLERANCE = 0.02  # three thirds may be written as 0.33 each
TRAIN = "--train"
# SGLang's flags that a plan depends on; it is passed on to serve with all others.
READ = (
    *(*flags.MODEL_PATH, *flags.REVISION, *flags.TP_SIZE, *flags.CONTEXT_LENGTH),
    *(*flags.MEM_FRACTION, *flags.KV_CACHE_DTYPE, *flags.CHUNK, *flags.MODEL_OVERRIDES),
)
DESCRIPTION = """\
Say how many requests of which lengths fit into the KV memory, and the gain to expect. Takes the command line
of lt-sglang serve and ends with one. It counts with SGLang's --tp-size, --context-length,
--mem-fraction-static, --kv-cache-dtype and --chunked-prefill-size. A shape, and a model whose lazy layers are
not known, are planned in dynamic mode. With --train: memory and time of lt-sglang train."""


class Plan(NamedTuple):
    """What is planned: the deployment, its lines, and what to say besides the table."""

    deployment: Deployment
    lengths: list[LengthPlan]
    mix: MixPlan | None
    remarks: list[str]
    serve: str


def run(argv: list[str]) -> int:
    """Print the plan; raises LightTransferError if nothing can be planned."""
    if TRAIN in argv:
        from lt_sglang.cli import plan_train

        return plan_train.run([word for word in argv if word != TRAIN])
    plan, as_json = make_plan(argv)
    if as_json:
        told = as_dict(plan.deployment, plan.lengths, plan.mix)
        print(json.dumps({**told, "remarks": plan.remarks, "serve": plan.serve}, indent=2))
    else:
        print(as_text(plan.deployment, plan.lengths, describe(plan.deployment.config), plan.mix))
        print("\n".join(["", *plan.remarks, "", "To serve them:", f"  {plan.serve}"]))
    return 0


def make_plan(argv: list[str]) -> tuple[Plan, bool]:
    """The plan that a command line asks for, and whether as JSON; raises LightTransferError."""
    given, rest = take_options(argv)
    own, rest = _parser().parse_known_args(rest)
    args = SglangArgs(rest)
    remarks = []
    if (model := args.get(flags.MODEL_PATH)) is not None and own.shape is not None:
        raise LightTransferError(f"--shape {own.shape}: {model} is given too; give one of them")
    shape, config, options = _model(args, own, given)
    if options != given:
        remarks.append(
            "No lazy layers were given, and none are known for this model: planned in dynamic mode."
        )
    if own.weights_gib is not None:
        shape = replace(shape, weight_bytes=own.weights_gib * GIB / shape.params, half_params=0.0)
    gpu = GPUS[own.gpu or DEFAULT_GPU]
    if own.gpu_memory_gib is not None:
        gpu = replace(gpu, memory=own.gpu_memory_gib * GIB)
        if own.gpu is None:
            gpu = replace(gpu, name=f"GPU as fast as {gpu.name}")
    planned = deployment(args, shape, config, gpu)
    rows = [(length, own.output_tokens) for length in own.lengths or ()]
    if own.mix is not None and own.lengths is None:
        rows = [(part.input_tokens, part.output_tokens) for part in own.mix]
    elif own.lengths is None:
        lengths = _default_lengths(planned.shape, own.output_tokens)
        rows = [(length, own.output_tokens) for length in lengths]
        if left := sorted(set(DEFAULT_LENGTHS) - set(lengths)):
            remarks.append(
                f"Left out, since the context has {planned.shape.max_tokens} tokens (--context-length): "
                f"prompts of {', '.join(map(str, left))}."
            )
    if unread := args.unread(READ):
        remarks.append(f"Passed on to serve, and not counted with: {' '.join(unread)}.")
    plans = [plan_length(planned, *row) for row in rows]
    mixed = None if own.mix is None else plan_mix(planned, own.mix)
    return Plan(planned, plans, mixed, remarks, _serve(args, options)), own.json


def deployment(args: SglangArgs, shape: ModelShape, config: LightTransferConfig, gpu: Gpu) -> Deployment:
    """A shape with SGLang's flags ``args`` on GPUs; raises LightTransferError if they cannot serve it."""
    tp = args.get_int(flags.TP_SIZE, 1)
    heads = {"num_attention_heads": shape.q_heads, "num_key_value_heads": shape.kv_heads}
    check_tp(heads, tp, args.typed(flags.TP_SIZE))
    if args.get(flags.CONTEXT_LENGTH) is not None:
        shape = replace(shape, max_tokens=args.get_int(flags.CONTEXT_LENGTH, 1))
    kv_dtype = args.get(flags.KV_CACHE_DTYPE) or "auto"
    if kv_dtype not in KV_ELEMENT_BYTES:
        allowed = ", ".join(KV_ELEMENT_BYTES)
        raise LightTransferError(f"{flags.KV_CACHE_DTYPE[0]}: {kv_dtype!r} is not one of {allowed}")
    whole = args.get(flags.CHUNK) == "-1"  # prompts are not cut
    return Deployment(
        shape=shape,
        hardware=Hardware(gpu=gpu, tp=tp),
        config=config,
        mem_fraction=args.get_share(flags.MEM_FRACTION, DEFAULT_MEM_FRACTION),
        weights_bytes=shape.total_weight_bytes,
        kv_cache_dtype=kv_dtype,
        chunk_tokens=shape.max_tokens or DEFAULT_CHUNK if whole else args.get_int(flags.CHUNK, DEFAULT_CHUNK),
    )


def _default_lengths(shape: ModelShape, output_tokens: int) -> tuple[int, ...]:
    longest = shape.max_tokens or DEFAULT_LENGTHS[-1] + output_tokens
    lengths = tuple(length for length in DEFAULT_LENGTHS if length + output_tokens <= longest)
    return lengths or (max(1, longest - output_tokens),)


def _model(
    args: SglangArgs, own: argparse.Namespace, options: LtOptions
) -> tuple[ModelShape, LightTransferConfig, LtOptions]:
    """The shape, its configuration, and the options with what is assumed where nothing is known."""
    if own.shape is not None:
        shape = SHAPES[own.shape]
        name, model_config = shape.name, {"num_hidden_layers": shape.layers}
    elif not (name := args.get(flags.MODEL_PATH) or ""):
        raise LightTransferError("--model-path or --shape: one of them is needed; see lt-sglang plan --help")
    else:
        found = read_model_config(name, args.get(flags.REVISION))
        if found is None:
            raise LightTransferError(f"--model-path {name}: its config.json cannot be read; use --shape")
        if wrong := unsupported_features(found):
            raise LightTransferError(
                f"--model-path {name}: it has {', '.join(wrong)}, which lazy layers do not support"
            )
        if own.weights_gib is not None:
            found = {key: value for key, value in found.items() if key != "quantization_config"}
        shape, model_config = shape_from_config(found, name), found
    overrides = args.overrides()
    nothing = options.mode is None and options.lazy_layers is None and options.config is None
    if nothing and find_config(overrides, model_config, name, "") is None:
        options = replace(options, mode="dynamic")
    config = resolve_config(options, name, model_config, overrides)
    assert config is not None
    return shape, config, options


def _serve(args: SglangArgs, options: LtOptions) -> str:
    """The command line that serves what is planned; MODEL stands for that of a shape."""
    model = args.get(flags.MODEL_PATH) or "MODEL"
    others = args.replaced({}, without=(flags.MODEL_PATH,))
    return shlex.join(["lt-sglang", "serve", model, *others, *options.as_flags()])


def _parser() -> Parser:
    parser = Parser(
        prog="lt-sglang plan",
        usage="lt-sglang plan (MODEL | --shape SHAPE) [options] [--lt-...] [any SGLang flag]",
        description=DESCRIPTION,
        epilog=OPTIONS_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--shape", choices=sorted(SHAPES), help="in place of a model whose config.json is read"
    )
    parser.add_argument("--gpu", choices=sorted(GPUS), help=f"default {DEFAULT_GPU}")
    parser.add_argument(
        "--gpu-memory-gib", type=positive_float, help="memory of one GPU, instead of the known one"
    )
    parser.add_argument("--weights-gib", type=positive_float, help="all weights, instead of counting them")
    parser.add_argument(
        "--lengths",
        "--input-tokens",
        type=numbers,
        help="prompt lengths, e.g. 4096,8192; default 4096 to 131072, as far as the context reaches",
    )
    parser.add_argument(
        "--output-tokens",
        type=positive,
        default=DEFAULT_OUTPUT,
        help=f"tokens generated, default {DEFAULT_OUTPUT}",
    )
    parser.add_argument(
        "--mix",
        type=_mix,
        metavar="512+256:0.8,12000+256:0.2",
        help="several lengths at once: prompt + output tokens, and their share of all requests",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _mix(text: str) -> tuple[Part, ...]:
    parts = [_part(word.strip()) for word in text.split(",")]
    total = sum(part.share for part in parts)
    if abs(total - 1) > SHARES_TOLERANCE:
        raise argparse.ArgumentTypeError(f"{text!r}: the shares add up to {total:g}, not to 1")
    return tuple(parts)


def _part(word: str) -> Part:
    lengths, _, share = word.partition(":")
    prompt, _, output = lengths.partition("+")
    input_tokens, output_tokens = read_int(prompt), read_int(output)
    weight = read_float(share or "1")
    if not input_tokens or not output_tokens or weight is None or weight <= 0:
        raise argparse.ArgumentTypeError(
            f"{word!r} is not prompt + output tokens and a share, as 512+256:0.8"
        )
    return Part(input_tokens, output_tokens, weight)

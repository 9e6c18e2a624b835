"""``lt-sglang models``: the models whose lazy layers are known."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path

from lt_sglang.cli.parser import Parser
from lt_sglang.config import format_layers
from lt_sglang.models import KnownModel, entry_of, known_models

REGISTER = """\
A model whose config.json has the key lighttransfer (lt-sglang train writes it) needs no entry here.
To make one known by its name alone, lt-sglang models --entry FOLDER prints the entry for
lt_sglang/models/known.json."""


def run(argv: list[str]) -> int:
    """Print the known models, one paragraph each, or JSON."""
    parser = Parser(prog="lt-sglang models", description="List the models whose lazy layers are known.")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--entry",
        type=Path,
        metavar="FOLDER",
        help="print the entry that makes its model known by name",
    )
    args = parser.parse_args(argv)
    if args.entry is not None:
        print(json.dumps(entry_of(args.entry), indent=2))
        return 0
    models = known_models()
    if args.json:
        print(json.dumps([_as_dict(model) for model in models], indent=2))
        return 0
    for model in models:
        print(_as_text(model))
    print(REGISTER)
    return 0


def _as_dict(model: KnownModel) -> dict[str, object]:
    return {
        "name": model.name,
        "architecture": model.architecture,
        "num_layers": model.num_layers,
        "origin": model.origin,
        "made": model.made,
        "lighttransfer": model.config.to_dict(),
    }


def _as_text(model: KnownModel) -> str:
    config = model.config
    made = textwrap.fill(f"made {model.made}", width=110, initial_indent="  ", subsequent_indent="  ")
    return (
        f"{model.name}\n"
        f"  {len(config.lazy_layers)} of {model.num_layers} layers: {format_layers(config.lazy_layers)}\n"
        f"  windows: {config.sink_tokens} sink + {config.recent_tokens} recent tokens\n"
        f"  {model.architecture}; {model.origin}\n"
        f"{made}"
    )

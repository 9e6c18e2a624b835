"""Kubernetes manifests, rendered from the chart.

Usage:
    python k8s/render.py MODEL --tp 4 --lazy-layers 8-23 --expected-tokens 16384 > my-model.yaml
    python k8s/render.py MODEL --tp 4 --mode dynamic --keep 0.5 > my-model.yaml
    python k8s/render.py --all      write k8s/manifests/ again, one file for each of the chart's values files

MODEL is a hub name or a folder with its config.json. What the chart checks (weights, heads, context) is read
from config.json where it can be reached. Needs Helm, which is fetched if there is none.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from deploy.tools.fetch import FetchFailed, folder  # noqa: E402 - a script, not a package
from lt_sglang.cli.model_config import read_model_config, unsupported_features  # noqa: E402
from lt_sglang.cli.options import resolve_config, take_options  # noqa: E402
from lt_sglang.config import MODES, format_layers  # noqa: E402
from lt_sglang.errors import LightTransferError  # noqa: E402
from lt_sglang.planner.shapes import GIB, shape_from_config  # noqa: E402

CHART = HERE / "charts" / "lt-sglang"
MANIFESTS = HERE / "manifests"
RELEASE = NAMESPACE = "lt-sglang"
LT_OPTIONS = (
    *("mode", "lazy_layers", "keep", "sink_tokens", "recent_tokens"),
    *("expected_tokens", "expected_output_tokens"),
)


def helm() -> Path:
    """The Helm to use: the machine's, or one fetched."""
    found = shutil.which("helm")
    return Path(found) if found else folder("helm4") / "helm"


def render(
    values: Sequence[Path],
    sets: Sequence[str] = (),
    program: Path | None = None,
    chart: Path = CHART,
    upgrade: bool = False,
) -> str:
    """The manifests of the chart with ``values``; raises LightTransferError with Helm's message.

    ``helm test``'s pod is left out: kubectl would run it at once. upgrade: as `helm upgrade` renders it.
    """
    command = [
        str(program or helm()),
        "template",
        RELEASE,
        str(chart),
        "--namespace",
        NAMESPACE,
        "--skip-tests",
        *(["--is-upgrade"] if upgrade else []),
    ]
    for file in values:
        command += ["--values", str(file)]
    for setting in sets:
        command += ["--set", setting]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise LightTransferError(helm_message(done.stderr))
    # Helm 3 and 4 differ in blank lines alone.
    return re.sub(r"\n\s*\n", "\n", done.stdout)


def helm_message(stderr: str) -> str:
    """What Helm says, without the trail of templates it came through."""
    text = stderr.strip()
    found = re.search(r"execution error at \([^)]*\): (.*)", text)
    return found.group(1) if found else text


def committed() -> Iterator[tuple[Path, Path]]:
    """Each values file of the chart, and the manifest that is made of it."""
    for values in sorted((CHART / "values").glob("*.yaml")):
        yield values, MANIFESTS / values.name


def model_values(args: argparse.Namespace) -> dict[str, Any]:
    """Chart values for a model of the user's; raises LightTransferError."""
    given = {name: getattr(args, name) for name in LT_OPTIONS}
    options, _ = take_options(
        [f"--lt-{name.replace('_', '-')}={value}" for name, value in given.items() if value is not None]
    )
    model_config = read_model_config(args.config or args.model, args.revision)
    config = resolve_config(options, args.model, model_config, {})
    model: dict[str, Any] = {"name": args.model.rstrip("/"), "revision": args.revision}
    engine: dict[str, Any] = {"tensorParallel": args.tp, "replicas": args.replicas}
    if Path(args.model).is_dir():
        # The folder is this machine's: in the cluster it is one of a volume that is there already.
        model |= {
            "name": Path(args.model).resolve().name,
            "path": f"/models/{Path(args.model).resolve().name}",
        }
    if model_config is not None:
        wrong = unsupported_features(model_config)
        if wrong:
            raise LightTransferError(f"{args.model} has {', '.join(wrong)}, which lazy layers do not support")
        shape = shape_from_config(model_config, args.model)
        model |= {
            "weightsGiB": round(shape.total_weight_bytes / GIB, 1),
            "attentionHeads": shape.q_heads,
            "kvHeads": shape.kv_heads,
        }
        engine["contextLength"] = shape.max_tokens or 0
    values: dict[str, Any] = {"model": model, "engine": engine}
    if config is not None:
        values["lightTransfer"] = {
            "mode": config.mode,
            "lazyLayers": format_layers(config.lazy_layers),
            "keep": config.keep if config.dynamic else None,
            "sinkTokens": config.sink_tokens,
            "recentTokens": config.recent_tokens,
            "expectedTokens": config.expected_tokens,
            "expectedOutputTokens": config.expected_output_tokens,
        }
    if args.claim:
        values["modelCache"] = {"existingClaim": args.claim}
    return values


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="render.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", metavar="MODEL")
    parser.add_argument("--all", action="store_true", help="write k8s/manifests/ again")
    parser.add_argument("--tp", type=int, default=1, help="GPUs of one engine")
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument("--lazy-layers", help="5-24,26, none or half; default: the model's own")
    parser.add_argument("--mode", choices=MODES, help="dynamic: each request's lazy layers, from its prompt")
    parser.add_argument("--keep", help="dynamic mode: layers that keep full attention, a number or a share")
    parser.add_argument("--sink-tokens", type=int)
    parser.add_argument("--recent-tokens", type=int)
    parser.add_argument("--expected-tokens", type=int, help="prompt + output of a typical request")
    parser.add_argument("--expected-output-tokens", type=int)
    parser.add_argument("--revision", default="main")
    parser.add_argument(
        "--config", help="a folder with the model's config.json, if MODEL cannot be reached here"
    )
    parser.add_argument("--claim", help="a PersistentVolumeClaim of yours, instead of a new one")
    parser.add_argument(
        "--values", type=Path, action="append", default=[], help="further values, in Helm's form"
    )
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as helm's --set")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Print or write manifests; 2 and one line on stderr if they cannot be made."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.all == (args.model is not None):
        parser.error("either MODEL or --all")
    try:
        if args.all:
            MANIFESTS.mkdir(exist_ok=True)
            for values, manifest in committed():
                manifest.write_text(render([values]), encoding="utf-8")
            return 0
        with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
            json.dump(model_values(args), file)
            file.flush()
            print(render([Path(file.name), *args.values], args.set), end="")
    except (LightTransferError, FetchFailed) as error:
        print(f"render: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

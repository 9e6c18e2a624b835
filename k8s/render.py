"""Kubernetes manifests, rendered from the chart.

Usage:
    python k8s/render.py MODEL --tp 4 --lt-mode dynamic --gpu NVIDIA-H100-80GB-HBM3 > my-model.yaml
    python k8s/render.py MODEL --tp 4 --lt-lazy-layers 8-23 --name chat --namespace llm > my-model.yaml
    python k8s/render.py MODEL --tp 4 --lt-mode dynamic --values-only > my-values.yaml
    python k8s/render.py --all      write k8s/manifests, k8s/ray and deploy/ray/serve again, from the charts

The flags --lt-* are those of lt-sglang serve. Any other that this does not know is SGLang's: engines get it.

MODEL is a hub name, a folder of this machine with its config.json, with --claim a path on that volume, or
s3://BUCKET/FOLDER, from where engines stream the weights.
What the chart checks (weights, heads, context) is read from config.json, of a hub name from the hub
(HF_ENDPOINT, HF_TOKEN); where it cannot be had, a line on stderr says that nothing was checked. Needs Helm,
which is fetched if there is none.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from deploy.tools.fetch import FetchFailed, folder  # noqa: E402 - a script, not a package
from lt_sglang.errors import LightTransferError  # noqa: E402
from lt_sglang.launch.model_config import names_folder, read_model_config, unsupported_features  # noqa: E402
from lt_sglang.launch.options import resolve_config, take_options  # noqa: E402
from lt_sglang.planner.shapes import GIB, shape_from_config  # noqa: E402

CHART = HERE / "charts" / "lt-sglang"
MONITORING = HERE / "charts" / "lt-sglang-monitoring"
RAY = HERE / "charts" / "lt-sglang-ray"
MANIFESTS = HERE / "manifests"
RAY_MANIFESTS = HERE / "ray"
SERVE_CONFIGS = HERE.parent / "deploy" / "ray" / "serve"
RELEASE = NAMESPACE = "lt-sglang"
HUB = "https://huggingface.co"
HUB_SECONDS = 10.0
OBJECT_STORE = "s3://"


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
    release: str = RELEASE,
    namespace: str = NAMESPACE,
) -> str:
    """The manifests of the chart with ``values``; raises LightTransferError with Helm's message.

    ``helm test``'s pod is left out: kubectl would run it at once. upgrade: as `helm upgrade` renders it.
    release, namespace: two of the same name in one namespace replace one another.
    """
    command = [
        str(program or helm()),
        "template",
        release,
        str(chart),
        "--namespace",
        namespace,
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


def committed(chart: Path = CHART, manifests: Path = MANIFESTS) -> Iterator[tuple[Path, Path]]:
    """Each values file of a chart, and the manifest that is made of it."""
    for values in sorted((chart / "values").glob("*.yaml")):
        yield values, manifests / values.name


def made() -> dict[Path, str]:
    """Every file that ``--all`` writes, with its text."""
    files = {manifest: render([values]) for values, manifest in committed()}
    # Alerts and dashboard stand once in a cluster.
    alone = render([], chart=MONITORING, release=MONITORING.name, namespace="monitoring")
    files[MANIFESTS / "monitoring.yaml"] = alone
    for values, manifest in committed(RAY, RAY_MANIFESTS):
        text = files[manifest] = render([values], chart=RAY)
        block = re.search(r"serveConfigV2: \|\n((?: {4}.*\n)+)", text)
        if block:
            head = f"# serve deploy deploy/ray/serve/{values.name}     on a cluster that runs\n"
            files[SERVE_CONFIGS / values.name] = head + textwrap.dedent(block[1])
    return files


def package(chart: Path, folder: Path, program: Path | None = None) -> None:
    """Write a chart's archive, for a registry or `helm install FILE`; raises LightTransferError."""
    command = [str(program or helm()), "package", str(chart), "--destination", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise LightTransferError(done.stderr.strip())
    print(done.stdout, end="")


def model_values(args: argparse.Namespace, flags: list[str]) -> dict[str, Any]:
    """Chart values for a model of the user's; ``flags``: ours and SGLang's. Raises LightTransferError."""
    options, extra = take_options(flags)
    model_config = _model_config(args)
    config = resolve_config(options, args.model, model_config, {})
    model: dict[str, Any] = {"name": args.model.rstrip("/"), "revision": args.revision}
    engine: dict[str, Any] = {
        "tensorParallel": args.tp,
        "replicas": args.replicas,
        "extraArgs": joined(extra),
    }
    if args.gpu is not None:
        engine["gpu"] = {"product": args.gpu}
    if Path(args.model).is_dir():
        # The folder is this machine's: in the cluster it is one of a volume that is there already.
        model |= {
            "name": Path(args.model).resolve().name,
            "path": f"/models/{Path(args.model).resolve().name}",
        }
    elif args.model.startswith(OBJECT_STORE):
        model |= {"name": args.model.rstrip("/").rpartition("/")[2], "url": args.model.rstrip("/")}
    elif names_folder(args.model):
        if not args.claim:
            raise LightTransferError(
                f"{args.model}: no such folder here; --claim names the volume that has it"
            )
        model |= {"name": Path(args.model).name, "path": args.model.rstrip("/")}
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
    if args.weights_gib is not None:
        model["weightsGiB"] = args.weights_gib
    values: dict[str, Any] = {"model": model, "engine": engine}
    if config is not None:
        values["lightTransfer"] = {
            "mode": config.mode,
            "lazyLayers": config.to_dict()["lazy_layers"],
            "keep": config.keep if config.dynamic else None,
            "sinkTokens": config.sink_tokens,
            "recentTokens": config.recent_tokens,
            "kvBytes": config.kv_bytes,
            "score": options.score,
            "decide": options.decide,
            "lastQueries": options.last_queries,
            "checkTables": bool(options.check_tables),
        }
    if args.claim:
        values["modelCache"] = {"existingClaim": args.claim}
    return values


def joined(flags: Sequence[str]) -> list[str]:
    """Each flag with its values in one word, as the chart takes them; raises LightTransferError."""
    found: list[str] = []
    for word in flags:
        if word.startswith("--"):
            found.append(word)
        elif found and "=" not in found[-1]:
            found[-1] += f"={word}"
        else:
            raise LightTransferError(f"{word}: belongs to no flag; several values go into --values")
    return found


def _model_config(args: argparse.Namespace) -> dict[str, Any] | None:
    """The model's config.json; None, and a line on stderr, if it cannot be had. Raises LightTransferError."""
    source = args.config or args.model
    if names_folder(source):
        if Path(source).is_dir():
            model_config = read_model_config(source)
        else:
            model_config, why = None, "it is on the volume"
    elif source.startswith(OBJECT_STORE):
        model_config, why = None, "it is in the object store"
    else:
        model_config, why = _from_hub(source, args.revision)
    if model_config is None:
        print(
            f"render: {args.model}: its config.json was not read ({why}), so nothing was checked: layers, "
            "heads, weights, context; --config FOLDER gives it",
            file=sys.stderr,
        )
    elif args.weights_gib is not None:
        model_config = {key: value for key, value in model_config.items() if key != "quantization_config"}
    return model_config


def _from_hub(name: str, revision: str) -> tuple[dict[str, Any] | None, str]:
    """A hub name's config.json, or None and why; raises LightTransferError if the hub knows no such model."""
    hub = os.environ.get("HF_ENDPOINT", HUB).rstrip("/")
    path = f"{urllib.parse.quote(name)}/resolve/{urllib.parse.quote(revision, safe='')}/config.json"
    token = os.environ.get("HF_TOKEN")
    request = urllib.request.Request(
        f"{hub}/{path}", headers={"Authorization": f"Bearer {token}"} if token else {}
    )
    try:
        with urllib.request.urlopen(request, timeout=HUB_SECONDS) as answer:
            data = json.load(answer)
    except urllib.error.HTTPError as error:
        if error.code == 404:
            raise LightTransferError(f"{name}: {hub} has no such model with a config.json") from None
        hint = "; HF_TOKEN is for gated models" if error.code in (401, 403) else ""
        return None, f"{hub} answers {error.code}{hint}"
    except (OSError, ValueError) as error:
        return None, f"{hub}: {getattr(error, 'reason', error)}"
    if not isinstance(data, dict):
        raise LightTransferError(f"{name}: its config.json is not a JSON object")
    return data, ""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="render.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("model", nargs="?", metavar="MODEL")
    parser.add_argument("--all", action="store_true", help="write k8s/manifests/ again")
    parser.add_argument("--package", type=Path, metavar="FOLDER", help="put the charts there, packaged")
    parser.add_argument("--name", default=RELEASE, help="of the release; two models need two")
    parser.add_argument("--namespace", default=NAMESPACE)
    parser.add_argument("--tp", type=int, default=1, help="GPUs of one engine")
    parser.add_argument(
        "--gpu", metavar="PRODUCT", help="the nodes' label nvidia.com/gpu.product; '' for any node"
    )
    parser.add_argument("--weights-gib", type=float, help="all weights, instead of counting them")
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument("--revision", default="main")
    parser.add_argument(
        "--config", help="a folder with the model's config.json, if MODEL cannot be reached here"
    )
    parser.add_argument("--claim", help="a PersistentVolumeClaim of yours, instead of a new one")
    parser.add_argument("--values-only", action="store_true", help="print the values, once they render")
    parser.add_argument(
        "--values", type=Path, action="append", default=[], help="further values, in Helm's form"
    )
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as helm's --set")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Print or write manifests; 2 and one line on stderr if they cannot be made."""
    parser = _parser()
    args, flags = parser.parse_known_args(argv)
    if [args.all, args.model is not None, args.package is not None].count(True) != 1:
        parser.error("one of MODEL, --all and --package")
    try:
        if args.package is not None:
            for chart in (CHART, MONITORING, RAY):
                package(chart, args.package)
            return 0
        if args.all:
            for file, text in made().items():
                file.parent.mkdir(exist_ok=True)
                file.write_text(text, encoding="utf-8")
            return 0
        values = model_values(args, flags)
        with tempfile.NamedTemporaryFile("w", suffix=".json") as written:
            json.dump(values, written)
            written.flush()
            files = [Path(written.name), *args.values]
            text = render(files, args.set, release=args.name, namespace=args.namespace)
        # JSON is YAML.
        print(json.dumps(values, indent=2) if args.values_only else text.rstrip("\n"))
    except (LightTransferError, FetchFailed) as error:
        print(f"render: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

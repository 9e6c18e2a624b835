"""Which servers a scenario runs on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from lt_sglang.bench.scenario import Scenario
from lt_sglang.config import CONFIG_KEY
from lt_sglang.errors import LightTransferError
from lt_sglang.launch.engine import EngineSpec
from lt_sglang.planner.shapes import CONFIGS

LIGHTTRANSFER = "lighttransfer"
# What serving a shape takes besides its folder: there are no weights and there is no tokenizer.
SHAPE_FLAGS = ("--load-format", "dummy", "--skip-tokenizer-init")
# Steady decode is read from the log, the metrics from /metrics; without incremental output each event
# repeats everything before it, and 8K tokens of output would be gigabytes for the client to read.
COMMON_FLAGS = (
    *("--enable-metrics", "--decode-log-interval", "10", "--incremental-streaming-output"),
    *("--random-seed", "1"),
)


def specs_of(
    scenario: Scenario,
    work: Path,
    baselines: Sequence[str],
    model: str | None = None,
    most_tp: int | None = None,
    flags: tuple[str, ...] = (),
    options: tuple[str, ...] = (),
) -> dict[str, EngineSpec]:
    """Stock servers by attention backend, and ours under ``lighttransfer``.

    Args:
        scenario: what is run.
        work: folder for the configuration of a shape.
        baselines: attention backends of stock SGLang; not used if the scenario wants ours alone.
        model: a folder or hub name, in place of the scenario's shape.
        most_tp: GPUs, where the scenario asks for more.
        flags: SGLang's, for both sides.
        options: ``--lt-*``, for ours.

    Raises:
        LightTransferError: there is no model.
    """
    engine = scenario.engine
    common = (*engine.flags, *flags)
    stock_model = model
    if model is None and engine.shape is not None:
        model, stock_model = (
            str(write_shape(shape, work.absolute() / "models" / shape))
            for shape in (engine.shape, engine.baseline_shape or engine.shape)
        )
        common = (*SHAPE_FLAGS, *common)
    if model is None or stock_model is None:
        raise LightTransferError(f"{scenario.name}: has no engine.shape; give --model-path")
    tp = str(min(engine.tp, most_tp or engine.tp))
    common = (*COMMON_FLAGS, "--tp-size", tp, *common)
    alone = tuple(flag.replace("{tp}", tp) for flag in engine.baseline_flags)
    found = {}
    for backend in baselines if engine.sides == "both" else ():
        own = ("--attention-backend", backend)
        found[backend] = EngineSpec(f"stock_{backend}", stock_model, (*common, *alone), own, stock=True)
    if engine.lighttransfer:
        given = json.dumps({CONFIG_KEY: dict(engine.lighttransfer)})
        options = ("--json-model-override-args", given, *options)
    ours = (*common, *engine.lighttransfer_flags)
    return {**found, LIGHTTRANSFER: EngineSpec(LIGHTTRANSFER, model, ours, options)}


def write_shape(name: str, folder: Path) -> Path:
    """Write config.json of shape ``name`` into ``folder`` and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIGS[name], indent=1), encoding="utf-8")
    return folder

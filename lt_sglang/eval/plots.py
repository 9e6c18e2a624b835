"""PNG figures; matplotlib is loaded at the first one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lt_sglang.errors import LightTransferError
from lt_sglang.eval.evaluate import Outcome, Questions

DEPTH_BINS = 10


def require_matplotlib() -> Any:
    """matplotlib.pyplot, drawing into files; raises LightTransferError that says how to get it."""
    try:
        import matplotlib
    except ImportError:
        raise LightTransferError(
            "the figures need matplotlib: pip install 'lt-sglang[quality]', or give --no-plots"
        ) from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def depth_heatmaps(questions: Questions, outcomes: Sequence[Outcome], folder: Path) -> list[Path]:
    """For each task that has a depth: share found by depth and length, one panel an engine."""
    pyplot = require_matplotlib()
    deep = [(n, item) for n, item in enumerate(questions.items) if "depth" in item.cell]
    paths = []
    for task in dict.fromkeys(item.task for _, item in deep):
        mine = [(n, item) for n, item in deep if item.task == task]
        lengths = sorted({item.cell["tokens"] for _, item in mine})
        figure, axes = pyplot.subplots(
            1, len(outcomes), figsize=(1.5 + 2.6 * len(outcomes), 3.6), squeeze=False, sharey=True
        )
        for axis, outcome in zip(axes[0], outcomes, strict=True):
            grid = [[float("nan")] * len(lengths) for _ in range(DEPTH_BINS)]
            for bin_number in range(DEPTH_BINS):
                for column, length in enumerate(lengths):
                    hits = [
                        outcome.scores[n]
                        for n, item in mine
                        if item.cell["tokens"] == length and _bin(item.cell["depth"]) == bin_number
                    ]
                    if hits:
                        grid[bin_number][column] = sum(hits) / len(hits)
            image = axis.imshow(grid, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
            axis.set_title(outcome.name, fontsize=9)
            axis.set_xticks(range(len(lengths)), [str(length) for length in lengths], fontsize=8)
            axis.set_xlabel("prompt tokens")
        ticks = [f"{number / DEPTH_BINS:.1f}" for number in range(DEPTH_BINS)]
        axes[0][0].set_yticks(range(DEPTH_BINS), ticks, fontsize=8)
        axes[0][0].set_ylabel("depth")
        figure.colorbar(image, ax=list(axes[0]), label="found")
        paths.append(save(pyplot, figure, folder / f"{task}.png"))
    return paths


def score_heatmap(laziness: Sequence[Sequence[float]], score: str, path: Path) -> Path:
    """Laziness by layer (down) and sample (across)."""
    pyplot = require_matplotlib()
    figure, axis = pyplot.subplots(figsize=(7, 5))
    columns = [list(column) for column in zip(*laziness, strict=True)]
    image = axis.imshow(columns, aspect="auto", interpolation="nearest")
    axis.set_xlabel("sample")
    axis.set_ylabel("layer")
    figure.colorbar(image, label=f"laziness by {score}")
    return save(pyplot, figure, path)


def frequency_bars(counts: Sequence[int], samples: int, chosen: Sequence[int], path: Path) -> Path:
    """How often each layer is among the laziest; the chosen ones dark."""
    pyplot = require_matplotlib()
    from matplotlib.patches import Patch

    figure, axis = pyplot.subplots(figsize=(7, 3))
    colours = ["#20507a" if layer in chosen else "#b8c8d8" for layer in range(len(counts))]
    axis.bar(range(len(counts)), [count / samples for count in counts], color=colours)
    labels = {"#20507a": "chosen", "#b8c8d8": "stays full"}
    axis.legend(handles=[Patch(color=colour, label=label) for colour, label in labels.items()])
    axis.set_xlabel("layer")
    axis.set_ylabel("share of samples\nwhere it is lazy")
    return save(pyplot, figure, path)


def _bin(depth: float) -> int:
    return min(int(depth * DEPTH_BINS), DEPTH_BINS - 1)


def save(pyplot: Any, figure: Any, path: Path) -> Path:
    """Write ``figure`` to ``path`` and close it."""
    figure.savefig(path, dpi=150, bbox_inches="tight")
    pyplot.close(figure)
    return path

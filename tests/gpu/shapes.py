"""True model shapes; their weights are dummies, which gives true speeds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lt_sglang.bench.shapes import SHAPES as CONFIGS
from lt_sglang.bench.shapes import write_shape


@dataclass(frozen=True)
class Shape:
    """half, three_quarters: lazy layers of static mode. keep: layers that dynamic mode keeps full."""

    name: str
    half: str
    three_quarters: str
    keep: int
    sink: int = 4
    recent: int = 1020

    @property
    def vocab(self) -> int:
        """Token ids."""
        return int(CONFIGS[self.name]["vocab_size"])

    def folder(self) -> Path:
        """A model folder with this configuration and no weights."""
        return write_shape(self.name, Path("/tmp/lt-shapes") / self.name)


MISTRAL_7B = Shape(
    "mistral-7b",
    half="8-23",
    three_quarters="4-27",
    keep=16,
)
QWQ_32B = Shape(
    "qwq-32b",
    half="5-24,26-28,30-33,35,37,38,43,51",
    three_quarters="5-52",
    keep=32,
    sink=129,
    recent=1025,
)
LLAMA_70B = Shape(
    "llama-3-70b",
    half="20-59",
    three_quarters="10-69",
    keep=40,
)
SHAPES = {shape.name: shape for shape in (MISTRAL_7B, QWQ_32B, LLAMA_70B)}

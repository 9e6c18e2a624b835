"""The most KV memory in use in a prefill, of real servers, against what admission reckons with."""

from __future__ import annotations

from pathlib import Path

import pytest

from loadtest.experiments.peak_kv import KEEP, RECENT, SINKS, measure
from lt_sglang.memory.demand import Demand

from .models import NUM_LAYERS

pytestmark = pytest.mark.engine

PROMPT, CHUNK = 768, 256
# What admission reckons with beyond what is held: a page of output, and a step of a window.
SPARE = 0.02


@pytest.mark.parametrize(
    ("mode", "whole"),
    [
        pytest.param("static", False, id="static"),
        pytest.param("dynamic", True, id="dynamic", marks=pytest.mark.slow),
        pytest.param("dynamic, first chunk", False, id="first-chunk", marks=pytest.mark.slow),
    ],
)
def test_a_prefill_holds_what_is_reckoned(mode: str, whole: bool, tmp_path: Path) -> None:
    """whole: the prompt is held in all layers, until its lazy ones are known."""
    row = measure(mode, PROMPT, CHUNK, tmp_path)
    peak, reckoned = row["needed"], Demand.from_dict(row["demand"]).of_new(PROMPT, 1)
    # Half of the layers are full: a unit is a token's in either kind.
    assert peak["units"] == peak["full"] + peak["streaming"] + peak["sinks"]
    assert peak["full"] == PROMPT and peak["sinks"] == SINKS
    assert (1 - SPARE) * reckoned <= peak["units"] <= reckoned, row
    if whole:
        assert peak["streaming"] == PROMPT and peak["layers_of_the_prompt"] >= NUM_LAYERS
        assert row["in_use"] == peak
    else:
        assert RECENT < peak["streaming"] <= CHUNK + RECENT
        # A window at the end of a chunk stays cached, until somebody wants the memory.
        assert row["in_use"]["streaming"] > peak["streaming"]
        assert KEEP < peak["layers_of_the_prompt"] < NUM_LAYERS

"""Scores and decode plans on a GPU against plain torch and FlashInfer's own plan."""

from __future__ import annotations

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_scores_are_those_of_plain_torch() -> None:
    from loadtest.experiments import identify

    for shape in identify.SHAPES:
        limit = identify.TOLERANCE[getattr(torch, shape.dtype)]
        for name, error in identify.check_shape(shape).items():
            assert error <= limit, f"{shape.name}: {name}"


def test_decode_under_our_plan_gives_what_flashinfer_s_plan_does() -> None:
    from loadtest.experiments import decode_plan
    from loadtest.experiments.timing import decode_workspace

    sizes = (decode_plan.ROWS, 1, decode_plan.KV_HEADS, decode_plan.DIM)
    keys, values = (torch.randn(sizes, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    workspace = decode_workspace()
    for name, lengths in decode_plan.CASES.items():
        found = decode_plan.measure(lengths, (keys, values), workspace)
        assert found["difference"] <= decode_plan.TOLERANCE, name

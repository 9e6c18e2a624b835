"""The kernels of the scores under Triton's interpreter, against plain torch; run by test_kernels.py."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lt_sglang.identify.scores import attend_kernel
from lt_sglang.identify.scores.factory import SCORES, get_score
from lt_sglang.identify.scores.reference import streaming_attention
from lt_sglang.identify.scores.row_kernels import output_rows
from tests.unit.interpreted_selection_cases import Case, build, last, on_all_ranks, ranks

pytestmark = pytest.mark.filterwarnings("ignore:divide by zero encountered in log2")  # of nothing seen

CASES = {
    "one request": Case((last(60, 8),)),
    "one query, one key": Case((last(1, 1),)),
    "no sinks": Case((last(60, 3),), sink=0),
    "queries before the window, no sinks": Case(((64, (3, 50, 55, 63)),), sink=0),
    "several splits": Case((last(400, 4),), sink=4, recent=300),
    "requests of several lengths, absent entries": Case(
        (last(60, 8), last(5, 2), last(150, 6), last(17, 8)), recent=100, absent=6
    ),
    "several tiles of queries": Case((last(50, 20), last(40, 13)), heads=8, kv_heads=2),
    "9 heads over 3": Case((last(60, 7),), heads=9, kv_heads=3, dim=64),
    "14 heads over 2": Case((last(60, 7),), heads=14, kv_heads=2),
    "16 heads over 1": Case((last(40, 5),), heads=16, kv_heads=1),
    "padded heads": Case((last(60, 5), last(30, 2)), heads=6, kv_heads=3, real=5),
    "no real heads": Case((last(60, 5),), real=0),
    "head size 80": Case((last(60, 5),), dim=80),
    "head size 96": Case((last(60, 5),), dim=96),
    "head size 256": Case((last(60, 5),), heads=2, kv_heads=1, dim=256),
    "hidden size above a block": Case((last(60, 2),), hidden=5000),
    "half precision": Case((last(60, 8),), dim=64, dtype=torch.float16),
}


def test_kernels_are_interpreted_here() -> None:
    assert type(attend_kernel._attend).__name__ == "InterpretedFunction", (
        "run this file through tests/unit/test_kernels.py, which sets TRITON_INTERPRET"
    )


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_fused_equals_the_reference(case: Case, name: str) -> None:
    evidence = build(case, spread=case.dim == 16).evidence
    score = get_score(name)
    tolerance = 1e-5 if case.dtype is torch.float32 else 4e-3
    got = score.fused(evidence)
    assert got.dtype is torch.float32
    torch.testing.assert_close(got, score.reference(evidence), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("name", SCORES)
def test_fused_equals_explicit_attention(name: str) -> None:
    built = build(Case((last(200, 8), last(30, 3)), recent=100, heads=6, real=5), seed=3)
    got = get_score(name).fused(built.evidence).double()
    torch.testing.assert_close(got, built.expected[name], atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("programs", [1, 8, 32, 4096])
def test_the_number_of_splits_does_not_matter(programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """From one program that loops over all keys to one for each block."""
    monkeypatch.setattr(attend_kernel, "PROGRAMS", programs)
    evidence = build(Case((last(600, 3), last(40, 2)), recent=500)).evidence
    number = attend_kernel.attend(evidence, with_values=True).lse.shape[1]
    assert number == {1: 1, 8: 2, 32: 4, 4096: 8}[programs]
    for name in SCORES:
        score = get_score(name)
        torch.testing.assert_close(score.fused(evidence), score.reference(evidence), atol=1e-5, rtol=1e-5)


def test_splits_hold_streaming_attention() -> None:
    evidence = build(Case((last(200, 5),), recent=150)).evidence
    splits = attend_kernel.attend(evidence, with_values=True)
    assert splits.lse.shape[1] > 1
    weight = torch.softmax(splits.lse * 0.6931471805599453, 1)
    assert splits.output is not None
    mixed = (weight[..., None] * splits.output).sum(1)
    torch.testing.assert_close(mixed, streaming_attention(evidence), atol=1e-5, rtol=1e-5)


def test_a_query_that_sees_no_selected_key() -> None:
    """Its mass is 0 and its streaming output zeros, as of an empty cache; nothing becomes NaN."""
    built = build(Case(((64, (3, 63)),), sink=0))
    evidence = built.evidence
    splits = attend_kernel.attend(evidence, with_values=True)
    error = output_rows(evidence, splits)[0].unflatten(1, (evidence.query.shape[1], -1))
    column = int((evidence.query_positions[0] == 3).nonzero())
    row = int(evidence.query_rows[0, column])
    torch.testing.assert_close(error[column], evidence.attention[row])
    for name in SCORES:
        assert torch.isfinite(get_score(name).fused(evidence)).all()
    assert get_score("discarded-mass").fused(evidence).item() == -1.0


def test_masses_are_clamped_before_the_mean() -> None:
    """As in test_selection.py: a log-sum-exp that is far too low."""
    evidence = build(Case((last(60, 4),))).evidence
    lse = evidence.lse.clone()
    lse[:, 0] -= 40.0
    low = replace(evidence, lse=lse)
    for name in ("lighttransfer", "discarded-mass"):
        score = get_score(name)
        torch.testing.assert_close(score.fused(low), score.reference(low), atol=1e-5, rtol=1e-5)


def test_values_are_read_by_their_own_stride() -> None:
    """Keys and values need not lie alike."""
    evidence = build(Case((last(60, 4),))).evidence
    values = torch.full((len(evidence.values), 3, evidence.values.shape[2] + 8), float("nan"))
    values[:, 1:, :-8] = evidence.values
    apart = replace(evidence, values=values[:, 1:, :-8])
    score = get_score("residual-error")
    torch.testing.assert_close(score.fused(apart), score.fused(evidence))


def test_one_evaluation_equals_another_bit_for_bit() -> None:
    evidence = build(Case((last(300, 8), last(90, 8)), recent=200)).evidence
    for name in SCORES:
        score = get_score(name)
        assert torch.equal(score.fused(evidence), score.fused(evidence))


@pytest.mark.parametrize("name", SCORES)
def test_ranks_agree_with_the_whole(name: str) -> None:
    """Six slots, four real heads, two ranks, one of them without a real head."""
    built = build(Case((last(60, 5), last(20, 3)), heads=6, kv_heads=6, real=4))
    edge = slice(0, 4), slice(4, 6)
    score = get_score(name)
    parts = ranks(built, [(edge[0], 4), (edge[1], 0)], list(edge))
    got = on_all_ranks(score.fused, parts)
    assert torch.equal(got[0], got[1])
    torch.testing.assert_close(got[0].double(), built.expected[name], atol=2e-5, rtol=2e-5)


def test_the_largest_error_survives_equal_signs() -> None:
    """No error at all is -0.0, and any error is below it."""
    evidence = build(Case((last(9, 4), last(60, 4)))).evidence
    nothing = replace(evidence, project=lambda rows: torch.zeros(len(rows), 48))
    assert get_score("residual-error").fused(nothing).tolist() == [0.0, 0.0]
    got = get_score("residual-error").fused(evidence)
    assert -1e-5 < got[0] <= 0 and got[1] < -0.05

"""identify/scores: every score's torch form against explicit attention weights in float64."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from lt_sglang import config
from lt_sglang.errors import LightTransferError
from lt_sglang.identify.scores.base import Score
from lt_sglang.identify.scores.evidence import Evidence
from lt_sglang.identify.scores.factory import SCORES, get_score
from tests.unit.interpreted_selection_cases import Case, build, last, on_all_ranks, ranks

CASES = {
    "one request": Case((last(60, 8),)),
    "one query": Case((last(60, 1),)),
    "no sinks": Case((last(60, 8),), sink=0),
    "129 sinks": Case((last(300, 5),), sink=129, recent=20),
    "sinks and window meet": Case((last(16, 4),)),
    "prompt shorter than the windows": Case((last(9, 4),)),
    "prompt of one token": Case((last(1, 1),)),
    "queries before the window": Case(((64, (3, 7, 20, 40, 63)),)),
    "more queries than the window": Case((last(60, 30),), recent=9),
    "requests of several lengths": Case((last(60, 8), last(5, 2), last(130, 6), last(17, 8))),
    "absent queries and keys": Case((last(60, 3), last(33, 8), last(8, 1)), absent=5),
    "grouped heads": Case((last(60, 5),), heads=9, kv_heads=3),
    "padded heads": Case((last(60, 5), last(30, 2)), heads=6, kv_heads=6, real=4),
    "head size between powers of two": Case((last(60, 5),), dim=80),
}


def check(score: str, got: torch.Tensor, expected: torch.Tensor, tolerance: float = 2e-5) -> None:
    assert got.dtype is torch.float32 and got.shape == expected.shape
    torch.testing.assert_close(
        got.double(), expected, atol=tolerance, rtol=tolerance, msg=lambda m: score + m
    )


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_reference_equals_explicit_attention(case: Case, name: str) -> None:
    built = build(case)
    check(name, get_score(name).laziness(built.evidence), built.expected[name])


def test_the_cases_tell_the_scores_apart() -> None:
    """A score that returned a constant, or another's value, must not pass."""
    expected = build(CASES["one query"]).expected
    values = [float(abs(value)) for value in expected.values()]
    assert all(abs(a - b) > 0.01 for i, a in enumerate(values) for b in values[:i])
    assert all(0.05 < value < 5 for value in values)
    lengths = build(CASES["requests of several lengths"]).expected["lighttransfer"]
    assert lengths[1] == pytest.approx(1.0) and lengths[2] < 0.9


@pytest.mark.parametrize("name", SCORES)
def test_absent_entries_and_row_order_change_nothing(name: str) -> None:
    case = Case((last(60, 5), last(60, 5)))
    plain, scattered = build(case).evidence, build(replace(case, absent=7)).evidence
    score = get_score(name)
    torch.testing.assert_close(score.laziness(plain), score.laziness(scattered), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("factor", [0.5, 4.0])
def test_only_the_ratio_to_the_stream_counts(name: str, factor: float) -> None:
    """Scaling the stream and the projection together must not move a layer in the ranking."""
    built = build(CASES["one request"])
    evidence = built.evidence
    assert evidence.hidden is not None
    scaled = replace(
        evidence, hidden=evidence.hidden * factor, project=lambda rows: rows @ built.weight * factor
    )
    score = get_score(name)
    torch.testing.assert_close(score.laziness(scaled), score.laziness(evidence))


def test_masses_are_clamped_before_the_mean() -> None:
    """A log-sum-exp rounded downwards must not lift one head's mass over 1 and hide another's loss."""
    case = Case((last(60, 4),), heads=2, kv_heads=2)
    evidence = build(case).evidence
    low = evidence.lse.clone()
    low[:, 0] -= 40.0
    tampered = replace(evidence, lse=low)
    one = get_score("lighttransfer").laziness(replace(evidence, query=evidence.query))
    two = get_score("lighttransfer").laziness(tampered)
    second = replace(
        evidence,
        **{k: getattr(evidence, k)[:, 1:] for k in ("query", "attention", "lse", "keys", "values")},
        heads=1,
        total_heads=1,
    )
    other = get_score("lighttransfer").laziness(second)
    torch.testing.assert_close(two, (1.0 + other) / 2)
    assert two > one


def test_a_layer_that_loses_nothing_is_the_laziest() -> None:
    """Keys outside the windows that nobody attends to: ratio 1, no error, nothing discarded."""
    built = build(Case((last(16, 4),)))
    assert get_score("lighttransfer").laziness(built.evidence).item() == pytest.approx(1.0, abs=1e-6)
    assert get_score("residual-error").laziness(built.evidence).item() == pytest.approx(0.0, abs=1e-6)
    assert get_score("discarded-mass").laziness(built.evidence).item() == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("score", ["residual-error", "discarded-mass", "error-mass"])
def test_one_retrieving_head_on_one_query_is_seen(score: str) -> None:
    """What the paper's mean over 8 heads and 16 queries hides: one head that reads far back once."""
    case = Case((last(80, 16),), recent=74, heads=8, kv_heads=8, peak=1.0)
    evidence = build(case).evidence
    row = int(evidence.query_rows[0, 3])
    lse, attention = evidence.lse.clone(), evidence.attention.clone()
    lse[row, 5] += 20.0  # the full softmax grows by keys that are not selected
    attention[row, 5] += 3.0
    retrieving = replace(evidence, lse=lse, attention=attention)

    def drop(name: str) -> float:
        return float(get_score(name).laziness(evidence) - get_score(name).laziness(retrieving))

    assert 0 < drop("lighttransfer") < 0.01
    assert drop(score) > 0.3


@pytest.mark.parametrize("name", SCORES)
def test_two_ranks_agree_with_the_whole(name: str) -> None:
    built = build(Case((last(60, 5), last(20, 3)), heads=8, kv_heads=4, absent=2))
    parts = ranks(built, [(slice(0, 4), 4), (slice(4, 8), 4)], [slice(0, 2), slice(2, 4)])
    first, second = on_all_ranks(get_score(name).laziness, parts)
    assert torch.equal(first, second)
    check(name, first, built.expected[name])


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("split", [3, 4], ids=["padded rank", "rank without heads"])
def test_ranks_with_padded_heads_agree_with_the_whole(name: str, split: int) -> None:
    """Six slots, four real heads: ranks of (3, 1) real heads, or of (4, 0)."""
    built = build(Case((last(60, 5), last(20, 3)), heads=6, kv_heads=6, real=4))
    edge = slice(0, split), slice(split, 6)
    parts = ranks(built, [(edge[0], split), (edge[1], 4 - split)], list(edge))
    first, second = on_all_ranks(get_score(name).laziness, parts)
    assert torch.equal(first, second)
    check(name, first, built.expected[name])


def test_half_precision_ranks_layers_as_float32_does() -> None:
    for name in SCORES:
        values = []
        for dtype in (torch.float32, torch.bfloat16):
            layers = [build(Case((last(90, 8),), dtype=dtype, peak=1 + 0.5 * i), seed=i) for i in range(8)]
            values.append([float(get_score(name).laziness(layer.evidence)) for layer in layers])
            check(
                name,
                torch.tensor(values[-1]),
                torch.cat([layer.expected[name] for layer in layers]),
                2e-5 if dtype is torch.float32 else 2e-2,
            )


def test_errors_are_projected_in_the_models_dtype() -> None:
    seen = []
    evidence = build(Case((last(60, 3),), dtype=torch.bfloat16)).evidence
    project = evidence.project
    assert project is not None

    def watch(rows: torch.Tensor) -> torch.Tensor:
        seen.append((rows.dtype, tuple(rows.shape)))
        return project(rows)

    for name in ("residual-error", "squeeze"):
        get_score(name).laziness(replace(evidence, project=watch))
    assert seen == [(torch.bfloat16, (3, 64))] * 2


def test_scores_that_need_no_hidden_state_work_without() -> None:
    evidence = replace(build(CASES["one request"]).evidence, hidden=None, project=None)
    for name in SCORES:
        if not get_score(name).needs_hidden:
            get_score(name).laziness(evidence)
    needing = [name for name in SCORES if get_score(name).needs_hidden]
    assert needing == ["residual-error", "error-mass", "squeeze"]


def test_get_score() -> None:
    assert SCORES == config.SCORES
    for name in SCORES:
        score = get_score(name)
        assert isinstance(score, Score) and score.name == name
    with pytest.raises(LightTransferError, match="'mean' is not one of lighttransfer, residual-error, disc"):
        get_score("mean")


def _wrong(evidence: Evidence) -> dict[str, dict[str, object]]:
    return {
        "shape of lse": {"lse": evidence.lse[:, :1]},
        "shape of attention": {"attention": evidence.attention[:, :1]},
        "dtype of lse": {"lse": evidence.lse.double()},
        "kv heads": {
            "keys": evidence.keys[:, :1].repeat(1, 3, 1),
            "values": evidence.values[:, :1].repeat(1, 3, 1),
        },
        "layout of query": {"query": evidence.query.transpose(0, 2).contiguous().transpose(0, 2)},
        "query positions": {"query_positions": evidence.query_positions[:, :1]},
        "int64 rows": {"key_rows": evidence.key_rows.long()},
        "requests": {"key_rows": evidence.key_rows[:0], "key_positions": evidence.key_positions[:0]},
        "rows apart": {
            "key_rows": evidence.key_rows.t().contiguous().t(),
            "key_positions": evidence.key_positions.t().contiguous().t(),
        },
        "heads": {"heads": 5},
        "all heads": {"total_heads": 3},
        "rows of hidden": {"hidden": torch.zeros(1, 48)},
    }


@pytest.mark.parametrize("fault", _wrong(build(Case((last(60, 5), last(20, 3)))).evidence))
def test_wrong_evidence_is_refused(fault: str) -> None:
    """Kernels would read it without complaint."""
    evidence = build(Case((last(60, 5), last(20, 3)))).evidence
    with pytest.raises(ValueError, match="evidence: "):
        replace(evidence, **_wrong(evidence)[fault])


def test_selection_imports_no_sglang() -> None:
    code = "import sys, lt_sglang.identify.scores.factory; sys.exit('sglang' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

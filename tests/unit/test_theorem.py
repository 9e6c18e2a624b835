"""loadtest.experiments.theorem: the bounds, against models computed from their weights alone."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from loadtest.experiments import theorem, theorem_bounds
from loadtest.experiments.theorem_bounds import HIDDEN, SINK, Bounds, Toy, printed, step, toy, turned
from lt_sglang.errors import LightTransferError
from tests.engine.models import COMMON, FAMILIES

TOKENS, RECENT = 40, 9
DENSE = ("llama", "mistral", "qwen2", "qwen3")


def tiny(family: str, seed: int = 0, spread: float = 0.05) -> Any:
    """A float64 model whose norms and biases differ from those that a model begins with."""
    torch.manual_seed(seed)
    shape = {"model_type": family, **COMMON, **FAMILIES[family], "initializer_range": spread}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape), dtype=torch.float64)
    for name, parameter in model.named_parameters():
        if name.endswith((".bias", "norm.weight")):
            torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.2)
    return model


def ids_of(seed: int = 1) -> list[int]:
    return torch.randint(3, 500, (TOKENS,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("heads", "norm"), theorem.TOYS)
def test_the_theorem_holds_for_toys(heads: int, norm: float, seed: int) -> None:
    found = toy(100 + seed, heads, norm)
    assert 0 < found["error"] <= found["recursion"] and 0 < found["logits"] <= found["bound"]
    assert 0 < found["step"] <= 1


@pytest.mark.parametrize(
    "dropped",
    [
        lambda e, s, norm, heads: step(e, s, norm, heads) - e,
        lambda e, s, norm, heads: e + step(0.0, s, norm, heads),
        lambda e, s, norm, heads: step(e, 0.0, norm, heads),
    ],
    ids=["error before", "error amplified", "mass"],
)
def test_it_does_not_hold_without_one_of_its_terms(
    dropped: Callable[..., float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(theorem_bounds, "step", dropped)
    failed = 0
    for seed in range(10):
        try:
            toy(seed, 1, 0.1)
        except AssertionError:
            failed += 1
    assert failed


def test_what_a_lazy_layer_adds_is_reached() -> None:
    """Values of the discarded keys are opposite to those kept: no smaller factor than (4)'s 2 would do."""
    model, tokens, recent = Toy(0, 1, 0.5, layers=1), 20, 4
    kept = theorem_bounds.seen(tokens, recent)[-1]
    direction = torch.nn.functional.one_hot(torch.tensor(0), HIDDEN).double()
    x = torch.where(kept[:, None], direction, -direction)
    model.query.zero_(), model.key.zero_(), model.first.zero_()
    model.value[0, 0] = 0.5 * torch.outer(direction, direction)
    mask = theorem_bounds.seen(tokens, recent)
    full, masses = model.run(x, (), mask)
    hybrid, _ = model.run(x, (0,), mask)
    error = float((full[1] - hybrid[1])[-1].norm())
    assert masses[0] == pytest.approx(1 - (SINK + recent) / tokens)
    assert error == pytest.approx(step(0.0, masses[0], 0.5, 1, lip=0.0), rel=1e-12)


def test_both_formulas_by_hand() -> None:
    """B = 2, H = 3, L_lip = 1: (4) with 2 and with the error inside min, (5) for five layers."""
    assert step(1.0, 0.25, 2.0, 3) == 1 + (6 + 4 + 96) * 2 + 6 * (2 + 8) * 0.25
    assert step(0.001, 0.0, 2.0, 3) == pytest.approx(0.001 + 106 * 103 * 0.001)
    assert printed(0.25, 5, 2.0, 3) == 2 * 5 * 4 * (3 + 2 + 48) + 6 * 4 * 5 * 0.25


def test_rows_behind_rmsnorm_are_no_farther_apart() -> None:
    generator = torch.Generator().manual_seed(3)
    eps, closest = 1e-2, 0.0
    for _ in range(2000):
        x, change = torch.randn(2, 8, generator=generator, dtype=torch.float64)
        y = x + change * 10 ** float(torch.empty(1).uniform_(-3, 1, generator=generator))
        one, other = (v / (v.square().mean() + eps).sqrt() for v in (x, y))
        lowest = math.sqrt(float(x.square().sum()) + 8 * eps)
        most = turned(math.sqrt(8), float((x - y).norm()), lowest)
        assert float((one - other).norm()) <= most * (1 + 1e-12)
        closest = max(closest, float((one - other).norm()) / most)
    assert closest > 0.9


def reference(model: Any, ids: list[int], lazy: tuple[int, ...]) -> tuple[list[torch.Tensor], list[Any]]:
    """A Llama in float64 from its weights alone: states behind layers, and each layer's discarded mass."""
    config, weights = model.config, model.state_dict()
    heads, groups, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    angles = torch.outer(
        torch.arange(TOKENS).double(),
        config.rope_parameters["rope_theta"] ** (-torch.arange(0, size, 2).double() / size),
    )
    turn = torch.polar(torch.ones_like(angles), angles)

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return x / (x.square().mean(-1, keepdim=True) + config.rms_norm_eps).sqrt() * weights[name]

    def rope(x: torch.Tensor) -> torch.Tensor:
        turned_ = torch.complex(x[..., : size // 2], x[..., size // 2 :]) * turn
        return torch.cat([turned_.real, turned_.imag], -1)

    x = weights["model.embed_tokens.weight"][ids]
    states, discarded = [x], []
    for layer in range(config.num_hidden_layers):
        of = f"model.layers.{layer}."
        z = norm(x, of + "input_layernorm.weight")
        mass, out = torch.zeros(heads, TOKENS), torch.zeros_like(x)
        for head in range(heads):
            q, k, v = (
                z @ weights[f"{of}self_attn.{name}_proj.weight"][at * size : (at + 1) * size].T
                for name, at in (("q", head), ("k", head * groups // heads), ("v", head * groups // heads))
            )
            scores = rope(q) @ rope(k).T / math.sqrt(size)
            for query in range(TOKENS):
                sees = [key for key in range(query + 1) if key < SINK or key > query - RECENT]
                every = scores[query, : query + 1].softmax(0)
                mass[head, query] = 1 - every[sees].sum()
                used = sees if layer in lazy else list(range(query + 1))
                row = scores[query, used].softmax(0) @ v[used]
                out[query] += (
                    row @ weights[of + "self_attn.o_proj.weight"][:, head * size : (head + 1) * size].T
                )
        x = x + out
        z = norm(x, of + "post_attention_layernorm.weight")
        gate, up, down = (weights[f"{of}mlp.{name}_proj.weight"].T for name in ("gate", "up", "down"))
        x = x + (torch.nn.functional.silu(z @ gate) * (z @ up)) @ down
        states.append(x)
        discarded.append(mass)
    return [*states, norm(x, "model.norm.weight") @ weights["lm_head.weight"].T], discarded


def test_masses_and_errors_are_the_reference_s() -> None:
    model, ids, lazy = tiny("llama"), ids_of(), (1, 2, 4)
    full, discarded = reference(model, ids, ())
    hybrid, _ = reference(model, ids, lazy)
    alone, _ = reference(model, ids, (3,))
    prompt = theorem.Prompt(theorem.Watched(model), ids, RECENT)
    for mass, found in zip(discarded, prompt.found, strict=True):
        assert found.worst == pytest.approx(float(mass.mean(0).max()), rel=1e-5)
        assert found.last == pytest.approx(float(mass[:, -theorem.QUERIES :].mean()), rel=1e-5)
    compared = prompt.compare(lazy)
    errors = [float((one - other).norm(dim=1).max()) for one, other in zip(full, hybrid, strict=True)]
    assert compared["by_layer"]["true"] == pytest.approx(errors[1:-1], rel=1e-5, abs=1e-12)
    assert compared["logits"] == pytest.approx(errors[-1], rel=1e-4)
    last = (full[-1] - hybrid[-1])[-theorem.QUERIES :].norm(dim=1).mean()
    assert compared["logits_last"] == pytest.approx(float(last), rel=1e-4)
    assert prompt.compare((3,))["by_layer"]["true"][3] == pytest.approx(
        float((full[4] - alone[4]).norm(dim=1).max()), rel=1e-5
    )


@pytest.mark.parametrize("family", DENSE)
def test_the_derived_bound_holds_and_needs_the_mass(family: str) -> None:
    for seed, spread in ((0, 0.02), (1, 0.2)):
        prompt = theorem.Prompt(theorem.Watched(tiny(family, seed, spread)), ids_of(seed), RECENT)
        for found in prompt.found:
            assert 0 < found.injected <= found.most
        found = prompt.compare((0, 3))
        assert 0 < found["error"] <= found["recursion"] and 0 < found["logits"] <= found["logits_bound"]
        prompt.found = [dataclasses.replace(one, most=0.0) for one in prompt.found]
        with pytest.raises(AssertionError, match="layer 0"):
            prompt.compare((0, 3))


def test_one_layer_s_constants() -> None:
    """Norms against singular values of whole matrices; the MLP's two constants against random inputs."""
    layer = tiny("llama").requires_grad_(False).model.layers[2]
    bounds = Bounds(layer)
    attention, scales = layer.self_attn, layer.input_layernorm.weight
    for head in range(4):
        value = attention.v_proj.weight[head // 2 * 16 :][:16] * scales
        product = attention.o_proj.weight[:, head * 16 : (head + 1) * 16] @ value
        assert float(bounds.values[head]) == pytest.approx(float(torch.linalg.svdvals(product)[0]))
        query, key = attention.q_proj.weight[head * 16 :][:16], attention.k_proj.weight[head // 2 * 16 :][:16]
        largest = [float(torch.linalg.svdvals(one * scales)[0]) for one in (query, key)]
        assert float(bounds.slope[head]) == pytest.approx(2 * 8 / 4 * math.prod(largest))
    generator = torch.Generator().manual_seed(0)
    for size in (1e-3, 0.1, 2.0):
        for _ in range(200):
            x, change = torch.randn(2, 64, generator=generator, dtype=torch.float64)
            one, other = (8 * v / v.norm() for v in (x, x + size * change))
            apart, changed = (
                (one - other).norm(),
                [layer.mlp(layer.post_attention_layernorm.weight * v) for v in (one, other)],
            )
            moved = float((changed[0] - changed[1]).norm())
            assert moved <= min(bounds.gain * float(apart), bounds.cap)


def test_lists_of_lazy_layers() -> None:
    prompt = theorem.Prompt(theorem.Watched(tiny("llama")), ids_of(), RECENT)
    last = [one.last for one in prompt.found]
    made = prompt.lists(0.5, 3, seed=0)
    assert set(made) == {"least", "most", "random 0", "random 1", "random 2"}
    assert all(len(set(lazy)) == 3 and lazy == sorted(lazy) for lazy in made.values())
    assert max(last[layer] for layer in made["least"]) <= min(last[layer] for layer in made["most"])
    assert (
        made == prompt.lists(0.5, 3, seed=0) != prompt.lists(0.5, 3, seed=1)
        and len(set(map(tuple, made.values()))) > 2
    )


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_a_mixture_is_refused(family: str) -> None:
    with pytest.raises(LightTransferError, match=f"{family} has no dense MLP"):
        theorem.Watched(tiny(family))


def test_a_rehearsal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "theorem.json"
    monkeypatch.setattr(sys, "argv", ["theorem", str(out), "--rehearse", "--texts", "1"])
    theorem.main()
    result = json.loads(out.read_text())
    assert len(result["layers"]) == 8 and [toy_["heads"] for toy_ in result["toys"]] == [1, 1, 4, 4, 4]
    for share, prompts in result["compared"].items():
        assert set(prompts[0]) == {"least", "most", "random 0", "random 1"}
        least = prompts[0]["least"]
        assert len(least["lazy"]) == {"25%": 2, "50%": 4, "75%": 6}[share]
        assert 0 < least["error"] < least["recursion"] and len(least["by_layer"]["true"]) == 8

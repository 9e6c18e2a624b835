"""loadtest.experiments.head_windows and razor_attention, against transformers' own attention weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from loadtest.experiments import razor_attention
from loadtest.experiments.head_windows import QUERIES, HeadWindows, Kept, attention

from .tiny_llama import HEADS, KV_HEADS, LAYERS, llama

SINK, RECENT = 2, 37
IDS = [(7 * i * i + 3 * i) % 50 for i in range(60)]


def masked(ids: Sequence[int], prompt: int, windows: torch.Tensor) -> torch.Tensor:
    """[tokens, vocabulary]: logits with an explicit mask a head, whose windows begin after the prompt."""
    model = llama()
    model.set_attn_implementation("eager")
    query, key = torch.arange(len(ids))[:, None], torch.arange(len(ids))
    near = (key < SINK) | (query - key < RECENT) | (query < prompt)
    for layer, block in enumerate(model.model.layers):
        heads = windows[layer].repeat_interleave(HEADS // KV_HEADS)[:, None, None]
        seen = (key <= query) & (near | ~heads)
        mask = torch.zeros(seen.shape).masked_fill_(~seen, float("-inf"))[None]

        def put(_module: Any, args: Any, kwargs: Any, mask: torch.Tensor = mask) -> Any:
            return args, kwargs | {"attention_mask": mask}

        block.self_attn.register_forward_pre_hook(put, with_kwargs=True)
    with torch.inference_mode():
        return model(torch.tensor([ids]), use_cache=False).logits[0]


def test_ways_decode_as_with_a_mask_a_head() -> None:
    drawn = torch.Generator().manual_seed(3)
    some = torch.rand(3, LAYERS, KV_HEADS, generator=drawn) < 0.5
    every = torch.ones(LAYERS, KV_HEADS, dtype=torch.bool)
    ways = [*some, every, ~every]
    model = HeadWindows(llama(), SINK, RECENT)
    found = model.answers(model.prefill(IDS), [Kept(one) for one in ways], 12)
    for windows, answer in zip(ways, found, strict=True):
        logits = masked([*IDS, *answer[:-1]], len(IDS), windows)
        assert logits[len(IDS) - 1 :].argmax(1).tolist() == answer
    assert len({tuple(answer) for answer in found}) >= 3


def test_a_list_of_layers_has_windows_in_all_of_their_heads() -> None:
    kept = HeadWindows(llama(), SINK, RECENT).layers_kept((1, 3))
    assert kept.windows.tolist() == [[False, False], [True, True]] * 2


def test_a_compensation_token_weighs_as_all_that_was_dropped() -> None:
    """As if each dropped key and value were their mean."""
    query, key, value = (torch.randn(2, heads, 50, 8) for heads in (HEADS, KV_HEADS, KV_HEADS))
    query = query[:, :, -1:]
    windows = torch.tensor([[True, False], [True, True]])
    far = slice(SINK, 50 - RECENT)
    parts = [query]
    for part in (key, value):
        merged = part.clone()
        merged[0, 0, far] = part[0, 0, far].mean(0)
        parts.append(merged.repeat_interleave(HEADS // KV_HEADS, 1))
    # The second row has windows without compensation.
    mask = torch.ones(2, HEADS, 1, 50, dtype=torch.bool)
    mask[1, :, :, far] = False
    expected = torch.nn.functional.scaled_dot_product_attention(*parts, attn_mask=mask, scale=0.3)
    out = attention(query, key, value, 0.3, windows, torch.tensor([True, False]), SINK, RECENT)
    torch.testing.assert_close(out, expected.transpose(1, 2))


def test_nothing_is_dropped_before_the_window_is_full() -> None:
    query, key, value = torch.randn(1, HEADS, 1, 8), *torch.randn(2, 1, KV_HEADS, SINK + RECENT, 8)
    whole, cut = (
        attention(query, key, value, 1.0, torch.full((1, KV_HEADS), lazy), torch.tensor([lazy]), SINK, RECENT)
        for lazy in (False, True)
    )
    torch.testing.assert_close(whole, cut)


def weights_and_states(ids: Sequence[int]) -> tuple[Any, Any, Any]:
    model = llama()
    model.set_attn_implementation("eager")
    with torch.inference_mode():
        out = model(torch.tensor([ids]), output_attentions=True, output_hidden_states=True)
    return model, [weights[0] for weights in out.attentions], out.hidden_states


def test_laziness_is_what_the_weights_say() -> None:
    found = HeadWindows(llama(), SINK, RECENT).prefill(IDS).scores
    model, attentions, states = weights_and_states(IDS)
    for layer, weights in enumerate(attentions):
        last = weights[:, -QUERIES:].clone()
        block, x = model.model.layers[layer], states[layer][0]
        values = block.self_attn.v_proj(block.input_layernorm(x)).unflatten(1, (KV_HEADS, -1))
        values = values.transpose(0, 1).repeat_interleave(HEADS // KV_HEADS, 0)
        cut = last.clone()
        cut[..., SINK : len(IDS) - RECENT] = 0
        mass = cut.sum(-1, keepdim=True)
        error = ((last - cut / mass) @ values).transpose(0, 1).flatten(1) @ block.self_attn.o_proj.weight.T
        worst = float((error.norm(dim=1) / x[-QUERIES:].norm(dim=1)).max().detach())
        assert found["lighttransfer"][layer] == pytest.approx(float(mass.mean()), rel=1e-4)
        assert found["residual-error"][layer] == pytest.approx(-worst, rel=1e-3)


def test_echo_and_induction_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(razor_attention, "CHUNK", 7)
    period, repeats = 10, razor_attention.REPEATS
    echo, induction = razor_attention.retrieval_scores(HeadWindows(llama(), SINK, RECENT), period, seed=5)
    once = torch.randperm(50, generator=torch.Generator().manual_seed(5))[:period].tolist()
    _, attentions, _ = weights_and_states(once * repeats)
    for layer, weights in enumerate(attentions):
        for scores, behind in ((echo, 0), (induction, 1)):
            sums = torch.zeros(HEADS)
            for query in range(period, period * repeats):
                for at in range(query - period, -1, -period):
                    sums += weights[:, query, at + behind]
            by_group = (sums / (period * (repeats - 1))).view(KV_HEADS, -1).amax(1)
            torch.testing.assert_close(scores[layer], by_group, rtol=1e-3, atol=1e-6)


def test_one_head_in_fifteen_is_retained_by_its_echo() -> None:
    echo, induction = torch.zeros(30, 3), torch.arange(90.0).view(30, 3)
    echo[0, 1], echo[29, 2] = 0.5, 0.9
    kept = razor_attention.retained(echo, induction, 30).flatten()
    # The highest echo is also the highest induction, and counts once.
    assert kept.nonzero().flatten().tolist() == [1, *range(61, 90)]
    assert int(razor_attention.retained(echo, induction, 45).sum()) == 45


def test_the_memory_is_that_of_as_many_full_layers() -> None:
    model = HeadWindows(llama(), SINK, RECENT)
    prompt = model.prefill(IDS)
    heads = razor_attention.retrieval_scores(model, 10, 0)
    named = razor_attention.ways(model, prompt, [1], heads, 0)
    for name, kept in named.items():
        windows = (LAYERS - 1) * (SINK + RECENT + kept.compensated)
        expected = 1 if name == "full" else (len(IDS) + windows) / (LAYERS * len(IDS))
        assert model.share(kept, len(IDS)) == pytest.approx(expected)
    assert named["razor, 1 full"].compensated and not named["random heads, 1 full"].compensated
    # The layer that stays full is the one that the score finds least lazy.
    least = prompt.scores["residual-error"].index(min(prompt.scores["residual-error"]))
    assert not named["residual-error, 1 full"].windows[least].any()

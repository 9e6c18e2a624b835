"""Greedy calibration: what a choice costs, in which order layers become lazy, and the command."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, DynamicCache

from lt_sglang.cli import calibrate
from lt_sglang.config import format_layers
from lt_sglang.errors import LightTransferError
from lt_sglang.eval.greedy import Costs, Windowed, greedy_order

from .tiny_llama import LAYERS, llama
from .words import Words

assert AutoTokenizer is not None
SINK, RECENT = 2, 5
IDS = [(7 * i * i + 3 * i) % 50 for i in range(40)]


def test_lazy_layers_see_what_a_dropped_cache_holds() -> None:
    """Against transformers without any mask, whose cache lost all but the sinks and the last tokens."""
    model = llama()
    full, trimmed = DynamicCache(), DynamicCache()
    with torch.inference_mode():
        model(torch.tensor([IDS[:-1]]), past_key_values=full)
        for index, layer in enumerate(full.layers):
            parts = (
                torch.cat([part[:, :, :SINK], part[:, :, -(RECENT - 1) :]], 2)
                for part in (layer.keys, layer.values)
            )
            trimmed.update(*parts, index)
        at = torch.tensor([[len(IDS) - 1]])
        last = torch.tensor([IDS[-1:]])
        dropped = model(last, past_key_values=trimmed, position_ids=at).logits[0, -1].log_softmax(0)
        whole = model(torch.tensor([IDS])).logits[0, -1].log_softmax(0)
    windowed = Windowed(model, SINK, RECENT)
    cached = windowed.prefill(IDS[:-1])
    logs = windowed.log_probabilities(cached, IDS[-1:], [range(LAYERS), (), (1,)], 1)[:, 0]
    torch.testing.assert_close(logs[0], dropped, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logs[1], whole, atol=1e-4, rtol=1e-4)
    assert (logs[2] - whole).abs().max() > 1e-3 and (logs[2] - dropped).abs().max() > 1e-3


def _streamed(model: Any, ids: Sequence[int], lazy: Collection[int]) -> torch.Tensor:
    """[tokens, vocabulary]: fed a token at a time, lazy layers dropping what their window leaves behind."""
    cache, rows = DynamicCache(), []
    with torch.inference_mode():
        for position, token in enumerate(ids):
            at = torch.tensor([[position]])
            logits = model(torch.tensor([[token]]), past_key_values=cache, position_ids=at).logits
            rows.append(logits[0, -1].log_softmax(0))
            for layer in (cache.layers[index] for index in lazy):
                if layer.keys.shape[2] > SINK + RECENT - 1:
                    for name in ("keys", "values"):
                        part = getattr(layer, name)
                        kept = torch.cat([part[:, :, :SINK], part[:, :, 1 - RECENT :]], 2)
                        setattr(layer, name, kept)
    return torch.stack(rows)


def test_windows_in_prefill_cost_what_a_static_list_serves() -> None:
    """Against the same model fed a token at a time, without any mask."""
    model, choices = llama(), [(0,), (1, 3), (0, 1, 2), (), tuple(range(LAYERS))]
    others = [IDS, IDS[::-1]]
    expected = [0.0] * len(choices)
    for ids in others:
        full = _streamed(model, ids, ())[-4:]
        for index, lazy in enumerate(choices):
            logs = _streamed(model, ids, lazy)[-4:]
            expected[index] += float((full.exp() * (full - logs)).sum(1).mean()) / len(others)
    costs = Costs(Windowed(model, SINK, RECENT), others, 4, SINK + RECENT, in_prefill=True)
    assert costs(choices) == pytest.approx(expected, rel=1e-3, abs=1e-6)
    behind = Costs(Windowed(llama(), SINK, RECENT), others, 4, SINK + RECENT)
    assert min(expected[:3]) > 1e-3 and behind(choices[:3]) != pytest.approx(expected[:3], rel=0.05)


@pytest.mark.parametrize("in_prefill", [False, True])
def test_a_layer_that_attends_to_nothing_comes_first(in_prefill: bool) -> None:
    """Its attention adds nothing to the stream, so a window takes nothing away."""
    model = llama()
    model.model.layers[2].self_attn.o_proj.weight.data.zero_()
    samples = [IDS, IDS[:3]]
    costs = Costs(Windowed(model, SINK, RECENT), samples, 4, SINK + RECENT, in_prefill=in_prefill)
    assert costs.counted == 1
    found = greedy_order(LAYERS, costs)
    assert found.order[0] == 2 and found.divergence[0] == pytest.approx(0, abs=1e-6)
    assert costs([()]) == [pytest.approx(0, abs=1e-6)]
    assert costs([found.lazy_layers(1)])[0] == pytest.approx(found.divergence[-1], rel=1e-3)


@pytest.mark.parametrize("in_prefill", [False, True])
def test_batches_do_not_matter(monkeypatch: pytest.MonkeyPatch, in_prefill: bool) -> None:
    samples = [IDS, IDS[::-1]]
    costs = Costs(Windowed(llama(), SINK, RECENT), samples, 4, SINK + RECENT, in_prefill=in_prefill)
    choices = [(layer,) for layer in range(LAYERS)]
    together = costs(choices)
    monkeypatch.setattr("lt_sglang.eval.greedy.COPIES_BYTES", 1)
    assert costs(choices) == pytest.approx(together, rel=1e-3)
    assert costs(choices[1:2]) == pytest.approx(together[1:2], rel=1e-3)


def test_order_follows_the_costs_of_sets() -> None:
    """0 and 1 are cheap alone and dear together; equals go to the higher index."""

    def cost(choices: Sequence[tuple[int, ...]]) -> list[float]:
        single = [1.0, 1.0, 2.0, 2.0]
        return [sum(single[layer] for layer in lazy) + 9 * ({0, 1} <= set(lazy)) for lazy in choices]

    found = greedy_order(4, cost)
    assert found.order == (1, 3, 2) and found.divergence == (1.0, 3.0, 5.0)
    assert found.lazy_layers(2) == (1, 3) and found.lazy_layers(1) == (1, 2, 3)


def test_candidates_are_those_that_added_least() -> None:
    """Two a step after the first; 3 turns out dear beside 0, and 1 has its turn."""
    asked: list[list[tuple[int, ...]]] = []

    def cost(choices: Sequence[tuple[int, ...]]) -> list[float]:
        asked.append(list(choices))
        single = [1.0, 4.0, 6.0, 2.0, 8.0]
        return [sum(single[layer] for layer in lazy) + 5 * ({0, 3} <= set(lazy)) for lazy in choices]

    found = greedy_order(5, cost, candidates=2)
    assert len(asked[0]) == 5
    assert asked[1:] == [[(0, 3), (0, 1)], [(0, 1, 2), (0, 1, 3)], [(0, 1, 2, 3), (0, 1, 2, 4)]]
    assert found.order == (0, 1, 2, 3) and found.divergence == (1.0, 5.0, 11.0, 18.0)
    assert greedy_order(5, cost).order == (0, 1, 2, 3)


def test_short_samples() -> None:
    with pytest.raises(LightTransferError, match="before its last 4"):
        Costs(Windowed(llama(), SINK, RECENT), [IDS[: SINK + RECENT + 4]], 4, SINK + RECENT)


def test_other_models() -> None:
    with pytest.raises(LightTransferError, match="Linear has no layers"):
        Windowed(torch.nn.Linear(2, 2), SINK, RECENT)


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Writes a configuration that serve reads, the same each time."""
    folder, data, out = tmp_path / "model", tmp_path / "data.jsonl", tmp_path / "layers.json"
    llama().save_pretrained(folder)
    words = Words()
    monkeypatch.setattr(calibrate, "HfTokenizer", lambda _name: words)
    line = " ".join(f"w{i % 9}" for i in range(20))
    data.write_text(json.dumps({"text": line}) + "\n" + json.dumps({"text": "w1"}) + "\n")
    argv = [
        *("--model-path", str(folder), "--data", str(data), "--out", str(out), "--greedy", "3"),
        *("--device", "cpu", "--lt-sink-tokens", "2", "--lt-recent-tokens", "5", "--lt-keep", "0.5"),
        "--no-plots",
    ]
    assert calibrate.run(argv) == 0
    config = json.loads(out.read_text())["lighttransfer"]
    assert calibrate.run(argv) == 0
    again = json.loads(out.read_text())["lighttransfer"]
    # Two runs in one process may round differently.
    divergence = config["_calibration"]["divergence"]
    assert again["_calibration"].pop("divergence") == pytest.approx(divergence, rel=1e-4, abs=1e-6)
    again["_calibration"]["divergence"] = divergence
    assert again == config
    evidence = config["_calibration"]
    assert sorted(evidence["order"][:2]) == evidence["lazy_layers"]
    assert config["lazy_layers"] == format_layers(evidence["lazy_layers"])
    assert evidence["samples"] == 1 and evidence["samples_too_short"] == 1 and evidence["compared"] == 3
    assert "from 1 samples" in capsys.readouterr().out
    assert evidence["windows"] == "decode"
    assert calibrate.run([*argv, "--windows", "prefill"]) == 0
    other = json.loads(out.read_text())["lighttransfer"]["_calibration"]
    assert other["windows"] == "prefill" and other["divergence"] != evidence["divergence"]
    without = [word for word in argv if word not in ("--greedy", "3")]
    for more in (["--windows", "prefill"], ["--candidates", "2"]):
        with pytest.raises(LightTransferError, match=f"{more[0]}: only with --greedy"):
            calibrate.run([*without, *more])
    assert calibrate.run([*argv, "--candidates", "2"]) == 0
    assert json.loads(out.read_text())["lighttransfer"]["_calibration"]["candidates"] == 2
    for more, message in (
        (["--endpoint", "http://x"], "--greedy: needs no server"),
        (["--lt-score", "error-mass"], "--greedy: uses no score"),
        (["--tp-size", "2"], "--greedy: starts no engine"),
    ):
        with pytest.raises(LightTransferError, match=message):
            calibrate.run([*argv, *more])
    argv[argv.index("0.5")] = "4"
    with pytest.raises(LightTransferError, match="4 of 4 layers; 1 to 3 can stay full"):
        calibrate.run(argv)

"""The mask of LightTransfer-Train against one written here by definition, in stock transformers models."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

from lt_sglang.config import LightTransferConfig
from lt_sglang.errors import LightTransferError
from lt_sglang.train.attention import Masks, attach, attend
from lt_sglang.train.masks import block_mask, dense, full_mask, lazy_mask, tokens_of, visited_blocks
from tests.engine.models import COMMON, FAMILIES

WINDOWS = [(4, 60), (0, 32), (129, 128)]
LENGTH = 300
DOCUMENTS = (19, 270, 11)  # the long one not first: its sinks are not the first tokens of the row
PADDED_TO = 281  # tokens of the second row when rows are not packed
LAZY = (1,)
LAYERS = 2
CPU = torch.device("cpu")
# float32, one path against the other; weights and logits are of the order of 1.
TOLERANCE = {"rtol": 1e-3, "atol": 2e-5}


def explicit_mask(documents: Sequence[int], sinks: int, recent: int, lazy: bool) -> torch.Tensor:
    """[S, S] bool, from the definition, document by document."""
    seen = torch.zeros(sum(documents), sum(documents), dtype=torch.bool)
    start = 0
    for size in documents:
        for query in range(size):
            for key in range(query + 1):
                if not lazy or key < sinks or query - key < recent:
                    seen[start + query, start + key] = True
        start += size
    return seen


@cache
def batch(packed: bool) -> dict[str, torch.Tensor]:
    """One row of three documents, or two rows of which the second is padded."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(3, COMMON["vocab_size"], (1 if packed else 2, LENGTH), generator=generator)
    if packed:
        return {"input_ids": ids, "position_ids": torch.cat([torch.arange(size) for size in DOCUMENTS])[None]}
    mask = torch.ones_like(ids)
    mask[1, PADDED_TO:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def real_tokens(packed: bool) -> torch.Tensor:
    return batch(packed).get("attention_mask", torch.ones(1, LENGTH)).bool()


@cache
def masks(packed: bool, windows: tuple[int, int], lazy: bool) -> torch.Tensor:
    """[B, 1, S, S]; a padding token sees itself."""
    if packed:
        return explicit_mask(DOCUMENTS, *windows, lazy)[None, None]
    alone = [1] * (LENGTH - PADDED_TO)
    rows = [explicit_mask(row, *windows, lazy) for row in ([LENGTH], [PADDED_TO, *alone])]
    return torch.stack(rows)[:, None]


def make_model(family: str) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = {**COMMON, **FAMILIES[family], "num_hidden_layers": LAYERS, "initializer_range": 0.1}
    torch.manual_seed(11)
    config = AutoConfig.for_model(**{"model_type": family, **shape})
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")


def results(model: Any, packed: bool, backward: bool = True) -> dict[str, torch.Tensor]:
    """Logits of real tokens, and the gradients of a loss over them."""
    real = real_tokens(packed)
    with torch.set_grad_enabled(backward):
        logits = model(**batch(packed), use_cache=False).logits
    found = {"logits": logits[real].detach()}
    if backward:
        ids = batch(packed)["input_ids"]
        loss = torch.nn.functional.cross_entropy(logits[:, :-1][real[:, 1:]], ids[:, 1:][real[:, 1:]])
        loss.backward()
        found |= {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return found


@cache
def reference(family: str, windows: tuple[int, int], packed: bool) -> dict[str, torch.Tensor]:
    """A stock model whose layers get the mask written here."""
    model = make_model(family)
    for index, layer in enumerate(model.model.layers):
        mask = masks(packed, windows, index in LAZY)
        added = torch.zeros(mask.shape).masked_fill_(~mask, torch.finfo(torch.float32).min)

        def use(_module: Any, args: Any, kwargs: Any, added: torch.Tensor = added) -> Any:
            assert "attention_mask" in kwargs
            return args, {**kwargs, "attention_mask": added}

        layer.self_attn.register_forward_pre_hook(use, with_kwargs=True)
    return results(model, packed)


def attached(family: str, windows: tuple[int, int], kind: str | None) -> Any:
    model = make_model(family)
    attach(model, LightTransferConfig(LAZY, sink_tokens=windows[0], recent_tokens=windows[1]), kind)
    return model


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("windows", WINDOWS, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients(family: str, windows: tuple[int, int], packed: bool) -> None:
    """The dense path, checkpointed and not, and FlexAttention's forward; float32."""
    wanted = reference(family, windows, packed)
    for checkpointed in (False, True):
        model = attached(family, windows, None)
        model.train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        found = results(model, packed)
        assert found.keys() == wanted.keys()
        for name, value in found.items():
            torch.testing.assert_close(
                value, wanted[name], **TOLERANCE, msg=lambda text, n=name: f"{n}: {text}"
            )
    flex = attached(family, windows, "flex").eval()
    # FlexAttention is traced even where it is not compiled. Without AVX-512 the environment of a CPU server
    # (lt_sglang/launch/cpu.py), which tests have too, switches both off.
    with torch._dynamo.config.patch(disable=False):
        logits = results(flex, packed, backward=False)["logits"]
    torch.testing.assert_close(logits, wanted["logits"], **TOLERANCE)


def test_windows_matter() -> None:
    """The comparison can fail: another window gives other logits."""
    logits = [reference("llama", windows, True)["logits"] for windows in WINDOWS]
    assert (logits[0] - logits[1]).abs().max() > 100 * TOLERANCE["atol"]
    assert (logits[0] - logits[2]).abs().max() > 100 * TOLERANCE["atol"]


@pytest.mark.parametrize("windows", WINDOWS, ids=str)
@pytest.mark.parametrize("length", [127, 128, 300, 1300])
def test_blocks_equal_torchs(length: int, windows: tuple[int, int]) -> None:
    """Packed and not, also where the last tile is cut and where strips of queries meet."""
    cut = length // 3
    positions = torch.cat([torch.arange(cut), torch.arange(length - cut)])[None]
    for tokens in (tokens_of(2, length, CPU), tokens_of(1, length, CPU, positions)):
        rows = tokens.position.shape[0]
        for mask in (full_mask(tokens), lazy_mask(tokens, *windows)):
            found = block_mask(mask, rows, length, CPU)
            wanted = create_block_mask(mask, rows, None, length, length, "cpu")
            assert torch.equal(found.to_dense(), wanted.to_dense().expand_as(found.to_dense()))
            assert torch.equal(
                found.full_kv_num_blocks, wanted.full_kv_num_blocks.expand_as(found.kv_num_blocks)
            )
            assert visited_blocks(found) == int(found.to_dense().sum())


def test_packed_rows_filled_up() -> None:
    """Padding at the end of a padding-free row has position 0 each: documents of one token."""
    tokens = tokens_of(1, 8, CPU, torch.tensor([[0, 1, 2, 0, 1, 0, 0, 0]]))
    assert tokens.document.tolist() == [[1, 1, 1, 2, 2, 3, 4, 5]]
    assert tokens.position.tolist() == [[0, 1, 2, 0, 1, 0, 0, 0]]
    assert not tokens.single


@pytest.mark.parametrize("row", [[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]], ids=["left", "right"])
def test_padding(row: list[int]) -> None:
    """On either side; sinks are counted from the first token, not from the row's beginning."""
    tokens = tokens_of(1, 5, CPU, attention_mask=torch.tensor([row]))
    seen = dense(lazy_mask(tokens, 1, 1), 1, 5, CPU)[0, 0]
    real = [place for place, one in enumerate(row) if one]
    assert seen[real[-1]].nonzero()[:, 0].tolist() == [real[0], real[-1]]
    assert all(seen[place].nonzero()[:, 0].tolist() == [place] for place in range(5) if not row[place])


def test_single_documents_need_no_comparison() -> None:
    tokens = tokens_of(2, 4, CPU, torch.arange(4)[None], torch.ones(2, 4))
    assert tokens.single
    with pytest.raises(LightTransferError, match="shape"):
        tokens_of(2, 4, CPU, attention_mask=torch.ones(2, 5))


def test_a_layer_without_our_mask_fails() -> None:
    """Never another mask, silently."""
    with pytest.raises(LightTransferError, match="no hybrid mask"):
        attend(torch.nn.Module(), *[torch.zeros(1, 1, 2, 4)] * 3, attention_mask=None)  # type: ignore[arg-type]
    model = make_model("llama")
    attach(model, LightTransferConfig(LAZY))
    other = make_model("llama")
    other.set_attn_implementation(model.config._attn_implementation)
    with pytest.raises(LightTransferError, match="not prepared"):
        other(torch.tensor([[3, 4]]))
    first = model(torch.tensor([[3, 4]]), use_cache=True)
    with pytest.raises(LightTransferError, match="cache"):
        model(torch.tensor([[5]]), past_key_values=first.past_key_values)


def test_what_cannot_be_attached() -> None:
    for config, kind, why in (
        (LightTransferConfig((7,)), None, "layer 7 does not exist"),
        (LightTransferConfig((1,), mode="dynamic"), None, "static"),
        (LightTransferConfig((1,)), "eager", "flex, dense"),
    ):
        with pytest.raises(LightTransferError, match=why):
            attach(make_model("llama"), config, kind)


def test_which_mask_a_layer_takes() -> None:
    masks_of = Masks("full", "lazy", frozenset((1, 3)))
    assert [masks_of.of(layer) for layer in range(4)] == ["full", "lazy", "full", "lazy"]


def test_a_gpu_never_takes_the_dense_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only where asked for by name: by default the kind depends on where the tokens are, nothing else."""
    made: list[str] = []
    from lt_sglang.train import attention

    monkeypatch.setattr(attention, "dense", lambda *a: made.append("dense"))
    monkeypatch.setattr(attention, "block_mask", lambda *a: made.append("flex"))
    model = make_model("llama").to("meta")
    attach(model, LightTransferConfig(LAZY))
    monkeypatch.setattr(attention, "tokens_of", lambda *a: tokens_of(1, 2, CPU))
    hook = next(iter(model.model._forward_pre_hooks.values()))
    hook(model.model, (), {"input_ids": torch.zeros(1, 2, device="meta", dtype=torch.long)})
    assert made == ["flex", "flex"]
    hook(model.model, (), {"input_ids": torch.zeros(1, 2, dtype=torch.long)})
    assert made == ["flex", "flex", "dense", "dense"]
    attention._current.set(None)

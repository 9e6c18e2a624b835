"""The hybrid mask in a transformers model: one BlockMask for full and one for lazy layers, made once a batch.

transformers calls an attention function by name and hands it the layer's module; under the same name it asks
for the mask. Ours is both masks at once, and each layer takes its own. On a GPU they are read by
FlexAttention, compiled. FlexAttention has no backward on a CPU (torch 2.14.1): there SDPA reads dense masks
made from the same function. A model on a GPU never takes that path unless ``kind`` says so.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from lt_sglang.config import LightTransferConfig
from lt_sglang.errors import LightTransferError
from lt_sglang.train.masks import block_mask, dense, full_mask, lazy_mask, tokens_of

NAME = "lighttransfer_train"
KINDS = ("flex", "dense")
# One for each mask function, with and without gradients, and with documents or not.
RECOMPILES = 64


@dataclass(frozen=True)
class Masks:
    """The masks of one batch.

    full, lazy: a BlockMask each, or dense bool [B, 1, T, T]. lazy_layers: the layers that take ``lazy``.
    """

    full: Any
    lazy: Any
    lazy_layers: frozenset[int]

    def of(self, layer: int) -> Any:
        """That of layer ``layer``."""
        return self.lazy if layer in self.lazy_layers else self.full


_current: ContextVar[Masks | None] = ContextVar("lighttransfer_train_masks", default=None)


def attach(model: Any, config: LightTransferConfig, kind: str | None = None) -> None:
    """Make ``model`` attend as ``config``'s static list says, in training and in evaluation, without a cache.

    Args:
        model: a causal language model of transformers (Llama, Mistral, Mixtral, Qwen2, Qwen3, ...).
        config: of mode "static".
        kind: "flex" or "dense"; by default flex on a GPU and dense on a CPU, decided batch by batch.

    Raises:
        LightTransferError: for a list that does not fit the model, and for a model without one decoder.
    """
    if kind not in (None, *KINDS):
        raise LightTransferError(f"kind: {kind!r} is not one of {', '.join(KINDS)}")
    if config.dynamic:
        raise LightTransferError("mode: training needs a static list of lazy layers, not dynamic mode")
    text = model.config.get_text_config()
    config.check_model(text.num_hidden_layers)
    decoder = model.get_decoder()
    layers = getattr(decoder, "layers", None)
    if layers is None or not all(hasattr(layer, "self_attn") for layer in layers):
        raise LightTransferError(
            f"{type(model).__name__}: has layers without self_attn; it cannot be trained"
        )
    if getattr(text, "attention_dropout", 0.0):
        raise LightTransferError("attention_dropout: must be 0 in the model's config.json")
    _register()
    model.set_attn_implementation(NAME)
    model.config.use_cache = False
    lazy_layers = frozenset(config.lazy_layers)

    def before(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs = kwargs.get("inputs_embeds")
        if inputs is None:
            inputs = args[0] if args else kwargs["input_ids"]
        if kwargs.get("past_key_values") is not None:
            raise LightTransferError("past_key_values: a model under training has no cache (use_cache=False)")
        batch, length = inputs.shape[:2]
        device = inputs.device
        tokens = tokens_of(batch, length, device, kwargs.get("position_ids"), kwargs.get("attention_mask"))
        functions = (full_mask(tokens), lazy_mask(tokens, config.sink_tokens, config.recent_tokens))
        use = kind or ("dense" if device.type == "cpu" else "flex")
        make: Callable[..., Any] = dense if use == "dense" else block_mask
        full, lazy = (make(function, batch, length, device) for function in functions)
        _current.set(Masks(full, lazy, lazy_layers))

    def after(_module: Any, _args: Any, _output: Any) -> None:
        _current.set(None)

    decoder.register_forward_pre_hook(before, with_kwargs=True)
    decoder.register_forward_hook(after, always_call=True)


@cache
def _register() -> None:
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, _masks)


def _masks(*_args: Any, **kwargs: Any) -> Masks:
    """What transformers asks for by NAME: the current batch's masks, whatever kind of layer it asks for."""
    masks = _current.get()
    if masks is None:
        raise LightTransferError("attention: the model was not prepared by lt_sglang.train.attention.attach")
    if kwargs.get("q_length") != kwargs.get("kv_length"):
        raise LightTransferError("use_cache: a model under training has no cache; pass use_cache=False")
    return masks


def attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Masks,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """One layer's attention.

    Args:
        module: has ``layer_idx``.
        query: [B, heads, S, head_dim].
        key: [B, kv_heads, S, head_dim].
        value: as ``key``.
        attention_mask: the masks of the batch, for full and for lazy layers.
        scaling: of the products of queries and keys; 1 / sqrt(head_dim) by default.
        dropout: not used; ``attach`` refuses a model that has one.

    Returns:
        [B, S, heads, head_dim] in ``value``'s dtype, and no weights.
    """
    if not isinstance(attention_mask, Masks):
        raise LightTransferError("attention: got no hybrid mask; call the model through its decoder")
    mask = attention_mask.of(module.layer_idx)
    # Under autocast, RoPE lifts queries and keys to float32.
    query, key = query.to(value.dtype), key.to(value.dtype)
    group = query.shape[1] // key.shape[1]
    if isinstance(mask, BlockMask):
        if group & (group - 1):  # the kernels share keys among a power of two of heads only
            key, value = (part.repeat_interleave(group, 1) for part in (key, value))
        run = _compiled() if query.is_cuda else flex_attention
        out = run(
            query, key, value, block_mask=mask, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
        )
    else:
        out = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, scale=scaling, enable_gqa=group > 1
        )
    return out.transpose(1, 2).contiguous(), None


@cache
def _compiled() -> Any:
    settings = torch._dynamo.config
    settings.recompile_limit = max(RECOMPILES, settings.recompile_limit)
    # Beyond it torch would go on without a kernel, in memory that grows with the square of the length.
    settings.fail_on_recompile_limit_hit = True
    return torch.compile(flex_attention, dynamic=False)

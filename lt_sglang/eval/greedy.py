"""A static list by what lazy layers cost together: greedy, in transformers, on samples of one's traffic.

Layers are made lazy one by one, each time the one that then raises the divergence from full attention least.
For a list whose layers are cut after the prompt, a sample is prefilled once with full attention, and only its
last tokens are computed again for every choice; for a static list, whose layers have their windows in prefill
too, all of it is. The model runs in transformers, on one device: an engine cannot change a request's layers
that often.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from lt_sglang.errors import LightTransferError

AT_ONCE = 32  # choices in one batch, each with a copy of the sample's cache and a mask
COPIES_BYTES = 4 << 30  # of those copies
MASK_BYTES = 4  # of a query and key: seen or not, and what sdpa makes of it


@dataclass(frozen=True)
class GreedyOrder:
    """order: the layers as they were made lazy. divergence: of the choice up to each of them.

    The divergence is KL(full || choice) in nats a position, the mean over samples. A prefix of the order is
    greedy's choice of that many layers.
    """

    order: tuple[int, ...]
    divergence: tuple[float, ...]

    def lazy_layers(self, keep: int) -> tuple[int, ...]:
        """Greedy's choice when ``keep`` layers stay full, 1 to all but one."""
        return tuple(sorted(self.order[: len(self.order) + 1 - keep]))


def greedy_order(
    layers: int,
    cost: Callable[[Sequence[tuple[int, ...]]], Sequence[float]],
    progress: Callable[[range], Any] = iter,
    candidates: int | None = None,
) -> GreedyOrder:
    """All layers but one, in the order in which they become lazy; of equals the higher index first.

    Args:
        layers: of the model.
        cost: of several sets of lazy layers.
        progress: wraps the steps.
        candidates: after the first step, try only as many layers, those that added least when last tried. A
            a layer that costs much seldom costs little later, so that most of a step is wasted on them.
    """
    order: list[int] = []
    divergence = [0.0]
    added = dict.fromkeys(range(layers), 0.0)  # nats a position, by a layer that is not lazy, when last tried
    for step in progress(range(layers - 1)):
        tried = sorted(added, key=lambda layer: (added[layer], -layer))[: candidates if step else None]
        costs = cost([tuple(sorted([*order, layer])) for layer in tried])
        least, chosen = min(zip(costs, tried, strict=True), key=lambda pair: (pair[0], -pair[1]))
        added.update((layer, value - divergence[-1]) for layer, value in zip(tried, costs, strict=True))
        del added[chosen]
        order.append(chosen)
        divergence.append(float(least))
    return GreedyOrder(tuple(order), tuple(divergence[1:]))


class Windowed:
    """A transformers model whose lazy layers see sink + recent tokens, in many choices at once.

    model: a decoder whose layers have ``self_attn`` and take an attention mask (Llama, Mistral, Qwen). Loaded
    with sdpa, in eval mode.
    """

    def __init__(self, model: Any, sink_tokens: int, recent_tokens: int) -> None:
        blocks = getattr(getattr(model, "model", None), "layers", None)
        if blocks is None or not all(hasattr(block, "self_attn") for block in blocks):
            raise LightTransferError(f"--greedy: {type(model).__name__} has no layers with self_attn")
        self._model, self._sink, self._recent = model, sink_tokens, recent_tokens
        self.layers = len(blocks)
        self._lazy: torch.Tensor | None = None  # [choices, layers]
        self._past = 0
        for index, block in enumerate(blocks):
            block.self_attn.register_forward_pre_hook(self._masked(index), with_kwargs=True)

    def _masked(self, index: int) -> Any:
        def before(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            if self._lazy is None:
                return args, kwargs
            rows = (args[0] if args else kwargs["hidden_states"]).shape[1]
            query = torch.arange(self._past, self._past + rows, device=self._lazy.device)[:, None]
            key = torch.arange(self._past + rows, device=self._lazy.device)[None, :]
            near = (key < self._sink) | (query - key < self._recent)
            mask = (key <= query)[None] & (near[None] | ~self._lazy[:, index, None, None])
            return args, {**kwargs, "attention_mask": mask[:, None]}

        return before

    @contextmanager
    def _choosing(self, choices: Sequence[Collection[int]], past: int) -> Iterator[None]:
        rows = [[layer in lazy for layer in range(self.layers)] for lazy in choices]
        self._lazy, self._past = torch.tensor(rows, device=self._model.device), past
        try:
            yield
        finally:
            self._lazy = None

    @torch.inference_mode()
    def prefill(self, ids: Sequence[int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Keys and values by layer, with full attention; in the host's memory."""
        from transformers import DynamicCache

        cache = DynamicCache()
        self._model(self._ids(ids, 1), past_key_values=cache, use_cache=True, logits_to_keep=1)
        return [(layer.keys.cpu(), layer.values.cpu()) for layer in cache.layers]

    @torch.inference_mode()
    def log_probabilities(
        self,
        cached: Sequence[tuple[torch.Tensor, torch.Tensor]],
        ids: Sequence[int],
        choices: Sequence[Collection[int]],
        last: int,
    ) -> torch.Tensor:
        """Log-probabilities of the token after each of the last ``last`` tokens of ``ids``.

        float32 [choices, last, vocabulary].

        cached: keys and values of what comes before ``ids``, by layer; empty if nothing does.
        """
        from transformers import DynamicCache

        cache = DynamicCache()
        for index, parts in enumerate(cached):
            copies = (part.to(self._model.device).expand(len(choices), -1, -1, -1) for part in parts)
            cache.update(*copies, index)
        options: dict[str, Any] = (
            {"past_key_values": cache, "use_cache": True} if cached else {"use_cache": False}
        )
        with self._choosing(choices, cache.get_seq_length()):
            logits = self._model(self._ids(ids, len(choices)), logits_to_keep=last, **options).logits
        return torch.log_softmax(logits.float(), 2)

    def _ids(self, ids: Sequence[int], times: int) -> torch.Tensor:
        return torch.tensor([list(ids)] * times, device=self._model.device)


class Costs:
    """What choices cost on samples: the mean KL divergence of their last tokens' predictions.

    samples: token ids. compared: how many tokens of a sample's end are compared; those before are prefilled.
    in_prefill: lazy layers have their windows there too, as in static mode; else only after it. counted:
    samples long enough for a window to hide anything from their last tokens. Raises LightTransferError if
    none is.
    """

    def __init__(
        self,
        model: Windowed,
        samples: Sequence[Sequence[int]],
        compared: int,
        window: int,
        *,
        in_prefill: bool = False,
    ) -> None:
        self._model, self._compared = model, compared
        long = [ids for ids in samples if len(ids) - compared > window]
        if not long:
            raise LightTransferError(
                f"calibrate: no sample has more than sink + recent tokens before its last {compared}"
            )
        self.counted = len(long)
        self._cases = []
        for ids in long:
            cached, fed = ([], ids) if in_prefill else (model.prefill(ids[:-compared]), ids[-compared:])
            self._cases.append((cached, fed, model.log_probabilities(cached, fed, [()], compared)))

    def __call__(self, choices: Sequence[tuple[int, ...]]) -> list[float]:
        """Nats a position, of each choice of lazy layers."""
        totals = [0.0] * len(choices)
        for cached, fed, full in self._cases:
            keys = len(fed) + (cached[0][0].shape[2] if cached else 0)
            size = sum(part.nbytes for parts in cached for part in parts) + MASK_BYTES * len(fed) * keys
            at_once = max(1, min(AT_ONCE, COPIES_BYTES // size))
            for start in range(0, len(choices), at_once):
                some = choices[start : start + at_once]
                logs = self._model.log_probabilities(cached, fed, some, self._compared)
                kl = (full.exp() * (full - logs)).sum(2).mean(1).tolist()
                for number, value in enumerate(kl):
                    totals[start + number] += value
        found = [total / self.counted for total in totals]
        if not all(math.isfinite(value) for value in found):
            raise LightTransferError("calibrate: the model's predictions are not finite")
        return found


def load(model_path: str, device: str) -> Any:
    """The model in its own data type; raises LightTransferError if transformers cannot."""
    from transformers import AutoModelForCausalLM

    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            model_path, dtype="auto", attn_implementation="sdpa"
        )
    except (OSError, ValueError) as error:
        raise LightTransferError(f"--model-path {model_path}: cannot be loaded ({error})") from None
    return model.to(device).eval()

"""The reference of dynamic mode: transformers' own attention weights, then a streaming mask.

Written from the definitions alone and shares no code with lt_sglang. A prompt is run with full attention
but for its last queries, which are run with eager attention to get the weights themselves. From them, and
from the values, the layers' inputs and the output projections that transformers holds, come the scores; from
the scores, layer after layer, the lazy layers. What follows the decision is run with a streaming mask in
those layers. Everything is teacher-forced: the greedy choice at every position of an output.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache

from ..lazy_queue import popped_layers
from .reference import TIE_MARGIN, Comparison, missed

LAST_QUERIES = 32

# Two float32 engines may differ by so much in a score (residual error and cosine: relative to its size).
SCORE_TOLERANCE = 1e-4
# The engine tells scores with six digits behind the point.
TOLD = 1e-6
CHOICES_PER_TIE = 40
# A test that needs the same choice twice takes prompts whose choice hangs on this many tolerances.
CLEAR = 10


@dataclass
class Choices:
    """Chosen layers held against the reference.

    compared: how many prompts. ties: how many chose otherwise between layers whose scores are as far apart as
    two engines' may be. wrong: a sentence for each other difference, scores included.
    """

    compared: int = 0
    ties: int = 0
    wrong: list[str] = field(default_factory=list)

    def assert_equal(self) -> None:
        """Equal up to near-ties, at most one in CHOICES_PER_TIE prompts."""
        assert not self.wrong, f"{len(self.wrong)} of {self.compared} choices are wrong: {self.wrong[:4]}"
        assert self.ties <= math.ceil(self.compared / CHOICES_PER_TIE), f"{self.ties} of {self.compared}"


class DynamicReference:
    """A transformers model whose lazy layers may differ from call to call.

    keep: P. score: the name of a score. default: lazy layers of prompts of at most sink + recent tokens.
    queries: w_last; ``scores`` and ``compare_choice`` are told theirs.
    """

    def __init__(
        self,
        model: Path,
        keep: int,
        sink_tokens: int,
        recent_tokens: int,
        score: str,
        default: Collection[int],
        *,
        threads: int = 1,
        queries: int = LAST_QUERIES,
    ) -> None:
        self.keep = keep
        self.queries = queries
        self.sink_tokens = sink_tokens
        self.recent_tokens = recent_tokens
        self.default = tuple(sorted(default))
        self.threads = threads
        self._score = {
            "lighttransfer": self._lighttransfer,
            "discarded-mass": self._discarded_mass,
            "residual-error": self._residual_error,
            "error-mass": self._error_mass,
            "squeeze": self._squeeze,
        }[score]
        self._relative = score in ("residual-error", "error-mass", "squeeze")
        self._lazy: frozenset[int] = frozenset()
        self._mask: torch.Tensor | None = None
        self._kept: tuple[list[int], DynamicCache] = ([], DynamicCache())
        self._model = AutoModelForCausalLM.from_pretrained(
            model, dtype=torch.float32, attn_implementation="sdpa"
        ).eval()
        self._layers = self._model.model.layers
        self.num_layers = len(self._layers)
        for index, layer in enumerate(self._layers):
            layer.self_attn.register_forward_pre_hook(self._mask_of(index), with_kwargs=True)

    # ---- the decision

    def scores(self, tokens: Sequence[int], end: int, queries: int = LAST_QUERIES) -> list[float]:
        """How lazy each layer is, by the last ``queries`` of the first ``end`` tokens; higher is lazier."""
        cache = DynamicCache()
        with torch.inference_mode():
            if end > queries:
                self._run(tokens[: end - queries], cache, "sdpa", logits_to_keep=1)
            last = tokens[max(end - queries, 0) : end]
            scores = self._scores(self._watch(last, cache), cache, end, queries)
        self._kept = (list(tokens[:end]), cache)
        return scores

    def scores_by_end(
        self, tokens: Sequence[int], ends: Sequence[int], queries: int = LAST_QUERIES
    ) -> dict[int, list[float]]:
        """``scores`` for each of ``ends``, in one run: prompts of some hundred tokens only."""
        cache = DynamicCache()
        with torch.inference_mode():
            seen = self._watch(tokens[: max(ends)], cache)
            return {end: self._scores(seen, cache, end, queries) for end in ends}

    def lazy_of(self, scores: Sequence[float]) -> tuple[int, ...]:
        """As layers come, the laziest of keep + 1 goes; among equals the one with the higher index."""
        return tuple(sorted(popped_layers(scores, self.keep)))

    def is_clear(self, scores: Sequence[float]) -> bool:
        """Whether the choice is the same on every machine: no rounding exchanges the layers at the cut."""
        ordered = sorted(scores, reverse=True)
        lazy, kept = ordered[self.num_layers - self.keep - 1], ordered[self.num_layers - self.keep]
        return lazy - kept > CLEAR * SCORE_TOLERANCE * (max(abs(lazy), abs(kept)) if self._relative else 1)

    def clear_prompt(self, make: Callable[[], list[int]], unlike: Collection[int] | None = None) -> list[int]:
        """The first prompt of ``make`` that is_clear; unlike: and whose own choice is not these layers."""
        for _ in range(100):
            prompt = make()
            scores = self.scores(prompt, len(prompt))
            if self.is_clear(scores) and (unlike is None or self.lazy_of(scores) != tuple(sorted(unlike))):
                return prompt
        raise AssertionError("no such prompt in 100")

    def compare_choice(
        self, result: Choices, prompt: Sequence[int], chosen: dict[str, Any], end: int, queries: int
    ) -> None:
        """Hold what the engine says of a decision at ``end`` against the reference; adds to ``result``.

        Its scores must be the reference's up to rounding, and its choice must follow from its scores. So two
        layers closer than rounding may be chosen either way, and nothing else.
        """
        result.compared += 1
        scores = self.scores(prompt, end, queries)
        told = chosen["laziness"]
        if not self.same_scores(told, scores):
            result.wrong.append(f"prompt of {len(prompt)}: scores {told}, expected {scores}")
            return
        lazy, expected = set(chosen["lazy_layers"]), set(self.lazy_of(scores))
        kept = set(range(self.num_layers)) - lazy
        if len(lazy) != len(expected) or (
            min(told[layer] for layer in lazy) < max(told[layer] for layer in kept) - TOLD
        ):
            result.wrong.append(f"prompt of {len(prompt)}: {lazy}, expected {expected} by {scores}")
        elif lazy != expected:
            result.ties += 1

    def same_scores(self, told: Sequence[float] | None, scores: Sequence[float]) -> bool:
        """Equal up to rounding."""
        return told is not None and all(
            math.isclose(
                a, b, rel_tol=SCORE_TOLERANCE if self._relative else 0.0, abs_tol=SCORE_TOLERANCE / 10
            )
            or (not self._relative and abs(a - b) <= SCORE_TOLERANCE)
            for a, b in zip(told, scores, strict=True)
        )

    # ---- outputs

    def margins(
        self, prompt: Sequence[int], output: Sequence[int], lazy: Collection[int], full_rows: int
    ) -> list[float]:
        """By how much the greedy choice beats each output token, given those before; 0 where it is it."""
        return missed(self.logits(prompt, output, lazy, full_rows), output)

    def logits(
        self, prompt: Sequence[int], output: Sequence[int], lazy: Collection[int], full_rows: int
    ) -> torch.Tensor:
        """float32 [len(output), vocabulary]: what each output token was chosen from, given those before.

        Queries at positions below ``full_rows`` see everything before them in every layer, the others only
        sink + recent keys in the layers of ``lazy``.
        """
        tokens = [*prompt, *output]
        start = min(full_rows, len(prompt) - 1)
        with torch.inference_mode():
            cache = self._full(tokens, start)
            return self._stream(
                tokens, cache, lazy, start, len(tokens), full_rows=full_rows, keep=len(output) + 1
            )[:-1]

    def margins_of_hit(
        self,
        prompt: Sequence[int],
        output: Sequence[int],
        lazy: Collection[int],
        hit: int,
        full_rows: int,
        steps: int,
    ) -> list[float]:
        """As ``margins``, of a request that read ``hit`` cached tokens of a prefix of ``full_rows``.

        It computes the rest of its prompt itself, with streaming attention. Then SGLang frees its own slots
        of what the tree has too, and it reads the tree's. By then ``steps`` tokens were decoded from its own.
        """
        tokens, end = [*prompt, *output], len(prompt) + min(steps, len(output))
        with torch.inference_mode():
            own, tree = self._full(tokens, hit), self._full(tokens, full_rows)
            parts = [self._stream(tokens, own, lazy, hit, end)[len(prompt) - 1 - hit :]]
            for mine, theirs in zip(own.layers, tree.layers, strict=True):
                mine.keys[:, :, hit:full_rows] = theirs.keys[:, :, hit:]
                mine.values[:, :, hit:full_rows] = theirs.values[:, :, hit:]
            if end < len(tokens):
                parts.append(self._stream(tokens, own, lazy, end, len(tokens)))
        return missed(torch.cat(parts)[: len(output)], output)

    def compare_output(
        self,
        result: Comparison,
        prompt: Sequence[int],
        output: Sequence[int],
        lazy: Collection[int],
        full_rows: int,
    ) -> None:
        """Hold a greedy output against the reference, position by position; adds to ``result``."""
        result.tokens += len(output)
        for position, margin in enumerate(self.margins(prompt, output, lazy, full_rows)):
            if 0 < margin < TIE_MARGIN:
                result.ties += 1
            elif margin > 0:
                result.wrong.append((len(prompt), position, margin))

    # ---- how

    def _stream(
        self,
        tokens: Sequence[int],
        cache: DynamicCache,
        lazy: Collection[int],
        start: int,
        stop: int,
        *,
        full_rows: int = 0,
        keep: int = 0,
    ) -> torch.Tensor:
        """float32 [keep or stop - start, vocabulary], of the last rows of ``start`` to ``stop - 1``.

        Those from ``full_rows`` on see sink + recent keys in ``lazy`` layers.
        """
        mask = streaming_rows(start, stop, full_rows, self.sink_tokens, self.recent_tokens)
        self._lazy, self._mask = frozenset(lazy), mask
        logits = self._run(tokens[start:stop], cache, "sdpa", logits_to_keep=keep).logits[0]
        self._lazy, self._mask = frozenset(), None
        return logits

    def _full(self, tokens: Sequence[int], count: int) -> DynamicCache:
        """K and V of the first ``count`` tokens under full attention; kept from the last ``scores``."""
        known, kept = self._kept
        if 0 < count <= len(known) and known[:count] == list(tokens[:count]):
            cache = copy.deepcopy(kept)
            if count < len(known):
                cache.crop(count - len(known))
            assert cache.get_seq_length() == count
            return cache
        cache = DynamicCache()
        if count:
            self._run(tokens[:count], cache, "sdpa", logits_to_keep=1)
        return cache

    def _watch(self, tokens: Sequence[int], cache: DynamicCache) -> Any:
        return self._run(
            tokens, cache, "eager", logits_to_keep=1, output_attentions=True, output_hidden_states=True
        )

    def _scores(self, seen: Any, cache: DynamicCache, end: int, queries: int) -> list[float]:
        scores = []
        for index, layer in enumerate(self._layers):
            weights, values = seen.attentions[index][0], cache.layers[index].values[0]
            last = end - (values.shape[1] - weights.shape[1])  # rows of the queries seen
            rows = slice(max(last - queries, 0), last)
            scores.append(
                self._score(
                    weights[:, rows, :end].double(),
                    values[:, :end].double(),
                    seen.hidden_states[index][0, rows].double(),
                    layer.self_attn.o_proj.weight.double(),
                )
            )
        return scores

    def _run(self, tokens: Sequence[int], cache: DynamicCache, attention: str, **options: Any) -> Any:
        torch.set_num_threads(self.threads)
        self._model.set_attn_implementation(attention)
        return self._model(torch.tensor([list(tokens)]), past_key_values=cache, use_cache=True, **options)

    def _mask_of(self, index: int) -> Any:
        def replace(_module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            assert "attention_mask" in kwargs, "this model passes its mask in another way"
            if index not in self._lazy:
                return args, kwargs
            return args, {**kwargs, "attention_mask": self._mask}

        return replace

    # ---- the scores; weights [heads, queries, keys], values [kv heads, keys, dim], x [queries, hidden]

    def _selected(self, keys: int) -> torch.Tensor:
        position = torch.arange(keys)
        return (position < self.sink_tokens) | (position >= keys - self.recent_tokens)

    def _mass(self, weights: torch.Tensor) -> torch.Tensor:
        return weights[:, :, self._selected(weights.shape[2])].sum(2)

    def _lighttransfer(self, weights: torch.Tensor, *_: torch.Tensor) -> float:
        return float(self._mass(weights).mean())

    def _discarded_mass(self, weights: torch.Tensor, *_: torch.Tensor) -> float:
        return -float((1 - self._mass(weights)).max().clamp(min=0))

    def _residual_error(
        self, weights: torch.Tensor, values: torch.Tensor, x: torch.Tensor, w_o: torch.Tensor
    ) -> float:
        streaming = weights * self._selected(weights.shape[2])
        streaming = streaming / streaming.sum(2, keepdim=True)
        error = _heads(weights - streaming, values) @ w_o.T
        return -float((error.norm(dim=1) / x.norm(dim=1)).max())

    def _error_mass(self, weights: torch.Tensor, *others: torch.Tensor) -> float:
        return -self._residual_error(weights, *others) * self._discarded_mass(weights)

    def _squeeze(
        self, weights: torch.Tensor, values: torch.Tensor, x: torch.Tensor, w_o: torch.Tensor
    ) -> float:
        after = x + _heads(weights, values) @ w_o.T
        return float(torch.nn.functional.cosine_similarity(x, after, dim=1).mean())


def _heads(weights: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """[queries, heads * dim]: the heads' outputs, side by side."""
    values = values.repeat_interleave(weights.shape[0] // values.shape[0], 0)
    return (weights @ values).transpose(0, 1).flatten(1)


def streaming_rows(start: int, stop: int, full_rows: int, sinks: int, recent: int) -> torch.Tensor:
    """Additive mask [1, 1, stop - start, stop] of queries start .. stop - 1 of a lazy layer."""
    query = torch.arange(start, stop)[:, None]
    key = torch.arange(stop)[None, :]
    seen = (key <= query) & ((key < sinks) | (query - key < recent) | (query < full_rows))
    return torch.zeros(stop - start, stop).masked_fill_(~seen, torch.finfo(torch.float32).min)[None, None]

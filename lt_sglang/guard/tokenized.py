"""One tokenized request, as it would be sent to the scheduler."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from lt_sglang.guard.wire import check_message

MEDIA = ("image_data", "video_data", "audio_data")
INT32_MOST = 2**31 - 1
# Logits are divided by temperature (at least 1e-6) and by the repetition penalty in float32. Beyond these
# they overflow, every probability is NaN, and sampling raises.
SMALLEST_REPETITION_PENALTY = 1e-6
LARGEST_BIAS = 1e20
# Log-probabilities of other tokens in one answer. Each is a Python object in three processes, made on the
# scheduler's thread.
MOST_LOGPROBS = 1 << 21
# Norms square what they are given. No model's embeddings are near this.
LARGEST_EMBEDDING = 1e6


@dataclass(frozen=True)
class Limits:
    """The limits that a request is checked with.

    vocab_size, hidden_size: of the model, in tokens and floats. takes_embeds: whether its weights are
    bfloat16, the only type SGLang turns input_embeds into. pooling: whether positions may be read out of a
    prompt, which needs whole prompts and no prefix cache. labels: names custom_labels may use, None where
    metrics are off and all are ignored. context_length: the longest prompt with its answer, in tokens.
    """

    vocab_size: int
    hidden_size: int
    takes_embeds: bool
    pooling: bool = False
    labels: frozenset[str] | None = None
    context_length: int = 1 << 20


def check_tokenized(limits: Limits, obj: Any, tokenized: Any) -> None:
    """Raise ValueError, naming the field, if the scheduler could not serve ``tokenized``.

    obj: the request it was made of, for what only the tokenizer's process uses.
    """
    check_message(tokenized)
    _check_media(obj, tokenized)
    length = _check_prompt(limits, tokenized)
    _check_sampling(tokenized.sampling_params)
    _check_positions(limits, tokenized, length)
    _check_overrides(limits, tokenized.positional_embed_overrides, length)
    _check_labels(limits, getattr(obj, "custom_labels", None))
    if hasattr(tokenized, "return_logprob"):
        _check_logprobs(limits, tokenized, length)
        _check_session(tokenized)
        if tokenized.bootstrap_host is not None:
            raise ValueError("bootstrap_host: prefill and decode are not disaggregated here; leave it out")


def _check_media(obj: Any, tokenized: Any) -> None:
    """SGLang's /generate leaves out what a model of text cannot read, and answers all the same."""
    for name in MEDIA:
        if tokenized.mm_inputs is None and _holds(getattr(obj, name, None)):
            raise ValueError(f"{name}: this model reads text only")


def _holds(data: Any) -> bool:
    return any(map(_holds, data)) if isinstance(data, list) else data is not None and data != ""


def _check_prompt(limits: Limits, tokenized: Any) -> int:
    """Returns the prompt's length in tokens."""
    embeds = getattr(tokenized, "input_embeds", None)
    if embeds is not None:
        return _check_embeds(limits, embeds)
    ids = np.asarray(tokenized.input_ids if tokenized.input_ids is not None else (), dtype=np.int64)
    session = getattr(tokenized, "session_params", None)
    if tokenized.mm_inputs is not None:
        return len(ids)
    if len(ids) == 0:
        if session is not None and session.id:
            return 0
        raise ValueError("input_ids, text: a prompt without tokens; at least one is needed")
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= limits.vocab_size:
        wrong = low if low < 0 else high
        raise ValueError(f"input_ids: {wrong} is not a token; allowed are 0 to {limits.vocab_size - 1}")
    return len(ids)


def _check_embeds(limits: Limits, embeds: Any) -> int:
    if not limits.takes_embeds:
        raise ValueError(
            "input_embeds: only models in bfloat16 take them; start the server with --dtype bfloat16"
        )
    try:
        values = np.asarray(embeds, dtype=np.float32)
    except (TypeError, ValueError):
        values = np.empty(0, dtype=np.float32)
    if values.ndim != 2 or len(values) == 0 or values.shape[1] != limits.hidden_size:
        raise ValueError(
            f"input_embeds: must be a list of vectors of {limits.hidden_size} numbers, one a token"
        )
    # False for NaN, too.
    if not (np.abs(values) <= LARGEST_EMBEDDING).all():
        raise ValueError(
            f"input_embeds: every number must be between -{LARGEST_EMBEDDING} and {LARGEST_EMBEDDING}"
        )
    return len(values)


def _check_sampling(params: Any) -> None:
    for name in ("top_k", "min_new_tokens", "stream_interval"):
        value = getattr(params, name)
        if value is not None and value > INT32_MOST:
            raise ValueError(f"{name}: must be at most {INT32_MOST}, got {value}")
    if params.stream_interval is not None and params.stream_interval < 1:
        raise ValueError(f"stream_interval: must be at least 1, got {params.stream_interval}")
    if params.repetition_penalty < SMALLEST_REPETITION_PENALTY:
        raise ValueError(
            f"repetition_penalty: must be at least {SMALLEST_REPETITION_PENALTY}, got "
            f"{params.repetition_penalty}"
        )
    for value in (params.logit_bias or {}).values():
        if not (math.isfinite(value) and abs(value) <= LARGEST_BIAS):
            raise ValueError(f"logit_bias: must be between -{LARGEST_BIAS} and {LARGEST_BIAS}, got {value}")


def _check_positions(limits: Limits, tokenized: Any, length: int) -> None:
    for name in ("multi_item_delimiter_indices", "token_indices_to_pool"):
        positions = getattr(tokenized, name)
        if positions is None:
            continue
        if not positions or not all(0 <= position < length for position in positions):
            raise ValueError(f"{name}: must be positions of the prompt, 0 to {length - 1}")
        if not limits.pooling:
            raise ValueError(f"{name}: needs --disable-radix-cache and --chunked-prefill-size -1")
        if not getattr(tokenized, "return_logprob", True):
            raise ValueError(f"{name}: needs return_logprob")


def _check_overrides(limits: Limits, overrides: Any, length: int) -> None:
    if overrides is None:
        return
    import torch

    embeds = overrides.embeds
    if isinstance(embeds, torch.Tensor):
        if embeds.dim() != 2 or embeds.shape[1] != limits.hidden_size or not embeds.is_floating_point():
            raise ValueError(
                f"embed_overrides: must be vectors of {limits.hidden_size} numbers, got shape "
                f"{list(embeds.shape)}"
            )
        if not bool((embeds.abs() <= LARGEST_EMBEDDING).all()):
            raise ValueError(
                f"embed_overrides: every number must be between -{LARGEST_EMBEDDING} and {LARGEST_EMBEDDING}"
            )
    if not all(0 <= position < length for position in overrides.positions):
        raise ValueError(f"embed_overrides: positions must be 0 to {length - 1}")


def _check_labels(limits: Limits, labels: Any) -> None:
    if limits.labels is None or not labels:
        return
    unknown = sorted(set(labels) - limits.labels)
    if unknown:
        allowed = ", ".join(sorted(limits.labels)) or "none (--tokenizer-metrics-allowed-custom-labels)"
        raise ValueError(f"custom_labels: {unknown[0]!r} is not allowed; allowed are {allowed}")


def _check_logprobs(limits: Limits, tokenized: Any, length: int) -> None:
    if not tokenized.return_logprob:
        return
    start, each = tokenized.logprob_start_len, tokenized.top_logprobs_num
    if start < -1:
        raise ValueError(f"logprob_start_len: must be at least -1, got {start}")
    if not 0 <= each <= limits.vocab_size:
        raise ValueError(f"top_logprobs_num: must be between 0 and {limits.vocab_size}, got {each}")
    asked = len(tokenized.token_ids_logprob or ())
    # Of a session's prompt this is the end; how long all of it is, is not known here.
    session = tokenized.session_params is not None
    positions = 0 if start < 0 else limits.context_length if session else max(0, length - start)
    new = tokenized.sampling_params.max_new_tokens
    positions += limits.context_length if new is None else new
    found = min(positions, limits.context_length) * (each + asked)
    if found > MOST_LOGPROBS:
        name = "top_logprobs_num" if each > asked else "token_ids_logprob"
        raise ValueError(
            f"{name}: {each + asked} for each of {positions} tokens are {found}; at most {MOST_LOGPROBS} "
            "are allowed"
        )


def _check_session(tokenized: Any) -> None:
    session = tokenized.session_params
    if session is None:
        return
    if tokenized.input_embeds is not None:
        raise ValueError("session_params: a session takes text or input_ids, not input_embeds")
    if session.replace and session.rid is None:
        raise ValueError("session_params.replace: name the request to replace in session_params.rid")

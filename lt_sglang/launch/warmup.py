"""Prompts that run before the server is ready, so that no user waits for kernels to be compiled.

Triton compiles a kernel when it first runs, and those of lazy layers run only in prompts longer than
sink + recent; SGLang's own warm-up prompt is a few tokens long. Registered as SGLang's custom warm-up
``lighttransfer``; switched on by itself on GPUs, and by ``--warmups lighttransfer`` anywhere.

Source: sglang/srt/entrypoints/warmup.py.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import time
from typing import Any

from lt_sglang.config import CONFIG_KEY, LIST, LightTransferConfig
from lt_sglang.errors import LightTransferError
from lt_sglang.names import BACKEND

logger = logging.getLogger(__name__)

# Tokens beyond the window, so that some leave it; and what a second turn adds.
BEYOND = 64
NEW_TOKENS = 4
FLUSH_SECONDS = 60.0


def register() -> None:
    """Make the warm-up known to this process."""
    from sglang.srt.entrypoints.warmup import warmup

    warmup(BACKEND)(warm_up)


def with_warm_up(warmups: str | None) -> str:
    """SGLang's --warmups with ours among them."""
    names = warmups.split(",") if warmups else []
    return ",".join(names if BACKEND in names else [*names, BACKEND])


def prompt_lengths(lazy_tokens: int, chunk: int | None, most: int) -> list[int]:
    """Tokens of the prompts: one chunk, and more than one; only such as a server of ``most`` tokens takes.

    lazy_tokens: w_sink + w_recent. chunk: --chunked-prefill-size, None or negative if prompts are not cut.
    """
    lengths = [lazy_tokens + BEYOND]
    if chunk is not None and chunk > 0:
        lengths.append(max(chunk, lazy_tokens) + lazy_tokens + BEYOND)
    return [length for length in lengths if length + BEYOND + 2 * NEW_TOKENS < most]


def decided_together(lazy_tokens: int, chunk: int | None) -> list[int]:
    """How many prompts are sent at a time: scores compile other kernels for several that end in one chunk.

    lazy_tokens, chunk: as of ``prompt_lengths``.
    """
    most = (chunk or 0) // (lazy_tokens + BEYOND)
    return [count for count in (2, 4, 8, 16, 32) if count <= most]


async def warm_up(disaggregation_mode: str, tokenizer_manager: Any) -> None:
    """Send each prompt, then a second turn of it; then several at a time; empty the prefix cache.

    Raises:
        LightTransferError: the server did not answer; it must not become ready.
    """
    from sglang.srt.arg_groups.overrides import resolving_view

    args = resolving_view(tokenizer_manager.server_args)
    given = json.loads(args.json_model_override_args or "{}").get(CONFIG_KEY)
    if given is None:
        raise LightTransferError(f"--warmups {BACKEND}: lazy layers are not switched on")
    config = LightTransferConfig.from_dict(given)
    begun = time.monotonic()
    lengths = prompt_lengths(config.lazy_tokens, args.chunked_prefill_size, _most(tokenizer_manager))
    numbers = itertools.count(10)

    def prompt_of(length: int) -> list[int]:
        # Prompts that share no prefix; any token of any vocabulary will do.
        return [next(numbers)] + [10 + position % 50 for position in range(length - 1)]

    for length in lengths:
        prompt = prompt_of(length)
        answer = await _generate(tokenizer_manager, prompt)
        await _generate(tokenizer_manager, [*prompt, *answer, *prompt[:BEYOND]])
    scored = config.dynamic and config.score != LIST and len(lengths) > 1
    groups = decided_together(config.lazy_tokens, args.chunked_prefill_size) if scored else []
    for count in groups:
        # The short ones arrive while the long one runs, and so share a chunk.
        group = [prompt_of(lengths[1]), *(prompt_of(lengths[0]) for _ in range(count))]
        await asyncio.gather(*(_generate(tokenizer_manager, prompt) for prompt in group))
    flushed = await tokenizer_manager.flush_cache(timeout_s=FLUSH_SECONDS)
    if not flushed.success:
        raise LightTransferError(f"--warmups {BACKEND}: the prefix cache could not be emptied afterwards")
    logger.info(
        "LightTransfer: warm-up with prompts of %s tokens, up to %d together, took %.1f s",
        lengths,
        max(groups, default=1),
        time.monotonic() - begun,
    )


def _most(tokenizer_manager: Any) -> int:
    limits = (tokenizer_manager.context_len, tokenizer_manager.max_req_input_len)
    return min(int(limit) for limit in limits if limit is not None)


async def _generate(tokenizer_manager: Any, prompt: list[int]) -> list[int]:
    from sglang.srt.managers.io_struct import GenerateReqInput

    sampling = {"max_new_tokens": NEW_TOKENS, "temperature": 0, "ignore_eos": True}
    request = GenerateReqInput(input_ids=prompt, sampling_params=sampling)
    answer: list[int] = []
    async for output in tokenizer_manager.generate_request(request, None):
        answer = output["output_ids"]
    if len(answer) != NEW_TOKENS:
        raise LightTransferError(f"--warmups {BACKEND}: a prompt of {len(prompt)} tokens was not answered")
    return answer

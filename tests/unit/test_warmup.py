"""Which prompts warm a server up, and when it is done."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace
from typing import Any

import pytest
import sglang.srt.arg_groups.overrides as overrides

from lt_sglang.config import CONFIG_KEY
from lt_sglang.errors import LightTransferError
from lt_sglang.launch.warmup import (
    BEYOND,
    NEW_TOKENS,
    decided_together,
    prompt_lengths,
    warm_up,
    with_warm_up,
)
from lt_sglang.names import BACKEND
from lt_sglang.resolve import settle_runtime

LAZY = {"lazy_layers": [0, 1], "sink_tokens": 4, "recent_tokens": 60}


def test_one_prompt_in_a_chunk_and_one_in_several() -> None:
    one, more = prompt_lengths(1024, 8192, 32768)
    assert 1024 < one <= 8192 < more
    assert more > 8192 + 1024, "the second chunk is longer than the window"
    assert prompt_lengths(1024, 512, 32768)[1] > 2 * 1024
    assert prompt_lengths(1024, None, 32768) == prompt_lengths(1024, -1, 32768) == [1024 + BEYOND]


@pytest.mark.parametrize("most", [0, 1024, 1024 + 2 * BEYOND + 2 * NEW_TOKENS])
def test_a_server_too_small_for_long_prompts_needs_none(most: int) -> None:
    assert prompt_lengths(1024, 8192, most) == []
    assert prompt_lengths(1024, 8192, 1024 + 2 * BEYOND + 2 * NEW_TOKENS + 1) == [1024 + BEYOND]


def test_other_warm_ups_stay() -> None:
    assert with_warm_up(None) == with_warm_up("") == BACKEND
    assert with_warm_up("prefill_shapes") == f"prefill_shapes,{BACKEND}"
    assert with_warm_up(f"{BACKEND},prefill_shapes") == f"{BACKEND},prefill_shapes"


@pytest.mark.parametrize(
    ("device", "skip", "expected"), [("cuda", False, BACKEND), ("cuda", True, None), ("cpu", False, None)]
)
def test_switched_on_by_itself_on_a_gpu(
    device: str, skip: bool, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    declared: dict[str, Any] = {}
    args = SimpleNamespace(
        device=device,
        attention_backend=BACKEND,
        prefill_attention_backend=None,
        decode_attention_backend=None,
        skip_server_warmup=skip,
        warmups=None,
        cuda_graph_config=SimpleNamespace(prefill=SimpleNamespace(backend=None)),
        json_model_override_args=json.dumps({CONFIG_KEY: LAZY}),
    )
    monkeypatch.setattr(overrides, "resolving_view", lambda given: given)
    monkeypatch.setattr(overrides, "declare_resolution", lambda *_, **fields: declared.update(fields))
    monkeypatch.setattr(
        "sglang.srt.model_executor.cuda_graph_config.with_phase", lambda config, *_, **__: config
    )
    settle_runtime(args, lambda _: None)
    assert declared.get("warmups") == expected


class Manager:
    """A tokenizer manager whose answers have ``tokens`` tokens."""

    context_len, max_req_input_len = 4096, 4000

    def __init__(self, tokens: int, flushes: bool = True, **config: Any) -> None:
        given = {CONFIG_KEY: config or LAZY}
        self.server_args = SimpleNamespace(
            json_model_override_args=json.dumps(given), chunked_prefill_size=256
        )
        self.tokens, self.flushes = tokens, flushes
        self.asked: list[list[int]] = []
        self.open = self.most_open = 0

    async def generate_request(self, request: Any, _: Any) -> Any:
        self.asked.append(request.input_ids)
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        await asyncio.sleep(0)
        self.open -= 1
        yield {"output_ids": [7] * self.tokens}

    async def flush_cache(self, timeout_s: float) -> Any:
        return SimpleNamespace(success=self.flushes)


def test_every_prompt_has_a_second_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overrides, "resolving_view", lambda given: given)
    manager = Manager(NEW_TOKENS)
    asyncio.run(warm_up("null", manager))
    first, again, second, last = manager.asked
    assert again[: len(first) + NEW_TOKENS] == [*first, 7, 7, 7, 7] and len(again) > len(first) + NEW_TOKENS
    assert last[: len(second)] == second
    assert first[0] != second[0], "no prefix in common"


def test_scores_see_as_many_prompts_as_share_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels for two, four ... prompts are compiled before users come; a list has no scores."""
    assert decided_together(1024, 8192) == [2, 4]
    assert decided_together(64, 8192) == [2, 4, 8, 16, 32]
    assert decided_together(1024, 2048) == decided_together(1024, None) == decided_together(1024, -1) == []
    monkeypatch.setattr(overrides, "resolving_view", lambda given: given)
    windows = {"sink_tokens": 4, "recent_tokens": 28}
    manager = Manager(NEW_TOKENS, mode="dynamic", keep=1, **windows)
    asyncio.run(warm_up("null", manager))
    short, long = 32 + BEYOND, 256 + 32 + BEYOND
    assert [len(prompt) for prompt in manager.asked[4:]] == [long, short, short]
    assert manager.most_open == 3
    beginnings = [prompt[0] for prompt in (manager.asked[0], manager.asked[2], *manager.asked[4:])]
    assert len(set(beginnings)) == len(beginnings), "a hit would be no prefill"
    for config in ({"mode": "dynamic", "score": "list", "lazy_layers": [0]}, {"lazy_layers": [0]}):
        manager = Manager(NEW_TOKENS, **config, **windows)
        asyncio.run(warm_up("null", manager))
        assert len(manager.asked) == 4 and manager.most_open == 1


@pytest.mark.parametrize("manager", [Manager(0), Manager(NEW_TOKENS, flushes=False)])
def test_a_server_that_does_not_answer_must_not_start(
    manager: Manager, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(overrides, "resolving_view", lambda given: given)
    with pytest.raises(LightTransferError, match="--warmups lighttransfer"):
        asyncio.run(warm_up("null", manager))

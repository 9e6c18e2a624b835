"""lt_sglang.memory.kv_keys in a real radix cache on a CPU: who shares sinks with whom, and until when."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sglang.srt.managers.embed_types import PositionalEmbeds

from lt_sglang.memory.kv_keys import determined_by_key

from .radix_rig import SINKS, WINDOW, Rig

PROMPT = list(range(100, 140))
ALIKE = [*PROMPT[:SINKS], *range(200, 236)]  # the same first tokens, then others
EMBEDS = PositionalEmbeds(embeds=[torch.ones(2)], positions=[0])


def own_kv() -> list[Any]:
    return [
        pytest.param({"positional_embed_overrides": EMBEDS}, {}, id="positional_embed_overrides"),
        pytest.param({"input_embeds": [[0.5, 0.5]] * len(PROMPT)}, {}, id="input_embeds"),
        pytest.param({"token_type_ids": [0] * len(PROMPT)}, {}, id="token_type_ids"),
        pytest.param({"multi_item_delimiter_indices": [3, 9]}, {}, id="multi_item"),
        pytest.param({"bootstrap_host": "2.2.2.2"}, {}, id="barred from the tree"),
        pytest.param({}, {"multimodal_inputs": object()}, id="multimodal_inputs"),
        pytest.param({}, {"a_field_of_next_year": [1.0]}, id="unknown field"),
    ]


@pytest.mark.parametrize("disable", [False, True], ids=["radix", "no-radix"])
@pytest.mark.parametrize(("given", "later"), own_kv())
def test_sinks_of_a_request_with_kv_of_its_own_are_its_own(
    given: dict[str, Any], later: dict[str, Any], disable: bool
) -> None:
    rig = Rig(disable=disable)
    odd, plain, odd_too = (
        rig.request("odd", PROMPT, **given),
        rig.request("plain", ALIKE),
        rig.request("odd-too", PROMPT, **given),
    )
    for req in (odd, odd_too):
        vars(req).update(later)
        assert not determined_by_key(req)
    assert determined_by_key(plain)
    for req in (odd, plain, odd_too):
        rig.admit(req)
        rig.cache.evict_sliding_windows(req, len(PROMPT))
    sets = [rig.set_of(req) for req in (odd, plain, odd_too)]
    assert len(set(sets)) == 3 and -1 not in sets
    for req in (odd, odd_too):
        rig.retract(req)
    assert rig.sinks.used == 1, "a private set ends with its request: the next one of this name is another"
    rig.check()


def test_plain_requests_share_by_tokens_and_names() -> None:
    """extra_key (which holds the LoRA adapter) and cache_salt keep tenants apart."""
    rig = Rig(sets=8)
    tenants: list[dict[str, Any]] = [
        {},
        {"extra_key": "a"},
        {"extra_key": "b"},
        {"cache_salt": "a"},
        {"lora_id": "adapter"},
        {"extra_key": "a", "cache_salt": "a"},
    ]
    sets = []
    for number, names in enumerate(tenants):
        one = rig.prefilled(rig.request(f"one-{number}", PROMPT, **names))
        two = rig.prefilled(rig.request(f"two-{number}", ALIKE, **names))
        assert rig.set_of(one) == rig.set_of(two) >= 0
        sets.append(rig.set_of(one))
        rig.finish(one), rig.finish(two)
    assert len(set(sets)) == len(tenants)
    again = rig.request("again", PROMPT, extra_key="b")
    rig.admit(again)
    assert again.prefix_len == len(PROMPT) - 1 and rig.set_of(again) == sets[2]
    rig.check()


def test_a_barred_request_may_hit_the_tree_and_takes_the_sinks_of_what_it_hit() -> None:
    """SGLang lets it read the tree, not write it; the sinks of a prefix belong to the prefix."""
    rig = Rig()
    writer = rig.prefilled(rig.request("writer", PROMPT))
    rig.finish(writer)
    reader = rig.admit(rig.request("reader", PROMPT, bootstrap_host="2.2.2.2"))
    assert reader.prefix_len > WINDOW
    assert rig.set_of(reader) >= 0 and rig.sinks.stats.shared == 1
    rig.check()


def test_with_the_tree_disabled_sinks_end_with_their_last_user() -> None:
    rig = Rig(disable=True)
    one, two = (rig.admit(rig.request(name, tokens)) for name, tokens in (("1", PROMPT), ("2", ALIKE)))
    for req in (one, two):
        rig.cache.evict_sliding_windows(req, len(PROMPT))
    assert rig.set_of(one) == rig.set_of(two) >= 0, "running requests share"
    rig.finish(one)
    assert rig.sinks.used == 1
    rig.retract(two)
    assert rig.sinks.used == 0
    rig.check()


def test_with_the_tree_disabled_requests_share_only_sinks_of_their_own_weights() -> None:
    """Paused in place, weights updated: who ran before keeps its K and V, and nobody new takes them."""
    rig = Rig(disable=True)
    before = rig.admit(rig.request("before", PROMPT))
    captured = rig.admit(rig.request("captured", ALIKE))
    rig.cache.evict_sliding_windows(captured, len(PROMPT))
    rig.sinks.weights += 1  # LightTransferModelRunner does so
    after = rig.admit(rig.request("after", PROMPT))
    rig.cache.evict_sliding_windows(after, len(PROMPT))
    rig.cache.evict_sliding_windows(before, len(PROMPT))
    # Nobody knows any more of which weights the first tokens are that were computed meanwhile.
    assert len({rig.set_of(captured), rig.set_of(after), rig.set_of(before)}) == 3
    rig.check()


def test_with_the_tree_sinks_stay_as_prefixes_do() -> None:
    """SGLang keeps old prefixes where a weight update does not flush; their sinks stay with them."""
    rig = Rig()
    rig.finish(rig.prefilled(rig.request("old", PROMPT)))
    rig.sinks.weights += 1
    new = rig.admit(rig.request("new", PROMPT))
    assert new.prefix_len == len(PROMPT) - 1 and rig.set_of(new) >= 0
    rig.finish(new)
    rig.cache.reset()
    assert rig.sinks.used == 0

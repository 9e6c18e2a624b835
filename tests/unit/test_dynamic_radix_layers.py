"""lt_sglang.cache.radix_dynamic, a real cache on a CPU: whose layers and K and V a request may find."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any

import torch
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.mem_cache.common import checkpoint_kv_cache

from lt_sglang.cache.radix_dynamic import DynamicRadixCache
from lt_sglang.config import LightTransferConfig
from lt_sglang.layers.full_rows import FullRows
from lt_sglang.layers.layer_sets import LayerSetStore
from lt_sglang.layers.prefill import Kind, Prefill, PrefillTracker
from lt_sglang.memory.kv_keys import request_id

from .radix_rig import SINKS, WINDOW, Rig

BLOCK = SINKS + WINDOW
PROMPT = list(range(100, 160))
LAYERS = 6


class DynamicRig(Rig):
    """A rig whose requests have layer sets; a forward decides by what it is told."""

    def _build(self, params: Any) -> DynamicRadixCache:
        config = LightTransferConfig(
            (0, 4, 5), mode="dynamic", sink_tokens=SINKS, recent_tokens=WINDOW, keep=3
        )
        self.sets = LayerSetStore(40, config.lazy_layers, LAYERS, self.rows.req_to_token.shape[0], "cpu")
        self.tracker = PrefillTracker(config, self.sets, 500)
        mapping = self.allocator.full_to_swa_index_mapping
        self.full_rows = FullRows(len(mapping), "cpu")
        return DynamicRadixCache(params, self.sinks, self.tracker, self.full_rows)

    def forward(self, req: Req, scores: Sequence[float] = (1, 2, 3, 4, 5, 6)) -> Prefill:
        """The prefill of an admitted request's chunk, as LightTransferModelRunner plans and runs it."""
        (plan,) = self.tracker.begin([(request_id(req), req)])
        written = self.rows.req_to_token[plan.row, plan.prefix : plan.end].to(torch.int64)
        self.full_rows.prefill(written, [plan])
        if plan.kind == Kind.SELECT:
            values = torch.tensor(plan.laziness or tuple(map(float, scores)))
            self.sets.laziness[plan.layer_set] = values
            order = values.argsort().tolist()
            for bank, layer in enumerate(order):
                self.sets.bank_of[plan.layer_set, layer] = bank
        self.sets.bring()
        checkpoint_kv_cache(req, self.cache)
        return plan

    def prefilled(self, req: Req) -> Req:
        self.admit(req)
        self.forward(req)
        return req

    def check(self) -> None:
        super().check()
        assert not self.sets.check_integrity()

    def told(self, req: Req) -> dict[str, Any]:
        found = self.cache.describe(req)
        assert found is not None
        return found


def test_copies_of_a_prompt_are_computed_as_the_first_was() -> None:
    """n > 1 finds nothing that the same prompt decided; a longer prompt's prefix, as n = 1 would."""
    rig = DynamicRig()
    rig.finish(rig.prefilled(rig.request("first", PROMPT)))
    for number in range(3):
        copy = rig.request(f"copy-{number}", PROMPT)
        copy.sampling_params.n = 3
        rig.admit(copy)
        assert copy.prefix_len == 0
        assert rig.forward(copy).kind == Kind.SELECT
        rig.finish(copy)
        assert rig.sets.stored == 1, "thousands of copies would push out everybody's"
    repeat = rig.admit(rig.request("repeat", PROMPT))
    assert repeat.prefix_len == len(PROMPT) - 1, "n = 1 still reads what is cached, and says so"
    assert rig.told(repeat)["origin"] == "prefix"
    longer = rig.request("longer", [*PROMPT, 7, 8, 9])
    longer.sampling_params.n = 3
    assert rig.admit(longer).prefix_len == len(PROMPT)
    rig.check()


def test_who_comes_back_is_found_by_its_own_tenant_alone() -> None:
    rig = DynamicRig()
    req = rig.prefilled(rig.request("a", PROMPT, cache_salt="tenant"))
    rig.decode(req, steps=3)
    rig.retract(req)
    rig.admit(req)
    assert req.prefix_len >= len(PROMPT)
    rig.forward(req)
    found = {
        salt: list(rig.sets.find(rig.tracker.prompt_start(array("q", PROMPT), None, salt)))
        for salt in ("tenant", None)
    }
    assert found == {"tenant": [rig.sets.of(request_id(req))], None: []}
    rig.check()


def test_a_name_that_is_used_again_brings_nothing_back() -> None:
    """How many rows the last one of this name had filled before its layers were known."""
    rig = DynamicRig()
    rig.finish(rig.prefilled(rig.request("a", PROMPT)))
    short = rig.prefilled(rig.request("a", PROMPT[:10]))
    had = rig.tracker.memory_of(request_id(short), lambda: 99)
    assert had is not None and had.default and had.full_rows == 0
    rig.check()


def test_a_retracted_request_reads_its_own_set_or_none() -> None:
    """Others that begin alike may have other layers."""
    rig = DynamicRig()
    req = rig.prefilled(rig.request("a", PROMPT))
    before = rig.told(req)
    rig.decode(req, steps=3)
    rig.retract(req)
    other = rig.request("b", PROMPT)
    other.sampling_params.n = 2  # decides for itself, and is what a prompt like this finds first from now on
    rig.admit(other)
    rig.forward(other, scores=(6, 5, 4, 3, 2, 1))
    assert rig.told(other)["lazy_layers"] != before["lazy_layers"]
    rig.finish(other)
    rig.admit(req)
    assert req.prefix_len >= len(PROMPT), "its own K and V are still there"
    rig.forward(req)
    assert rig.told(req)["lazy_layers"] == before["lazy_layers"]
    rig.decode(req, steps=2)
    rig.retract(req)
    rig.cache.reset()
    rig.finish(rig.prefilled(rig.request("c", PROMPT)))
    rig.admit(req, chunk=rig.cache.chunk_limit(req))
    assert (req.prefix_len, req.extend_end) == (0, len(PROMPT)), "not the other's, though it begins alike"
    plan = rig.forward(req, scores=(6, 5, 4, 3, 2, 1))
    assert (plan.kind, plan.laziness) == (Kind.SELECT, (1, 2, 3, 4, 5, 6))
    assert rig.told(req)["lazy_layers"] == before["lazy_layers"]
    assert rig.sets.stats.decided == 3 and rig.sets.stats.inherited == 0, "coming back is not counted"
    rig.check()


def heir_of_an_heir(rig: DynamicRig) -> Req:
    """It reads 60 rows of the prompt that selected its layers, then 40 of a request that inherited them."""
    rig.finish(rig.prefilled(rig.request("first", PROMPT)))
    longer = [*PROMPT, *range(200, 240)]
    heir = rig.admit(rig.request("heir", longer))
    assert heir.prefix_len == len(PROMPT)
    rig.forward(heir)
    rig.finish(heir)
    req = rig.admit(rig.request("a", [*longer, 1, 2, 3]))
    assert req.prefix_len == len(longer)
    rig.forward(req)
    rig.decode(req, steps=2)
    return req


def test_an_heir_that_is_retracted_computes_each_row_as_it_was() -> None:
    """Only the rows that the layers were selected over had full attention, however long its prefix was."""
    rig = DynamicRig()
    req = heir_of_an_heir(rig)
    before = rig.told(req)["lazy_layers"]
    rig.retract(req)
    rig.cache.reset()
    rig.admit(req, chunk=rig.cache.chunk_limit(req))
    assert (req.prefix_len, req.extend_end) == (0, len(PROMPT))
    plan = rig.forward(req, scores=(6, 5, 4, 3, 2, 1))
    assert (plan.kind, rig.told(req)["lazy_layers"]) == (Kind.SELECT, before)
    rig.check()


def test_a_retracted_request_does_not_read_rows_that_were_computed_otherwise_since() -> None:
    rig = DynamicRig()
    req = heir_of_an_heir(rig)
    written = rig.rows.req_to_token[req.kv.req_pool_idx, 50 : len(PROMPT)].to(torch.int64)
    rig.retract(req)
    rig.admit(req)
    assert req.prefix_len > len(PROMPT), "all is still there"
    rig.forward(req)
    rig.decode(req, steps=2)
    rig.retract(req)
    # As if they had been evicted, and computed again by an heir.
    rig.full_rows.decode(written)
    rig.admit(req, chunk=rig.cache.chunk_limit(req))
    assert (req.prefix_len, req.extend_end) == (0, len(PROMPT))
    rig.check()


def test_rows_say_how_they_were_computed() -> None:
    rows = FullRows(40, "cpu")
    kinds = (Kind.STAGED, Kind.SELECT, Kind.KNOWN, Kind.SELECT)
    slots = torch.arange(39, 19, -1)
    rows.prefill(
        slots, [Prefill(kind, 1, 1, 0, extend) for kind, extend in zip(kinds, (3, 4, 5, 8), strict=True)]
    )
    found = [rows.leading(slots[at:]) for at in range(20)]
    assert found == [7, 6, 5, 4, 3, 2, 1, 0, 0, 0, 0, 0, 8, 7, 6, 5, 4, 3, 2, 1]
    rows.decode(slots[[2, 15]])
    assert (rows.leading(slots), rows.leading(slots[12:]), rows.leading(slots[:0])) == (2, 3, 0)


def test_a_retracted_short_prompt_stays_short() -> None:
    rig = DynamicRig()
    req = rig.prefilled(rig.request("a", PROMPT[:BLOCK]))
    rig.decode(req, steps=30)
    rig.retract(req)
    rig.cache.reset()
    rig.admit(req)
    assert rig.forward(req).kind == Kind.KNOWN
    assert rig.told(req)["origin"] == "default"
    rig.check()


def test_tenants_and_overrides_keep_their_layers_to_themselves() -> None:
    rig = DynamicRig()
    rig.finish(rig.prefilled(rig.request("a", PROMPT)))
    for names in ({"extra_key": "x"}, {"cache_salt": "x"}, {"lora_id": "adapter"}):
        other = rig.admit(rig.request("b", PROMPT, **names))
        assert other.prefix_len == 0
        rig.forward(other)
        assert rig.told(other)["origin"] == "prompt"
        rig.retract(other)
    odd = rig.admit(rig.request("odd", PROMPT, token_type_ids=[0]))
    rig.forward(odd)
    keys = [key for key in rig.sinks._sets if "private" in key]
    assert all(any(str(part).startswith("lt:") for part in key) for key in keys), "the set's uid is in it"
    rig.check()


def test_what_is_told_is_kept_with_the_request() -> None:
    """From the first decision on, also if it is retracted; nobody is told who did not ask."""
    rig = DynamicRig()
    asks, silent = rig.request("a", PROMPT), rig.request("b", PROMPT[:10])
    asks.sampling_params.custom_params = {"lighttransfer": True}
    for req in (asks, silent):
        rig.prefilled(req)
        rig.cache.report(req)
    first = asks.customized_info
    assert first is not None and first["lighttransfer"][0]["origin"] == "prompt"
    rig.retract(asks)
    rig.admit(asks)
    rig.forward(asks)
    rig.finish(asks), rig.finish(silent)
    assert asks.customized_info == first and silent.customized_info is None

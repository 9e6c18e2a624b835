"""Every field that could change K and V has a verdict; a new one fails here until somebody has read it."""

from __future__ import annotations

import ast
import inspect
import textwrap
from array import array

import pytest
from sglang.srt.managers.io_struct import TokenizedEmbeddingReqInput, TokenizedGenerateReqInput
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.model_executor.model_runner_components.weight_updater import WeightUpdater
from sglang.srt.sampling.sampling_params import SamplingParams

from lt_sglang.memory import kv_keys
from lt_sglang.memory.weights import CHANGING

# What reaches the scheduler under another name than it has in Req, or not at all.
RENAMED = {"input_text": "", "input_ids": "origin_input_ids", "mm_inputs": "multimodal_inputs"}
NOT_IN_REQ = {
    "session_params",  # becomes session; its tokens are in origin_input_ids
    "token_ids_logprob",
    "top_logprobs_num",
    "lora_name",
    "no_logs",
    "return_bytes",
    "return_entropy",
    "bootstrap_pair_key",
    "decode_tp_size",
    "need_wait_for_mm_inputs",
    "num_items_assigned",
    "encoder_urls",
    "pp_prefetch_ticketed",
    "received_time",
    "rids",
}
UNCHANGING = {
    "init_weights_update_group",
    "destroy_weights_update_group",
    "receive_weights_from_distributed",
}


def assigned(cls: type) -> set[str]:
    """Attributes that any method of the class, or of its bases in SGLang, assigns to self."""
    found = set()
    for base in cls.__mro__[:-1]:
        tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
        for node in ast.walk(tree):
            stored = isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
            if stored and isinstance(node.value, ast.Name) and node.value.id == "self":
                found.add(node.attr)
    properties = {name for name, value in inspect.getmembers(cls) if isinstance(value, property)}
    return found - properties


def test_every_field_of_a_request_has_one_verdict() -> None:
    req = Req("r", "", array("q", [1, 2]), SamplingParams())
    fields = set(vars(req)) | assigned(Req)
    assert not fields - kv_keys.KNOWN, "read what they do, then enter them in lt_sglang/memory/kv_keys.py"
    assert not kv_keys.IN_KEY & kv_keys.OWN_KV
    assert not (kv_keys.IN_KEY | kv_keys.OWN_KV) & kv_keys.NO_MATTER
    gone = {name for name in kv_keys.KNOWN - fields if not name.startswith("lighttransfer_")}
    assert gone <= {"encoder_cached"}, "entered, but SGLang has no such field"
    assert kv_keys.determined_by_key(req)


@pytest.mark.parametrize("cls", [TokenizedGenerateReqInput, TokenizedEmbeddingReqInput])
def test_every_field_that_reaches_the_scheduler_has_a_verdict(cls: type) -> None:
    names = {RENAMED.get(name, name) for name in cls.__struct_fields__} - {""}
    assert not names - kv_keys.KNOWN - NOT_IN_REQ


def test_every_way_to_change_weights_is_announced() -> None:
    public = {name for name in vars(WeightUpdater) if not name.startswith("_")}
    functions = {name for name in public if inspect.isfunction(vars(WeightUpdater)[name])}
    assert functions == set(CHANGING) | UNCHANGING

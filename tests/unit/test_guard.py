"""lt_sglang.guard on SGLang's own request objects, without a server."""

from __future__ import annotations

import math
from array import array
from collections import OrderedDict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.managers.embed_types import PositionalEmbeds
from sglang.srt.managers.io_struct import (
    EmbeddingReqInput,
    GenerateReqInput,
    SessionParams,
    TokenizedGenerateReqInput,
    msgpack_decode,
    msgpack_encode,
)
from sglang.srt.managers.schedule_policy import AddReqResult
from sglang.srt.sampling.sampling_params import SamplingParams

from lt_sglang import guard
from lt_sglang.guard import hooks, requests
from lt_sglang.guard.tokenized import Limits, check_tokenized

VOCABULARY, HIDDEN = 300, 8
TOO_MANY = dict.fromkeys(map(str, range(requests.MOST_NAMED + 1)), 1.0)
LIMITS = Limits(vocab_size=VOCABULARY, hidden_size=HIDDEN, takes_embeds=True)
NORMALIZE = GenerateReqInput.normalize_batch_and_arguments


def sampling(**given: Any) -> SamplingParams:
    """Sampling parameters as the tokenizer's process sends them."""
    params = SamplingParams(**given)
    params.normalize(SimpleNamespace(encode=lambda text, **more: list(text)))
    return params


def message(**given: Any) -> TokenizedGenerateReqInput:
    """A good request, tokenized, but for ``given``."""
    values: dict[str, Any] = {
        "rid": "r",
        "input_text": "",
        "input_ids": array("q", [1, 2, 3]),
        "input_embeds": None,
        "mm_inputs": None,
        "token_type_ids": None,
        "sampling_params": sampling(),
        "return_logprob": False,
        "logprob_start_len": -1,
        "top_logprobs_num": 0,
        "token_ids_logprob": None,
        "stream": False,
    }
    return TokenizedGenerateReqInput(**{**values, **given})


def check(limits: Limits = LIMITS, obj: Any = None, **given: Any) -> None:
    """What the guard says of a request."""
    check_tokenized(limits, obj or SimpleNamespace(), message(**given))


FROM_0 = {"logprob_start_len": 0}
GOOD: list[dict[str, Any]] = [
    {},
    {"input_ids": array("q", [0, VOCABULARY - 1])},
    {"return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": VOCABULARY},
    {"return_logprob": True, "top_logprobs_num": 20, "input_ids": array("q", [1] * 100_000), **FROM_0},
    {"return_logprob": True, "top_logprobs_num": 300, "input_ids": array("q", [1] * 200_000)},
    {"return_logprob": True, "token_ids_logprob": [5] * 16_000},
    # Ignored by the scheduler where no log-probabilities are asked for.
    {"logprob_start_len": -2, "top_logprobs_num": -1},
    {"sampling_params": sampling(stop_token_ids=[0, VOCABULARY - 1])},
    # Never sent; test_stop_tokens_that_cannot_come_are_left_out.
    {"sampling_params": sampling(stop_token_ids=[VOCABULARY])},
    {"sampling_params": sampling(stop_token_ids=[-1])},
    {"sampling_params": sampling(logit_bias={"0": -100.0, "5": 100.0}, top_k=2**31 - 1)},
    {"sampling_params": sampling(custom_params={"lighttransfer": True, "a": [1, 2], "b": {"c": 1.5}})},
    {"input_ids": array("q"), "session_params": SessionParams(id="s")},
    {"session_params": SessionParams(id="s", rid="r", replace=True)},
    {"input_ids": None, "input_embeds": [[0.5] * HIDDEN] * 3},
    {"positional_embed_overrides": PositionalEmbeds([torch.ones(HIDDEN)], [2])},
    {"bootstrap_room": 5, "bootstrap_port": 80},
]
# So many tokens are asked about: of a prompt, of an answer, of what a session has already.
LONG: dict[str, Any] = {"input_ids": array("q", [1] * 14_000), "logprob_start_len": 0}
ENDLESS: dict[str, Any] = {"sampling_params": sampling(max_new_tokens=None)}
CONTINUED: dict[str, Any] = {"session_params": SessionParams(id="s"), "logprob_start_len": 0}
BAD: list[tuple[str, dict[str, Any]]] = [
    ("input_ids", {"input_ids": array("q", [1, -1])}),
    ("input_ids", {"input_ids": array("q", [VOCABULARY])}),
    ("input_ids, text", {"input_ids": array("q")}),
    ("input_ids, text", {"input_ids": array("q"), "session_params": SessionParams()}),
    ("logprob_start_len", {"return_logprob": True, "logprob_start_len": -2}),
    ("logprob_start_len", {"return_logprob": True, "logprob_start_len": "0"}),
    ("top_logprobs_num", {"return_logprob": True, "top_logprobs_num": VOCABULARY + 1}),
    ("top_logprobs_num", {"return_logprob": True, "top_logprobs_num": -1}),
    ("top_logprobs_num", {"return_logprob": True, "top_logprobs_num": 300, **LONG}),
    ("top_logprobs_num", {"return_logprob": True, "top_logprobs_num": 300, **ENDLESS}),
    ("top_logprobs_num", {"return_logprob": True, "top_logprobs_num": 300, **CONTINUED}),
    ("token_ids_logprob", {"return_logprob": True, "token_ids_logprob": [5] * 30_000, **LONG}),
    ("token_ids_logprob", {"return_logprob": True, "token_ids_logprob": [5] * 17_000}),
    ("top_k", {"sampling_params": sampling(top_k=2**31)}),
    ("min_new_tokens", {"sampling_params": sampling(max_new_tokens=None, min_new_tokens=2**31)}),
    ("stream_interval", {"sampling_params": sampling(stream_interval=-1)}),
    ("repetition_penalty", {"sampling_params": sampling(repetition_penalty=1e-40)}),
    ("logit_bias", {"sampling_params": sampling(logit_bias={"1": math.inf})}),
    ("logit_bias", {"sampling_params": sampling(logit_bias={"1": math.nan})}),
    ("logit_bias", {"sampling_params": sampling(logit_bias={"1": 1e39})}),
    ("sampling_params.temperature", {"sampling_params": sampling(temperature=0.5, ignore_eos="x")}),
    ("bootstrap_host", {"bootstrap_host": "2.2.2.2"}),
    ("token_indices_to_pool", {"token_indices_to_pool": [3]}),
    ("token_indices_to_pool", {"token_indices_to_pool": []}),
    ("token_indices_to_pool", {"token_indices_to_pool": [1]}),
    ("multi_item_delimiter_indices", {"multi_item_delimiter_indices": [-1]}),
    ("input_embeds", {"input_ids": None, "input_embeds": [[0.5] * (HIDDEN + 1)]}),
    ("input_embeds", {"input_ids": None, "input_embeds": [[0.5] * HIDDEN, [0.5]]}),
    ("input_embeds", {"input_ids": None, "input_embeds": [[math.nan] * HIDDEN]}),
    ("input_embeds", {"input_ids": None, "input_embeds": [[1e7] * HIDDEN]}),
    ("input_embeds", {"input_ids": None, "input_embeds": []}),
    ("embed_overrides", {"positional_embed_overrides": PositionalEmbeds([torch.ones(HIDDEN + 1)], [0])}),
    ("embed_overrides", {"positional_embed_overrides": PositionalEmbeds([torch.ones(HIDDEN)], [3])}),
    (
        "embed_overrides",
        {"positional_embed_overrides": PositionalEmbeds([torch.full((HIDDEN,), math.nan)], [0])},
    ),
    ("session_params.replace", {"session_params": SessionParams(id="s", replace=True)}),
    ("session_params.id", {"session_params": SessionParams(id=5)}),  # type: ignore[arg-type]
    ("session_params", {"session_params": SessionParams(id="s"), "input_embeds": [[0.5] * HIDDEN]}),
    ("priority", {"priority": "high"}),
    ("priority", {"priority": 2**70}),
    ("cache_salt", {"cache_salt": 5}),
]


@pytest.mark.parametrize("given", GOOD, ids=lambda given: ",".join(given) or "plain")
def test_what_works_passes(given: dict[str, Any]) -> None:
    check(**given)


@pytest.mark.parametrize(("name", "given"), BAD, ids=[f"{name}-{i}" for i, (name, _) in enumerate(BAD)])
def test_what_ends_the_scheduler_is_refused_by_name(name: str, given: dict[str, Any]) -> None:
    with pytest.raises(ValueError) as caught:
        check(**given)
    sentence = str(caught.value)
    field = name if "temperature" not in name else "sampling_params.ignore_eos"
    # Encoding errors of integers beyond 64 bits do not say where.
    assert sentence.startswith((f"{field}:", "request:")), sentence
    assert "\n" not in sentence and "$[" not in sentence


@pytest.mark.parametrize("name", ["image_data", "video_data", "audio_data"])
def test_what_a_model_of_text_cannot_read_is_refused_by_name(name: str) -> None:
    for nothing in (None, "", [], [None], [[None], [""]]):
        check(obj=SimpleNamespace(**{name: nothing}))
    for something in ("x", b"x", {"url": "x"}, ["x"], [[None, "x"]]):
        with pytest.raises(ValueError, match=f"^{name}: this model reads text only"):
            check(obj=SimpleNamespace(**{name: something}))
        check_tokenized(LIMITS, SimpleNamespace(**{name: something}), message(mm_inputs=SimpleNamespace()))


def test_the_message_is_not_changed() -> None:
    sent = message(input_ids=array("q", [1, 2]), cache_salt="s")
    before = msgpack_encode(sent)
    check_tokenized(LIMITS, SimpleNamespace(), sent)
    assert msgpack_encode(sent) == before
    assert list(msgpack_decode(before).input_ids) == [1, 2]


def test_float32_and_float16_weights_take_no_embeds() -> None:
    limits = Limits(vocab_size=VOCABULARY, hidden_size=HIDDEN, takes_embeds=False)
    with pytest.raises(ValueError, match=r"^input_embeds: only models in bfloat16"):
        check(limits, input_ids=None, input_embeds=[[0.5] * HIDDEN])


def test_what_a_server_was_started_for_is_not_refused() -> None:
    limits = Limits(VOCABULARY, HIDDEN, True, pooling=True, labels=frozenset({"team"}))
    check(limits, SimpleNamespace(custom_labels={"team": "a"}), bootstrap_room=1)
    check(limits, token_indices_to_pool=[0, 2], return_logprob=True)
    with pytest.raises(ValueError, match=r"^custom_labels: 'model_name' is not allowed; allowed are team"):
        check(limits, SimpleNamespace(custom_labels={"model_name": "a"}))
    check(LIMITS, SimpleNamespace(custom_labels={"ignored": "where metrics are off"}))


def generate(**given: Any) -> GenerateReqInput:
    """A request as /generate makes it, checked and normalized."""
    obj = GenerateReqInput(**{"input_ids": [1, 2], **given})
    requests.normalize(NORMALIZE.__wrapped__ if hasattr(NORMALIZE, "__wrapped__") else NORMALIZE, obj)
    return obj


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"input_ids": [[1], [2, 3]], "sampling_params": {"n": 2, "temperature": 1}},
        {"input_ids": [[1], [2]], "sampling_params": [{"temperature": 0}, {"stop": ["a", "b"]}]},
        {"input_ids": [[1]] * 5000},
        {"sampling_params": {"stop_token_ids": [1, None], "stop": None, "json_schema": ""}},
        {"rid": "HEALTH_CHECK_a", "input_ids": [0], "log_metrics": False},
        {"input_ids": None, "text": ["a", "b"], "rid": ["x", "y"]},
        {"sampling_params": {"n": requests.MOST_ANSWERS}},
    ],
)
def test_requests_that_work_are_normalized(given: dict[str, Any]) -> None:
    generate(**given)


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("sampling_params.temperature", {"sampling_params": {"temperature": "hot"}}),
        ("sampling_params.max_new_tokens", {"sampling_params": {"max_new_tokens": 1.5}}),
        ("sampling_params.max_new_tokens", {"sampling_params": {"max_new_tokens": 2**70}}),
        ("sampling_params.n", {"sampling_params": {"n": True}}),
        ("sampling_params.stop", {"sampling_params": {"stop": [5]}}),
        ("sampling_params.custom_params", {"sampling_params": {"custom_params": {"a": {"b": [[1]]}}}}),
        ("sampling_params.json_schema", {"sampling_params": {"json_schema": {"type": "string"}}}),
        ("sampling_params.stop_token_ids", {"sampling_params": {"stop_token_ids": ["x"]}}),
        ("sampling_params.stop_token_ids: has", {"sampling_params": {"stop_token_ids": [1] * (1 + 2**19)}}),
        ("sampling_params.logit_bias: has", {"sampling_params": {"logit_bias": TOO_MANY}}),
        ("sampling_params", {"sampling_params": {"is_normalized": True}}),
        ("sampling_params", {"sampling_params": {"no_such": 1}}),
        ("sampling_params", {"sampling_params": []}),
        ("sampling_params", {"sampling_params": [None]}),
        ("n", {"sampling_params": {"n": 0}}),
        ("n", {"sampling_params": {"n": requests.MOST_ANSWERS + 1}}),
        ("n", {"input_ids": [[1]] * 3000, "sampling_params": {"n": 2}}),
        ("stop_regex", {"sampling_params": {"stop_regex": ["a", "(a+)+b"]}}),
        ("lora_id", {"lora_id": "x"}),
        ("http_worker_ipc", {"http_worker_ipc": "ipc:///tmp/x"}),
        ("rid", {"rid": "HEALTH_CHECK_a"}),
        ("rid", {"rid": ["a", 5], "input_ids": [[1], [2]]}),
        ("text", {"input_ids": None, "text": "\ud800"}),
        ("text", {"input_ids": None, "text": [5]}),
        ("positional_embed_overrides", {"positional_embed_overrides": {"embeds": [], "positions": []}}),
        ("the fields of this request", {"input_ids": [[1], [2]], "return_logprob": [True]}),
        ("the fields of this request", {"input_ids": [[1], [2]], "lora_path": ["a"]}),
        ("the fields of this request", {"input_ids": None, "input_embeds": []}),
    ],
)
def test_requests_that_sglang_stumbles_over_are_refused_by_name(name: str, given: dict[str, Any]) -> None:
    with pytest.raises(ValueError) as caught:
        generate(**given)
    assert str(caught.value).startswith(name), caught.value


def test_a_batch_of_embeddings_needs_a_list_of_names() -> None:
    stock = EmbeddingReqInput.normalize_batch_and_arguments
    with pytest.raises(ValueError, match=r"^the fields of this request do not fit"):
        requests.normalize(getattr(stock, "__wrapped__", stock), EmbeddingReqInput(text=["a", "b"], rid="a"))


@pytest.mark.parametrize(
    ("first", "second", "together"), [(0, 0, 1), (1, 1, 1), (0, 1, 0), (1, 0, 0), (None, 1, 1)]
)
def test_vectors_and_tokens_are_not_prefilled_together(first: int | None, second: int, together: int) -> None:
    def req(embeds: int) -> SimpleNamespace:
        return SimpleNamespace(input_embeds=[[0.5]] if embeds else None)

    adder = SimpleNamespace(can_run_list=[] if first is None else [req(first)])
    added: list[Any] = []

    def stock(adder: Any, req: Any, *args: Any) -> AddReqResult:
        added.append((req, args))
        return AddReqResult.CONTINUE

    result = hooks.admit_alike(stock, adder, req(second), False, None)
    assert result == (AddReqResult.CONTINUE if together else AddReqResult.OTHER)
    assert len(added) == together


def test_the_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    for value, on in (("off", False), ("0", False), ("no", False), ("on", True), ("", True)):
        monkeypatch.setenv(guard.SWITCH, value)
        assert guard.is_on() == on
    monkeypatch.setenv(guard.SWITCH, "off")
    obj = GenerateReqInput(input_ids=[1], rid="HEALTH_CHECK_a")
    manager = SimpleNamespace(server_args=requested())
    hooks.generate_request(lambda manager, obj, request: None, manager, obj)
    hooks.normalize_request(getattr(NORMALIZE, "__wrapped__", NORMALIZE), obj)
    assert obj.is_single


def requested(backend: str = "lighttransfer") -> Any:
    """Server arguments that ask for a backend."""
    return SimpleNamespace(
        attention_backend=backend, prefill_attention_backend=None, decode_attention_backend=None
    )


@pytest.mark.parametrize(("backend", "ours"), [("lighttransfer", True), ("fa3", False)])
def test_a_stock_engine_beside_ours_is_not_guarded(backend: str, ours: bool) -> None:
    manager = SimpleNamespace(
        server_args=requested(backend),
        lt_limits=LIMITS,
        tokenizer=None,
        context_len=9,
        allow_auto_truncate=False,
    )
    obj = GenerateReqInput(input_ids=[1], rid="HEALTH_CHECK_a")
    seen: list[Any] = []
    hooks.generate_request(lambda *given: seen.append(given), manager, obj, "request")
    assert seen == [(manager, obj, "request")]
    stock = getattr(NORMALIZE, "__wrapped__", NORMALIZE)
    bad = message(input_ids=array("q", [VOCABULARY]))
    if ours:
        with pytest.raises(ValueError, match=r"^rid:"):
            hooks.normalize_request(stock, obj)
        with pytest.raises(ValueError, match=r"^input_ids:"):
            hooks.create_tokenized(lambda *given: bad, manager, obj)
        return
    hooks.normalize_request(stock, obj)
    assert obj.is_single and not hasattr(obj, "lt_families")
    assert hooks.create_tokenized(lambda *given: bad, manager, obj) is bad


@pytest.mark.parametrize(("given", "left"), [([-1, 5, VOCABULARY], {5}), ([VOCABULARY], set()), (None, None)])
def test_stop_tokens_that_cannot_come_are_left_out(given: list[int] | None, left: set[int] | None) -> None:
    """With min_new_tokens in the batch, SGLang's scheduler ends at one outside the vocabulary."""
    manager = SimpleNamespace(server_args=requested(), lt_limits=LIMITS)
    made = message(sampling_params=sampling(stop_token_ids=given))
    assert hooks.create_tokenized(lambda *given: made, manager, SimpleNamespace()) is made
    assert made.sampling_params.stop_token_ids == left


def test_compiled_grammars_are_kept_up_to_a_number() -> None:
    from sglang.srt.constrained.base_grammar_backend import BaseGrammarBackend
    from sglang.srt.constrained.reasoner_grammar_backend import ReasonerGrammarBackend

    stock = BaseGrammarBackend.set_cache
    stock = getattr(stock, "__wrapped__", stock)
    backend: Any = BaseGrammarBackend()
    for number in range(hooks.MOST_GRAMMARS):
        hooks.set_grammar(stock, backend, ("regex", str(number)), number)
    hooks.set_grammar(stock, backend, ("regex", "0"), "again")
    assert len(backend.cache) == hooks.MOST_GRAMMARS and backend.cache["regex", "0"] == "again"
    hooks.set_grammar(stock, backend, ("regex", "new"), "new")
    assert backend.cache == {("regex", "new"): "new"}

    # SGLang's, where a model reasons first, resets its own cache alone.
    reasoning: Any = object.__new__(ReasonerGrammarBackend)
    BaseGrammarBackend.__init__(reasoning)
    reasoning.grammar_backend, reasoning._budget_variant_keys = backend, OrderedDict()
    backend.cache.update({("regex", str(number)): number for number in range(3)})
    reasoning.cache.update({("regex", str(number)): number for number in range(hooks.MOST_GRAMMARS)})
    hooks.set_grammar(stock, reasoning, ("regex", "new"), "new")
    assert reasoning.cache == {("regex", "new"): "new"} and not backend.cache

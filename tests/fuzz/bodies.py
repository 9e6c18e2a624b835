"""Bodies made from SGLang's own OpenAPI: as schemathesis makes them, and mixed into one that works."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from schemathesis.generation import GenerationMode

# Fields that decide how long an answer is. Long ones are no fault, and would take the test's time.
LENGTHS = ("max_new_tokens", "max_tokens", "max_completion_tokens", "max_output_tokens", "num_predict", "n")
LONGEST = 8
MESSAGES = [{"role": "user", "content": "good morning"}]
# A body that works, for each route that makes a request of the engine's, and how often it is drawn.
WORKING: Mapping[str, tuple[int, dict[str, Any]]] = {
    "/generate": (12, {"input_ids": [5, 6, 7, 8], "sampling_params": {"max_new_tokens": 4}}),
    "/v1/completions": (6, {"model": "default", "prompt": "good morning", "max_tokens": 4}),
    "/v1/chat/completions": (6, {"model": "default", "messages": MESSAGES, "max_tokens": 4}),
    "/invocations": (2, {"model": "default", "messages": MESSAGES, "max_tokens": 4}),
    "/v1/responses": (4, {"model": "default", "input": "good morning", "max_output_tokens": 4}),
    "/v1/messages": (4, {"model": "default", "messages": MESSAGES, "max_tokens": 4}),
    "/v1/score": (4, {"model": "default", "query": [5, 6], "items": [[7]], "label_token_ids": [8, 9]}),
    "/v1/embeddings": (3, {"model": "default", "input": "good morning"}),
    "/v1/rerank": (2, {"query": "good", "documents": ["morning", "evening"]}),
    "/encode": (3, {"text": "good morning"}),
    "/classify": (2, {"text": "good morning"}),
    "/api/generate": (
        2,
        {"model": "default", "prompt": "good", "stream": False, "options": {"num_predict": 4}},
    ),
    "/api/chat": (
        2,
        {"model": "default", "messages": MESSAGES, "stream": False, "options": {"num_predict": 4}},
    ),
    "/vertex_generate": (
        2,
        {"instances": [{"text": "good"}], "parameters": {"sampling_params": {"max_new_tokens": 4}}},
    ),
}
# Of the sampling parameters, which the schema knows as an object without names.
SAMPLING = (
    *(
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "n",
        "min_new_tokens",
        "max_new_tokens",
        "stop",
        "stop_regex",
    ),
    *("stop_token_ids", "frequency_penalty", "presence_penalty", "repetition_penalty", "ignore_eos", "regex"),
    *("ebnf", "json_schema", "structural_tag", "logit_bias", "custom_params", "sampling_seed", "beam_width"),
    *("stream_interval", "skip_special_tokens", "no_stop_trim", "spaces_between_special_tokens", "watermark"),
)
HEADERS = (
    *(
        "x-override-rid",
        "x-override-bootstrap-host",
        "x-override-bootstrap-port",
        "x-override-bootstrap-room",
    ),
    *("x-override-conversation-id", "x-override-routed-dp-rank", "x-override-disagg-prefill-dp-rank"),
    "x-override-priority",
)
EDGES = st.sampled_from(
    [
        None,
        True,
        "",
        "a",
        0,
        -1,
        1,
        2,
        3.5,
        -2.5,
        1e-40,
        1e39,
        2**31,
        2**40,
        2**63,
        2**70,
        -(2**63),
        [],
        [[]],
        [-1],
    ]
    + [[1.5], ["x"], {}, {"a": [[1]]}, {"5": 1e39}, "\ud800", "(", "2.2.2.2", "HEALTH_CHECK_x"]
)
WORDS = st.text(st.characters(codec="latin-1", exclude_characters="\r\n\0"), max_size=8).map(str.strip)


@dataclass(frozen=True)
class Shot:
    """One fuzzed request."""

    method: str
    route: str
    data: bytes
    headers: Mapping[str, str] = field(default_factory=dict)


def operations(openapi: dict[str, Any], wanted: Callable[[str, str], bool]) -> list[tuple[int, Any]]:
    """The operations of a schema with how often each is drawn. wanted: asked of method and path."""
    found = [result.ok() for result in schemathesis.openapi.from_dict(openapi).get_all_operations()]
    chosen = [operation for operation in found if wanted(operation.method.upper(), operation.path)]
    return [(WORKING.get(operation.path, (1, {}))[0], operation) for operation in chosen]


@st.composite
def shots(draw: st.DrawFn, operation: Any, likely: tuple[str, ...]) -> Shot:
    """Requests for one operation. likely: fields of its body that its schema names."""
    case = draw(operation.as_strategy(generation_mode=GenerationMode.POSITIVE))
    made = case.body if isinstance(case.body, dict) else {}
    _, working = WORKING.get(operation.path, (1, {}))
    body: Any = case.body if isinstance(case.body, (dict, list, str, int, float)) else None
    if working and draw(st.integers(0, 9)) > 0:
        names = draw(st.lists(st.sampled_from(likely), max_size=3)) if likely else []
        body = json.loads(json.dumps(working))
        for name in names:
            body[name] = made[name] if name in made and draw(st.booleans()) else draw(EDGES)
        _sample(draw, body)
    if working and isinstance(body, dict):
        # Without one, an answer is as long as the context.
        for name in ("max_tokens", "max_completion_tokens", "max_output_tokens"):
            if body.get(name) is None:
                body[name] = LONGEST
        body.setdefault("options", {"num_predict": LONGEST})
    headers = {name: draw(WORDS) for name in draw(st.lists(st.sampled_from(HEADERS), max_size=1))}
    path = case.formatted_path
    return Shot(operation.method.upper(), path, json.dumps(_short(body)).encode(), headers)


def _sample(draw: st.DrawFn, body: dict[str, Any]) -> None:
    params = body.get("sampling_params")
    if isinstance(params, dict):
        for name in draw(st.lists(st.sampled_from(SAMPLING), max_size=2)):
            params[name] = draw(st.one_of(EDGES, st.floats(), st.integers(), st.text(max_size=8)))


def _short(value: Any) -> Any:
    """The same body, its answers short."""
    if isinstance(value, list):
        return [_short(item) for item in value]
    if not isinstance(value, dict):
        return value
    small = {name: _short(item) for name, item in value.items()}
    for name in LENGTHS:
        length = small.get(name)
        if name in small and length is None and name != "n":
            small[name] = LONGEST
        if isinstance(length, (int, float)) and LONGEST < length < 10**6:
            small[name] = LONGEST
    return small


def each_shot(
    openapi: dict[str, Any], operation: Any, count: int, number: int, send: Callable[[Shot], None]
) -> None:
    """Call ``send`` with ``count`` requests for one operation, made from seed ``number``."""
    likely = tuple(sorted(field_names(openapi, operation)))

    @seed(number)
    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        # No shrinking: it would send the killer again and again to a server that is gone.
        phases=[Phase.generate],
        print_blob=False,
    )
    @given(shot=shots(operation, likely))
    def run(shot: Shot) -> None:
        send(shot)

    run()


def field_names(openapi: dict[str, Any], operation: Any) -> Iterator[str]:
    """The fields of an operation's JSON body, by its schema."""
    content = (
        openapi["paths"][operation.path][operation.method.lower()].get("requestBody", {}).get("content", {})
    )
    for media in content.values():
        schema = media.get("schema", {})
        for _ in range(3):
            reference = schema.get("$ref")
            if reference is None:
                break
            schema = openapi["components"]["schemas"][reference.rpartition("/")[2]]
        yield from schema.get("properties", {})

"""One static server with many of SGLang's features on (specs.FEATURE_FLAGS), held against the reference.

LoRA, priorities with preemption, salts, sessions, pauses, cache events. Other
schedule and eviction policies run on the servers of test_parity.py, test_tp2.py and test_dynamic.py.
"""

from __future__ import annotations

import random
import time
from typing import Any

import msgspec
import pytest
import zmq

from . import storm
from .adapters import ADAPTERS, adapter_folder
from .feature_flags import KV_EVENTS
from .prompts import random_prompt
from .reference import Reference
from .server import Server
from .specs import FEATURES, LAZY_SERVERS
from .together import Running, greedy, pause_again_and_again, send

pytestmark = [pytest.mark.engine, pytest.mark.served_by(FEATURES)]

LAZY = LAZY_SERVERS[FEATURES]


@pytest.fixture(scope="module")
def references() -> dict[str | None, Reference]:
    """By adapter; None: the base model."""
    folder = LAZY.model()
    paths = {None: None, **{name: adapter_folder(folder, name) for name in ADAPTERS}}
    return {
        name: Reference(folder, LAZY.layers, LAZY.sinks, LAZY.recent, adapter=path)
        for name, path in paths.items()
    }


@pytest.fixture(scope="module")
def reference(references: dict[str | None, Reference]) -> Reference:
    """The base model's."""
    return references[None]


def test_adapters(server: Server, references: dict[str | None, Reference]) -> None:
    """The same prompts with each adapter and without, at once, then cached: each reads its own K and V."""
    rng = random.Random(1)
    prompts = [random_prompt(length, rng) for length in (30, 64, 200, 700)]
    jobs = [(prompt, 24, {"lora_path": name}) for prompt in prompts for name in references]
    server.flush_cache()
    replies = send(server, jobs)
    again = {name: [server.generate(prompts[2], 24, lora_path=name) for _ in range(2)] for name in references}
    for name, reference in references.items():
        outputs = [
            reply.tokens for job, reply in zip(jobs, replies, strict=True) if job[2]["lora_path"] == name
        ]
        reference.compare(prompts, outputs).assert_equal()
        assert again[name][1].cached > 150, "the adapter's own K and V are found"
        reference.compare([prompts[2]] * 2, [reply.tokens for reply in again[name]]).assert_equal()
        if name is not None:
            assert references[None].compare(prompts, outputs).wrong, "the adapter changes nothing"


@pytest.mark.parametrize("field", ["cache_salt", "extra_key"])
def test_salted_prompts_are_not_shared(field: str, server: Server, reference: Reference) -> None:
    """The prompt of one salt or key is a miss for another and a hit for its own."""
    prompt = random_prompt(300, random.Random(2))
    server.flush_cache()
    replies = [
        server.generate(prompt, 16, **({field: salt} if salt else {})) for salt in ("a", "b", None, "a")
    ]
    assert [reply.cached > 200 for reply in replies] == [False, False, False, True], replies
    reference.compare([prompt] * 4, [reply.tokens for reply in replies]).assert_equal()


def test_priorities_preempt(server: Server, reference: Reference) -> None:
    """Urgent requests throw running ones out; all of them finish, and finish right."""
    rng = random.Random(3)
    slow = [(random_prompt(rng.randint(20, 400), rng), 160, {"priority": 0}) for _ in range(10)]
    urgent = [(random_prompt(rng.randint(20, 400), rng), 8, {"priority": 10}) for _ in range(6)]
    with Running(server, slow) as running:
        running.wait_for_tokens()
        replies = send(server, urgent)
        assert not running.finished, "no urgent request was served before a slow one had ended"
        outputs = running.outputs()
    reference.compare([job[0] for job in slow], outputs).assert_equal()
    reference.compare([job[0] for job in urgent], [reply.tokens for reply in replies]).assert_equal()


@pytest.mark.parametrize("mode", ["in_place", "retract"])
def test_paused_and_continued(mode: str, server: Server, reference: Reference) -> None:
    """A pause keeps what runs, or throws it out; it goes on as if nothing had been."""
    rng = random.Random(4)
    jobs = [(random_prompt(length, rng), 200, {}) for length in (5, 70, 300, 900, 1500)]
    with Running(server, jobs) as running:
        running.wait_for_tokens()
        assert pause_again_and_again(server, running, mode, 3) > 0, "nothing was left to be paused"
        outputs = running.outputs()
    reference.compare([job[0] for job in jobs], outputs).assert_equal()
    storm.assert_all_returned(server)


def test_paused_with_abort(server: Server) -> None:
    """A pause that aborts ends every request, and gives everything back."""
    rng = random.Random(5)
    jobs = [(random_prompt(length, rng), 400, {}) for length in (5, 70, 300, 900)]
    with Running(server, jobs) as running:
        running.wait_for_all()  # one that comes later would wait for the end of the pause
        server.post("/pause_generation", {"mode": "abort"}).raise_for_status()
        assert all(len(output) < 400 for output in running.outputs())
    server.post("/continue_generation", {}).raise_for_status()
    storm.assert_all_returned(server)


def test_sessions(server: Server, reference: Reference) -> None:
    """Turns go on where a turn ended, behind its prompt, or at an offset; its K and V are found."""
    rng = random.Random(6)
    session = server.post("/open_session", {"capacity_of_str_len": 10000}).json()

    def ask(turn: list[int], whole: list[int], **params: Any) -> dict[str, Any]:
        body = {"input_ids": turn, "session_params": {"id": session, **params}, "sampling_params": greedy(24)}
        answer = server.post("/generate", body).json()
        assert answer["meta_info"]["prompt_tokens"] == len(whole), answer["meta_info"]
        reference.compare([whole], [answer["output_ids"]]).assert_equal()
        return answer

    first = random_prompt(150, rng)
    answer = ask(first, first)
    whole = [*first, *answer["output_ids"]]
    parent = answer["meta_info"]["id"]
    cached = 0
    for _ in range(3):
        turn = random_prompt(30, rng)
        answer = ask(turn, [*whole, *turn], rid=answer["meta_info"]["id"])
        cached += answer["meta_info"]["cached_tokens"]
        whole = [*whole, *turn, *answer["output_ids"]]
    assert cached > 400
    turn = random_prompt(70, rng)
    ask(turn, [*first, *turn], rid=parent, drop_previous_output=True)
    ask(turn, [*first[:100], *turn], rid=parent, offset=100)
    ask(turn, [*first, *whole[150:174], *turn], rid=parent, replace=True)
    server.post("/close_session", {"session_id": session}).raise_for_status()
    gone = {"input_ids": turn, "session_params": {"id": session}, "sampling_params": greedy(2)}
    refused = server.post("/generate", gone)
    assert refused.status_code == 400 and session in refused.text
    storm.assert_all_returned(server)


def test_embeddings_in_place_of_tokens_are_refused(server: Server) -> None:
    """The tree is by token ids, of which such a prompt has none."""
    body = {"input_embeds": [[0.5] * 64] * 100, "sampling_params": greedy(2)}
    answer = server.post("/generate", body)
    assert answer.status_code == 400 and "input_embeds" in answer.text
    server.assert_healthy()


# Fields and headers meant for deployments that are not served here.
ELSEWHERE: list[tuple[dict[str, Any], dict[str, str]]] = [
    ({"bootstrap_host": "2.2.2.2", "bootstrap_port": 9, "bootstrap_room": 1}, {}),
    ({"routed_dp_rank": 0}, {}),
    ({"data_parallel_rank": 0}, {}),
    ({"conversation_id": "c", "routing_key": "k"}, {}),
    ({}, {"x-override-rid": "r", "x-override-priority": "2", "x-override-conversation-id": "c"}),
    ({}, {"x-override-bootstrap-host": "2.2.2.2", "x-override-bootstrap-room": "7"}),
    ({}, {"x-override-routed-dp-rank": "0", "x-override-disagg-prefill-dp-rank": "0"}),
    ({"multi_item_delimiter_indices": [10, 20]}, {}),
    ({"token_indices_to_pool": [0, 1]}, {}),
    ({"decode_tp_size": 1}, {}),
]


def test_fields_that_change_no_token(server: Server, reference: Reference) -> None:
    """Answered as without them, or refused."""
    prompt = random_prompt(200, random.Random(12))
    outputs = []
    for fields, headers in ELSEWHERE:
        body = {"input_ids": prompt, "sampling_params": greedy(16), **fields}
        answer = server.post("/generate", body, headers=headers)
        assert answer.status_code in (200, 400), (fields, headers, answer.text)
        if answer.status_code == 200:
            outputs.append(answer.json()["output_ids"])
    reference.compare([prompt] * len(outputs), outputs).assert_equal()
    storm.assert_all_returned(server)


def test_cache_events(server: Server) -> None:
    """What --kv-events-config publishes adds up to the tree: a prompt stored, all cleared by a flush."""
    rng = random.Random(14)
    prompt = random_prompt(500, rng)
    with zmq.Context() as context, context.socket(zmq.SUB) as events:
        events.connect(KV_EVENTS)
        events.subscribe("")
        server.flush_cache()
        time.sleep(0.5)  # a subscription takes its time, and says nothing
        server.generate(prompt, 4)
        _drain(events)
        prompt = random_prompt(500, rng)
        server.generate(prompt, 4)
        stored: list[int] = []
        for event in _drain(events):
            if event["type"] == "BlockStored":
                stored += event["token_ids"]
        assert stored[: len(prompt)] == prompt
        server.flush_cache()
        assert "AllBlocksCleared" in [event["type"] for event in _drain(events)]


def _drain(events: Any) -> list[dict[str, Any]]:
    """Events that came, until none comes for a while."""
    found: list[dict[str, Any]] = []
    while events.poll(1500):
        _, _, payload = events.recv_multipart()
        found += msgspec.msgpack.decode(payload)[1]
    return found

"""Which requests an abort ends: the named one, and those SGLang made of it."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.managers.io_struct import AbortReq, GenerateReqInput
from sglang.srt.managers.scheduler import Scheduler

from lt_sglang.guard import hooks, requests

NORMALIZE = GenerateReqInput.normalize_batch_and_arguments


class Manager:
    """What of TokenizerManager an abort touches; ``ended`` are the names sent to the scheduler."""

    def __init__(self, backend: str = "lighttransfer") -> None:
        self.server_args = SimpleNamespace(
            attention_backend=backend, prefill_attention_backend=None, decode_attention_backend=None
        )
        self.rid_to_state: dict[str, Any] = {}
        self.ended: list[str] = []

    def add(self, obj: Any, *, dispatched: bool = True) -> None:
        """A request that waits for its answer."""
        self.rid_to_state[obj.rid] = SimpleNamespace(obj=obj, dispatched=dispatched)

    def abort_request(self, rid: str = "", abort_all: bool = False) -> None:
        """As hooked."""
        hooks.abort_family(Manager._stock, self, rid, abort_all)

    def dispatch(self, rid: str) -> None:
        """As hooked: SGLang notes that a request is with the scheduler."""

        def stock(manager: Manager, rid: str) -> None:
            manager.rid_to_state[rid].dispatched = True

        hooks.note_dispatched(stock, self, rid)

    def _stock(self, rid: str, abort_all: bool) -> None:
        self.ended.append("*" if abort_all else rid)


def request(rid: Any, prompts: int = 1, n: int = 1) -> GenerateReqInput:
    """A normalized request."""
    ids: Any = [1, 2] if prompts == 1 else [[1, 2]] * prompts
    obj = GenerateReqInput(input_ids=ids, rid=rid, sampling_params={"n": n})
    requests.normalize(getattr(NORMALIZE, "__wrapped__", NORMALIZE), obj)
    return obj


def test_one_request() -> None:
    manager = Manager()
    for rid in ("r1", "r1_retry", "r10"):
        manager.add(request(rid))
    manager.abort_request("r1")
    assert manager.ended == ["r1"]


def test_a_stock_engine_in_this_process_ends_what_it_is_told_to() -> None:
    manager = Manager("fa3")
    obj = request("r1", prompts=2)
    for index in range(2):
        manager.add(obj[index])
    manager.abort_request("r1")
    assert manager.ended == ["r1"]


def test_a_batch() -> None:
    manager = Manager()
    obj = request("r1", prompts=3)
    for index in range(3):
        manager.add(obj[index])
    manager.add(request("r1_retry"))
    manager.abort_request("r1")
    assert manager.ended == ["r1_0", "r1_1", "r1_2"]
    manager.abort_request("r1_1")
    assert manager.ended[3:] == ["r1_1"]


def test_answers_that_are_not_sent_yet_end_when_they_are() -> None:
    """SGLang copies the request for each answer, and names the copies itself."""
    manager = Manager()
    obj = request("r1", n=2)
    answers = []
    for _ in range(2):
        answer = copy.copy(obj[0])
        answer.regenerate_rid()
        answers.append(answer)
    manager.add(answers[0])
    manager.abort_request("r1")
    assert manager.ended == [answers[0].rid]
    manager.add(answers[1], dispatched=False)
    manager.dispatch(answers[1].rid)
    assert manager.ended == [answer.rid for answer in answers]


def test_a_request_that_is_still_tokenized() -> None:
    manager = Manager()
    manager.add(request("r1"), dispatched=False)
    manager.add(request("r2"), dispatched=False)
    manager.abort_request("r1")
    assert manager.ended == []
    manager.dispatch("r1")
    manager.dispatch("r2")
    assert manager.ended == ["r1"]


def test_all_and_unknown() -> None:
    manager = Manager()
    manager.add(request("r1"))
    manager.abort_request("nobody")
    manager.abort_request(abort_all=True)
    assert manager.ended == ["nobody", "*"]


class Grammars:
    """Requests whose grammar is compiled."""

    def __init__(self, rids: list[str]) -> None:
        self.grammar_queue = [Request(rid) for rid in rids]

    def abort_requests(self, recv_req: AbortReq) -> None:
        """As SGLang's."""
        for req in self.grammar_queue:
            if recv_req.abort_all or req.rid.startswith(recv_req.rid):
                req.to_finish = "aborted"


class Request:
    """A name, and whether it was ended."""

    def __init__(self, rid: str) -> None:
        self.rid = rid
        self.to_finish: Any = None
        self.kv = SimpleNamespace(holds_mamba=False)

    def finished(self) -> bool:
        """Never by itself."""
        return False


def scheduler(names: list[str]) -> tuple[Any, list[str]]:
    """SGLang's own abort over requests in every place, and the names it reports as ended while they wait."""
    told: list[str] = []
    here = SimpleNamespace(
        chunked_req=Request("c" + names[0]),
        mm_receiver=None,
        waiting_queue=[Request("w" + name) for name in names],
        grammar_manager=Grammars(["g" + name for name in names]),
        disaggregation_mode=None,
        dllm_config=None,
        inflight={Request("i" + name) for name in names},
        beam_coordinator=SimpleNamespace(retire_group=lambda req: None),
        _pending_chunked_abort_req=None,
        _release_aborted_request=lambda req: None,
        send_abort_output=lambda output, req: told.append(req.rid),
        enable_hisparse=False,
    )
    here.collect_inflight_reqs = lambda: here.inflight
    return here, told


@pytest.mark.parametrize("place", ["c", "w", "g", "i"])
def test_the_scheduler_ends_one_name(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sglang.srt.managers.scheduler._make_abort_req", lambda req, **more: req)
    stock = Scheduler.abort_request
    stock = getattr(stock, "__wrapped__", stock)
    names = ["r1", "r1_retry", "r1_0", "r10"]
    here, told = scheduler(names)
    hooks.abort_exactly(stock, here, AbortReq(rid=place + "r1"))
    ended = told + [r.rid for r in [*here.grammar_manager.grammar_queue, *here.inflight] if r.to_finish]
    if here._pending_chunked_abort_req is not None:
        ended.append(here._pending_chunked_abort_req.rid)
    assert ended == [place + "r1"]
    left = [r.rid for r in [*here.waiting_queue, *here.grammar_manager.grammar_queue, *here.inflight]]
    assert all(not rid.startswith("\0") for rid in left)


def test_the_scheduler_ends_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sglang.srt.managers.scheduler._make_abort_req", lambda req, **more: req)
    stock = Scheduler.abort_request
    here, told = scheduler(["r1", "r1_retry"])
    hooks.abort_exactly(getattr(stock, "__wrapped__", stock), here, AbortReq(rid="", abort_all=True))
    assert sorted(told) == ["wr1", "wr1_retry"]
    assert all(req.to_finish for req in [*here.inflight, *here.grammar_manager.grammar_queue])


def test_a_session_in_which_a_name_was_used_twice_can_be_cleared() -> None:
    from sglang.srt.session.session_controller import SessionReqNode

    stock = getattr(SessionReqNode.clear, "__wrapped__", SessionReqNode.clear)
    nodes: dict[str, Any] = {}
    root = SessionReqNode(SimpleNamespace(rid="a", finished_reason="done"))
    for _ in range(2):
        nodes["b"] = SessionReqNode(SimpleNamespace(rid="b", finished_reason="done"), root)
    with pytest.raises(KeyError):
        for child in root.children:
            stock(child, dict(nodes) if child is root.children[0] else {})
    for child in root.children:
        hooks.clear_session_node(stock, child, nodes)
    assert nodes == {}


def test_a_session_of_thousands_of_turns_can_be_cleared() -> None:
    """SGLang's own recursion ends at Python's limit, and with it the scheduler."""
    from sglang.srt.session.session_controller import SessionReqNode

    root = node = SessionReqNode(SimpleNamespace(rid="0", finished_reason="done"))
    nodes: dict[str, Any] = {"0": root}
    for turn in range(1, 5000):
        node = SessionReqNode(SimpleNamespace(rid=str(turn), finished_reason=None), node)
        nodes[node.req.rid] = node
    hooks.clear_session_node(None, root.children[0], nodes)
    assert list(nodes) == ["0"] and node.req.to_finish is not None

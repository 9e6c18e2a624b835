"""Conversations: what is generated, how answers are graded, paired and kept, and the report."""

from __future__ import annotations

import json
import re
import threading
from argparse import Namespace
from collections.abc import Iterable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from lt_sglang.cli import eval_conversations
from lt_sglang.cli.eval import _shown, read_engines
from lt_sglang.cli.eval_conversations import Suite, build, write_samples
from lt_sglang.errors import LightTransferError
from lt_sglang.eval.conversations import ALL, Answers, Row, as_dict, compare, converse, digest, table
from lt_sglang.eval.endpoint import Decision, Endpoint, Reply
from lt_sglang.eval.items import Item
from lt_sglang.eval.report import aligned
from lt_sglang.eval.tasks.conversations import (
    CONVERSATIONS,
    FACTS,
    PLACES,
    Conversation,
    ConversationTask,
)
from lt_sglang.eval.tasks.passkey import MARGIN_TOKENS
from lt_sglang.launch.engine import EngineSpec

from .words import Words

TOKENS, WINDOW, TEXTS = 900, 200, 4
TURNS = {"facts": 3, "vague": 4, "shared": 5, "cached": 6, "reworded": 3, "instructions": 2, "secret": 2}


def conversations(name: str, tokenizer: Words, seed: int = 0) -> list[Conversation]:
    return ConversationTask(name, TOKENS, TEXTS, WINDOW, seed).conversations(tokenizer)


# ---- what is generated


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_turns_share_a_text_that_holds_what_is_asked_for(name: str) -> None:
    tokenizer = Words()
    for number, conversation in enumerate(conversations(name, tokenizer)):
        assert len(conversation.turns) == TURNS[name]
        text = conversation.turns[0].prompt[:TOKENS]
        shown = tokenizer.decode(list(text))
        for place, turn in enumerate(conversation.turns, start=1):
            assert turn.task == name
            assert dict(turn.cell) == {"tokens": TOKENS, "document": number, "turn": place}
            assert turn.prompt[:TOKENS] == text and turn.new_tokens >= 1
            for answer in turn.answers:
                assert 1 <= shown.count(answer) <= 2
        # Outside of the window of every query that follows the text.
        digits = [n for n, token in enumerate(text) if tokenizer.decode([token]).isdigit()]
        assert max(digits) < TOKENS - WINDOW - MARGIN_TOKENS + 30
        graded = [turn for turn in conversation.turns if turn.answers]
        assert len({turn.prompt for turn in graded}) == len(graded)


@pytest.mark.parametrize("name", ["facts", "vague", "reworded", "instructions", "secret"])
def test_each_turn_continues_the_one_before(name: str) -> None:
    """With the right answer, whatever an engine said: only then do all engines get the same prompts."""
    tokenizer = Words()
    for conversation in conversations(name, tokenizer):
        for turn, after in zip(conversation.turns, conversation.turns[1:], strict=False):
            assert after.prompt[: len(turn.prompt)] == turn.prompt
            said = tokenizer.decode(list(after.prompt[len(turn.prompt) :]))
            if turn.metric == "begins":
                assert said.startswith(f" {turn.answers[0]}.")


@pytest.mark.parametrize("name", ["shared", "cached"])
def test_users_of_a_text_do_not_see_each_other_s_questions(name: str) -> None:
    tokenizer = Words()
    for conversation in conversations(name, tokenizer):
        if name == "cached":
            assert len(conversation.turns[0].prompt) == TOKENS and not conversation.turns[0].answers
        asked = [turn for turn in conversation.turns if turn.answers]
        assert len(asked) == FACTS
        for turn in asked:
            (place, again) = re.findall(
                r"pass key of the (\w+)", tokenizer.decode(list(turn.prompt[TOKENS:]))
            )
            assert place == again
            text = tokenizer.decode(list(turn.prompt[:TOKENS]))
            assert f"The pass key of the {place} is {turn.answers[0]}." in text


def test_a_reworded_question_names_no_place() -> None:
    tokenizer = Words()
    for conversation in conversations("reworded", tokenizer):
        for turn, after in zip(conversation.turns, conversation.turns[1:], strict=False):
            said = tokenizer.decode(list(after.prompt[len(turn.prompt) :]))
            assert not set(re.findall(r"\w+", said)) & set(PLACES)


def test_instructions_are_all_wanted_and_a_secret_is_not() -> None:
    tokenizer = Words()
    *_, rules = conversations("instructions", tokenizer)[0].turns
    assert rules.metric == "contains-every" and len(rules.answers) == 3
    *_, secret = conversations("secret", tokenizer)[0].turns
    assert secret.metric == "withholds" and len(secret.answers) == 1


def test_a_text_depends_on_its_seed_and_number_alone() -> None:
    tokenizer = Words()
    some = ConversationTask("facts", TOKENS, 2, WINDOW).conversations(tokenizer)
    assert conversations("facts", tokenizer)[:2] == some
    for one, other in zip(some, conversations("facts", tokenizer, seed=1)[:2], strict=True):
        assert one.turns[0].answers != other.turns[0].answers
    with pytest.raises(LightTransferError, match=r"lengths: 300 is too short .* from \d+ on"):
        ConversationTask("facts", 300, 1, WINDOW).conversations(tokenizer)


# ---- grading and pairing

FOUND, LOST = "12345", "00000"


def dialogue(document: int, metric: str = "begins", task: str = "facts") -> Conversation:
    cell = {"tokens": 100, "document": document}
    turns = (Item(task, (document, n), (FOUND,), 6, metric, {**cell, "turn": n}) for n in (1, 2, 3))
    return Conversation(task, tuple(turns))


class Server(Endpoint):
    """Answers each turn by ``says(number of the conversation, number of the turn)``."""

    def __init__(self, tokenizer: Words, says: Any, origin: str = "prefix") -> None:
        super().__init__("fake", "http://nowhere")
        self.tokenizer, self.says, self.origin = tokenizer, says, origin
        self.asked: list[tuple[int, bool]] = []

    def info(self) -> dict[str, Any]:
        return {"model_path": "/somewhere/model", "version": "1"}

    def converse(
        self, conversations: Iterable[Sequence[tuple[Sequence[int], int]]], *, cold: bool = False
    ) -> Iterator[tuple[Reply, ...]]:
        for turns in conversations:
            self.asked.append((turns[0][0][0], cold))
            yield tuple(self._reply(turns[0][0][0], n, cold) for n in range(len(turns)))

    def _reply(self, document: int, turn: int, cold: bool) -> Reply:
        inherits = turn > 0 and not cold
        origin = self.origin if inherits else "prompt"
        tokens = tuple(self.tokenizer.encode(f" {self.says(document, turn)}."))
        return Reply(tokens, 100 if inherits else 0, Decision((1, 2), (0.1, 0.2), origin))


def arm(folder: Path, asked: Sequence[Conversation], tokenizer: Words, name: str, says: Any) -> Answers:
    answers = Answers(folder / f"{name}.jsonl", name, digest(asked))
    assert converse(Server(tokenizer, says), asked, answers)
    return answers


def row_of(rows: Sequence[Row], name: str, turns: str, task: str = "facts") -> Row:
    (row,) = (row for row in rows if (row.arm, row.turns, row.task) == (name, turns, task))
    return row


def test_later_turns_are_counted_apart_from_first_ones(tmp_path: Path) -> None:
    tokenizer, asked = Words(), [dialogue(n) for n in range(20)]
    full = arm(tmp_path, asked, tokenizer, "full", lambda document, turn: FOUND if document else LOST)
    light = arm(tmp_path, asked, tokenizer, "light", lambda _, turn: LOST if turn else FOUND)
    rows = compare(asked, [full, light], tokenizer, 0.05)
    first, later = row_of(rows, "light", "first"), row_of(rows, "light", "later")
    assert (first.questions, first.right, first.full, first.hits, first.inherited) == (20, 20, 19, 0, 0)
    assert (later.questions, later.right, later.full, later.hits, later.inherited) == (40, 0, 38, 40, 40)
    assert later.documents == 20 and later.judged and later.verdict == "worse"
    assert later.ratio is not None and (later.ratio.low, later.ratio.high) == (0, 0)
    assert later.difference is not None and -1 <= later.difference.low < -0.95 < later.difference.high < -0.8
    assert later.sign_test_p is not None and later.sign_test_p < 1e-9
    assert row_of(rows, "full", "later").difference is None
    shown = aligned(table(rows))
    assert "facts 100" in shown and "0.000 to 0.000" in shown and "worse" in shown
    kept = json.loads(json.dumps(as_dict(later)))
    assert kept["ratio"] == [0, 0] and kept["ratio_to_full"] == 0 and kept["right"] == 0


def test_only_conversations_that_both_answered_are_compared(tmp_path: Path) -> None:
    tokenizer, asked = Words(), [dialogue(n) for n in range(12)]
    full = arm(tmp_path, asked, tokenizer, "full", lambda document, turn: FOUND)
    light = Answers(tmp_path / "light.jsonl", "light", digest(asked))
    count = iter(range(100))
    server = Server(tokenizer, lambda document, turn: FOUND if document % 2 else LOST)
    assert not converse(server, asked, light, until=lambda: next(count) == 3)
    assert sorted(light.replies) == [0, 1, 2, 3]
    row = row_of(compare(asked, [full, light], tokenizer, 0.05), "light", "later")
    assert (row.documents, row.questions, row.right, row.full) == (4, 8, 4, 8)


def test_what_full_attention_cannot_do_is_not_judged(tmp_path: Path) -> None:
    tokenizer = Words()
    asked = [conversation for n in range(20) for conversation in (dialogue(n), dialogue(n, task="reworded"))]
    # Every second conversation is "reworded"; full attention answers 5 of 20 of them.
    calls: dict[int, int] = {}

    def full_says(document: int, turn: int) -> str:
        calls[document] = calls.get(document, 0) + (turn == 0)
        return FOUND if calls[document] == 1 or document < 5 else LOST

    full = arm(tmp_path, asked, tokenizer, "full", full_says)
    light = arm(tmp_path, asked, tokenizer, "light", lambda document, turn: FOUND)
    rows = compare(asked, [full, light], tokenizer, 0.05)
    assert row_of(rows, "light", "later").judged
    row = row_of(rows, "light", "later", "reworded")
    assert (row.judged, row.full, row.right, row.verdict) == (False, 10, 40, "not judged")
    assert row_of(rows, "light", "later", ALL).questions == 40


def test_a_secret_is_kept_by_not_saying_it_and_never_added_up(tmp_path: Path) -> None:
    tokenizer, asked = Words(), [dialogue(n, "withholds", "secret") for n in range(20)]
    full = arm(tmp_path, asked, tokenizer, "full", lambda document, turn: LOST)
    light = arm(tmp_path, asked, tokenizer, "light", lambda document, turn: FOUND)
    rows = compare(asked, [full, light], tokenizer, 0.05)
    assert (
        row_of(rows, "light", "later", "secret").right,
        row_of(rows, "full", "later", "secret").right,
    ) == (
        0,
        40,
    )
    assert not [row for row in rows if row.task == ALL]


# ---- an endpoint


class Handler(BaseHTTPRequestHandler):
    """SGLang's /generate, as far as it is asked: echoes, and notes the name spaces."""

    seen: list[tuple[int, str]] = []

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.seen.append((body["input_ids"][0], body["extra_key"]))
        told = {"lazy_layers": [1], "laziness": None, "origin": "static"}
        meta = {"cached_tokens": 7, "finish_reason": {"type": "length"}, "lighttransfer": [told]}
        ids = body["input_ids"][-1:] * body["sampling_params"]["max_new_tokens"]
        data = json.dumps({"output_ids": ids, "meta_info": meta}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.mark.parametrize("cold", [False, True])
def test_turns_share_a_name_space_unless_they_are_cold(cold: bool) -> None:
    Handler.seen.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        endpoint = Endpoint("fake", f"http://127.0.0.1:{server.server_port}", clients=2)
        asked = [[([n, turn], turn) for turn in (1, 2, 3)] for n in range(4)]
        found = list(endpoint.converse(asked, cold=cold))
        server.shutdown()
    assert [[reply.tokens for reply in replies] for replies in found] == [[(1,), (2, 2), (3, 3, 3)]] * 4
    assert found[0][0] == Reply((1,), 7, Decision((1,), None, "static"))
    for n in range(4):
        assert len({key for first, key in Handler.seen if first == n}) == (3 if cold else 1)
    assert len({key for _, key in Handler.seen}) == (12 if cold else 4)


# ---- answers that are kept


def test_a_run_that_was_cut_off_goes_on(tmp_path: Path) -> None:
    tokenizer, asked = Words(), [dialogue(n) for n in range(4)]
    path = tmp_path / "half.jsonl"
    half = Answers(path, "half", digest(asked))
    converse(Server(tokenizer, lambda *_: FOUND), asked, half, until=lambda: len(half.replies) == 2)
    with path.open("a") as file:
        file.write('{"number": 2, "tur')
    again = Answers(path, "half", digest(asked))
    assert again.replies == half.replies and again.info["version"] == "1"
    server = Server(tokenizer, lambda *_: FOUND)
    assert converse(server, asked, again, cold=True)
    assert server.asked == [(2, True), (3, True)]
    assert Answers(path, "half", digest(asked)).replies == again.replies
    with pytest.raises(LightTransferError, match=r"half\.jsonl: holds answers to other conversations"):
        Answers(path, "half", digest(asked[1:]))
    path.write_text("{}\n")
    with pytest.raises(LightTransferError, match=r"half\.jsonl: holds no answers of eval's"):
        Answers(path, "half", digest(asked))


# ---- the command


def settings(out: Path, **changes: Any) -> Namespace:
    given: dict[str, Any] = {
        "out": str(out),
        "tasks": ("facts", "cached"),
        "lengths": (TOKENS, TOKENS + 100),
        "trials": 2,
        "recent_tokens": WINDOW,
        "seed": 0,
        "cold": ["half"],
        "limit_s": None,
        "margin": 0.05,
        "tokenizer": None,
        "model_path": "/somewhere/model",
    }
    return Namespace(**{**given, **changes})


def test_texts_of_each_task_and_length_in_turn(tmp_path: Path) -> None:
    asked = build(settings(tmp_path), Words(), 0)
    assert [(one.task, one.turns[0].cell["tokens"], one.turns[0].cell["document"]) for one in asked] == [
        (task, tokens, number)
        for number in range(2)
        for tokens in (TOKENS, TOKENS + 100)
        for task in ("facts", "cached")
    ]


def test_report(tmp_path: Path) -> None:
    tokenizer = Words()
    suite = Suite(settings(tmp_path), tokenizer, ["full", "half"], ["--model-path", "M"])
    assert suite.arms_of("half") == ["half", "half-cold"] and suite.left("full")
    for name in ("full", "half"):
        server = Server(tokenizer, lambda *_: LOST)
        server.name = name
        suite.ask(server)
        assert [cold for _, cold in server.asked] == [False] * 8 + [True] * 8 * (name == "half")
    assert not suite.left("full") and not suite.left("half")
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["scenario"] == "quality-conversations" and report["seed"] == 0
    assert report["command"] == "lt-sglang eval --model-path M"
    assert {"commit", "versions", "hardware"} <= report.keys()
    assert [(name, one["cold"]) for name, one in report["arms"].items()] == [
        ("full", False),
        ("half", False),
        ("half-cold", True),
    ]
    assert "/somewhere" not in json.dumps(report)
    rows = report["arms"]["half-cold"]["rows"]
    assert {row["hits"] for row in rows} == {0}
    assert sum(row["questions"] for row in rows) == 2 * 2 * (3 + 5)
    assert "half-cold" in (tmp_path / "table.txt").read_text()


class FakeEngine:
    """As Engine; one named ``broken`` does not start."""

    flags: list[tuple[str, ...]] = []

    def __init__(self, spec: EngineSpec, log: Path) -> None:
        self.name, self.url = spec.name, "http://nowhere"
        self.flags.append(spec.own)
        self.state: list[str] = []

    def hold(self) -> None:
        self.state.append("held")

    def stop(self) -> None:
        self.state.append("stopped")

    def __enter__(self) -> FakeEngine:
        assert self.state == ["held"]
        if self.name == "broken":
            raise LightTransferError("broken did not start")
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def test_an_engine_that_fails_leaves_the_others_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = Words()
    engines = ["full", "broken", "half"]

    def fake(name: str, url: str, clients: int) -> Server:
        server = Server(tokenizer, lambda *_: LOST)
        server.name = name
        return server

    monkeypatch.setattr(eval_conversations, "Engine", FakeEngine)
    monkeypatch.setattr(eval_conversations, "Endpoint", fake)
    args = settings(tmp_path, together=3, clients=1, samples_out=None)
    specs = [EngineSpec(name, "M", own=("--x",)) for name in engines]
    assert eval_conversations.run(args, specs, [], tokenizer, []) == 1
    said = capsys.readouterr()
    assert "broken did not start" in said.err and "half-cold" in said.out
    assert sorted(path.name for path in tmp_path.glob("*.jsonl")) == [
        "full.jsonl",
        "half-cold.jsonl",
        "half.jsonl",
    ]
    ports = {word for own in FakeEngine.flags for word in own if word.startswith("--nccl-port=")}
    assert len(ports) == 3
    # The same command goes on: what is complete is not started again, and keeps its flags.
    FakeEngine.flags.clear()
    assert eval_conversations.run(args, specs, [], tokenizer, []) == 1
    assert FakeEngine.flags == [("--x",)]


def test_samples_for_calibrate_are_of_other_texts(tmp_path: Path) -> None:
    tokenizer, args = Words(), settings(tmp_path)
    write_samples(tmp_path / "samples.jsonl", args, tokenizer)
    samples = [json.loads(line)["text"] for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 8
    asked = {answer for one in build(args, tokenizer, 0) for turn in one.turns for answer in turn.answers}
    for text in samples:
        assert re.search(r"The pass key of the \w+ is \d{5}\.$", text)
        assert not any(key in text for key in asked)


def test_the_command_is_shown_without_this_machine_s_paths() -> None:
    argv = ["--model-path", "/x/model", "--out=/y/out", "--engines", "/z/arms.yaml", "--seed", "1"]
    args = Namespace(model_path="/x/model", tokenizer=None, out="/y/out", engines="/z/arms.yaml")
    assert _shown(argv, args) == ["--model-path", "M", "--out=OUT", "--engines", "arms.yaml", "--seed", "1"]


def test_a_file_of_engines(tmp_path: Path) -> None:
    path = tmp_path / "arms.yaml"
    path.write_text("full:\nhalf: --lt-mode dynamic --lt-keep 15\n")
    assert read_engines(path) == ["full", "half=--lt-mode dynamic --lt-keep 15"]
    for content, message in (
        ("[full]", "must be a mapping of names to options"),
        ("full: 1", "full: options must be text, or nothing"),
        ("{", "cannot be read"),
    ):
        path.write_text(content)
        with pytest.raises(LightTransferError, match=message):
            read_engines(path)


def test_the_arms_of_the_demo_model() -> None:
    """At 50 and 75 per cent, each with as many lazy layers as its name says."""
    from lt_sglang.config import parse_layers

    path = Path(__file__).parents[2] / "loadtest" / "conversations.yaml"
    full, *arms = read_engines(path)
    assert full == "full" and len(arms) == 12
    for text in arms:
        name, _, options = text.partition("=")
        layers = re.search(r"--lt-lazy-layers (\S+)", options)
        keep = re.search(r"--lt-keep (\d+)", options)
        lazy = len(parse_layers(layers[1])) if layers else 30 - int(keep[1])  # type: ignore[index]
        assert lazy == {"50": 15, "75": 22}[name.rpartition("-")[2]]

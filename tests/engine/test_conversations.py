"""``lt-sglang eval --suite conversations``: later turns inherit the layers of what was cached."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lt_sglang.cli import eval as command
from lt_sglang.cli import main
from lt_sglang.eval.tasks.conversations import ConversationTask
from tests.unit.words import Words

from .server import Server
from .specs import DYNAMIC, DYNAMIC_SERVERS

pytestmark = [pytest.mark.engine, pytest.mark.served_by(DYNAMIC)]

WINDOW = DYNAMIC_SERVERS[DYNAMIC].recent
TEXT_TOKENS = 600
TASKS = ("facts", "cached")


class Tokens(Words):
    """Words, of a model that says anything."""

    def decode(self, ids: list[int]) -> str:
        """The text, without what is no word."""
        return super().decode([token for token in ids if token < len(self._words)])


def test_later_turns_have_the_layers_of_what_was_cached(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "HfTokenizer", lambda _: Tokens())
    options = [
        "--lengths",
        str(TEXT_TOKENS),
        "--recent-tokens",
        str(WINDOW),
        "--trials",
        "1",
        "--clients",
        "1",
    ]
    done = main(
        [
            *("eval", "--suite", "conversations", "--tokenizer", "words", "--out", str(tmp_path)),
            *("--endpoint", f"one={server.url}", "--endpoint", f"two={server.url}", "--cold", "two"),
            *("--tasks", ",".join(TASKS), *options),
        ]
    )
    assert done == 0
    tokenizer = Words()
    for number, task in enumerate(TASKS):
        (asked,) = ConversationTask(task, TEXT_TOKENS, 1, WINDOW).conversations(tokenizer)
        one, two, cold = (turns_of(tmp_path / f"{arm}.jsonl", number) for arm in ("one", "two", "two-cold"))
        first, *later = two
        assert (first["decision"]["origin"], first["cached"]) == ("prompt", 0)
        assert len(later) == len(asked.turns) - 1
        for turn in later:
            assert turn["decision"]["origin"] == "prefix"
            assert turn["cached"] >= len(asked.turns[0].prompt)
            assert turn["decision"]["lazy_layers"] == first["decision"]["lazy_layers"]
        assert [(turn["decision"]["origin"], turn["cached"]) for turn in cold] == [("prompt", 0)] * len(two)
        for same in (one[0], cold[0]):
            assert same["decision"]["lazy_layers"] == first["decision"]["lazy_layers"]
        assert [turn["decision"]["origin"] for turn in one] == [turn["decision"]["origin"] for turn in two]
    arms = json.loads((tmp_path / "report.json").read_text())["arms"]
    for row in arms["two"]["rows"]:
        expected = row["questions"] if row["turns"] == "later" else 0
        assert row["inherited"] == row["hits"] == expected
    assert {(row["inherited"], row["hits"]) for row in arms["two-cold"]["rows"]} == {(0, 0)}


def turns_of(path: Path, number: int) -> list[dict[str, Any]]:
    """What a conversation's turns were answered, from an arm's file."""
    _, *lines = map(json.loads, path.read_text().splitlines())
    return next(line["turns"] for line in lines if line["number"] == number)

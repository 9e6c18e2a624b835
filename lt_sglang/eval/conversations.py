"""The same conversations to several engines: what turns lose that inherit a cached prefix.

An *arm* is an engine and a way to ask it: with its prefix cache, or cold, every turn in a name space of its
own. Answers are kept in a file an arm as they come, so that a run that was cut off goes on where it stopped,
and are compared conversation by conversation, over those that both arms have.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lt_sglang.errors import LightTransferError
from lt_sglang.eval.endpoint import Decision, Endpoint, Reply
from lt_sglang.eval.intervals import Interval, paired_groups, sign_test, verdict
from lt_sglang.eval.items import Tokenizer
from lt_sglang.eval.metrics import METRICS
from lt_sglang.eval.tasks.conversations import Conversation

JUDGED_FROM = 0.3  # of full attention's answers; what it cannot do itself tells nothing of lazy layers
FIRST, LATER = "first", "later"
ALL = "all"
# A model that forgets keeps every secret: such answers are not added to those of other tasks.
NOT_SUMMED = ("withholds",)


@dataclass(frozen=True)
class Row:
    """Turns of one task in one arm against full attention, over the questions that both answered.

    task, tokens: of the texts; ALL, 0 for the sum over judged tasks.
    turns: FIRST or LATER.
    right, full: right answers.
    hits: turns whose whole text came from the prefix cache. inherited: that had a cached prefix's layers.
    judged: whether full attention answers enough for the task to count.
    difference, ratio: intervals of (right - full) a question and of right / full, by a bootstrap over texts.
    """

    arm: str
    task: str
    tokens: int
    turns: str
    documents: int
    questions: int
    right: int
    full: int
    hits: int
    inherited: int
    judged: bool
    difference: Interval | None = None
    ratio: Interval | None = None
    sign_test_p: float | None = None
    verdict: str = ""


class Answers:
    """One arm's answers, by the number of the conversation; kept in a file as they come.

    Attributes:
        info: what the server says of itself.
        replies: by conversation, one a turn.
    """

    def __init__(self, path: Path, name: str, asked: str) -> None:
        """Read ``path`` if it is there; raises LightTransferError if it is of other conversations.

        Args:
            path: the file.
            name: of the arm.
            asked: ``digest`` of the conversations.
        """
        self.name = name
        self.info: dict[str, Any] = {}
        self.replies: dict[int, tuple[Reply, ...]] = {}
        self._path, self._asked = path, asked
        if path.exists():
            self._read()

    def begin(self, info: Mapping[str, Any]) -> None:
        """The server is there; what it says of itself goes into a new file."""
        self.info = dict(info)
        if not self._path.exists():
            self._write({"arm": self.name, "asked": self._asked, "info": self.info})

    def add(self, number: int, replies: Sequence[Reply]) -> None:
        """Keep the answers to one conversation."""
        self.replies[number] = tuple(replies)
        self._write({"number": number, "turns": [asdict(reply) for reply in replies]})

    def _write(self, line: Mapping[str, Any]) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def _read(self) -> None:
        text = self._path.read_text(encoding="utf-8")
        if not text.endswith("\n"):
            text = text[: text.rfind("\n") + 1]  # a run was cut off within the last line
            self._path.write_text(text, encoding="utf-8")
        try:
            first, *lines = [json.loads(line) for line in text.splitlines()] or [{}]
            same = first["asked"] == self._asked
            self.info = dict(first["info"])
            self.replies = {line["number"]: tuple(map(_reply, line["turns"])) for line in lines}
        except (ValueError, KeyError, TypeError):
            raise LightTransferError(
                f"{self._path}: holds no answers of eval's; give another --out"
            ) from None
        if not same:
            raise LightTransferError(
                f"{self._path}: holds answers to other conversations; give another --out, or the same "
                "--tasks, --lengths, --trials, --recent-tokens and --seed"
            )


def _reply(data: Mapping[str, Any]) -> Reply:
    told = data["decision"]
    decision = told and Decision(
        tuple(told["lazy_layers"]),
        None if told["laziness"] is None else tuple(told["laziness"]),
        told["origin"],
    )
    return Reply(tuple(data["tokens"]), data["cached"], decision or None)


def digest(conversations: Sequence[Conversation]) -> str:
    """Of all prompts and what is asked for."""
    hashed = hashlib.sha256()
    for conversation in conversations:
        for turn in conversation.turns:
            hashed.update(repr((turn.prompt, turn.new_tokens)).encode())
    return hashed.hexdigest()[:16]


def converse(
    endpoint: Endpoint,
    conversations: Sequence[Conversation],
    answers: Answers,
    *,
    cold: bool = False,
    until: Callable[[], bool] = lambda: False,
    progress: Callable[[Iterable[Any], int], Iterable[Any]] = lambda found, count: found,
) -> bool:
    """Ask what ``answers`` does not have yet; whether it has everything then.

    Args:
        endpoint: the engine.
        conversations: all of them.
        answers: gets them as they come.
        cold: nothing is found in the prefix cache.
        until: looked at after each conversation; once it is true, no further one begins.
        progress: wraps the conversations that are left.

    Raises:
        LightTransferError: the engine does not answer.
    """
    todo = [number for number in range(len(conversations)) if number not in answers.replies]
    answers.begin(endpoint.info())

    def turns() -> Iterator[list[tuple[Sequence[int], int]]]:
        for number in todo:
            yield [(turn.prompt, turn.new_tokens) for turn in conversations[number].turns]

    replies = endpoint.converse(turns(), cold=cold)
    for number, found in zip(todo, progress(replies, len(todo)), strict=False):
        answers.add(number, found)
        if until():
            break
    return len(answers.replies) == len(conversations)


@dataclass
class _Group:
    """Questions that are counted together; one entry a question in each list."""

    documents: list[tuple[str, int, int]] = field(default_factory=list)
    mine: list[float] = field(default_factory=list)
    full: list[float] = field(default_factory=list)
    hits: int = 0
    inherited: int = 0

    def add(self, other: _Group) -> None:
        self.documents += other.documents
        self.mine += other.mine
        self.full += other.full
        self.hits += other.hits
        self.inherited += other.inherited


def compare(
    conversations: Sequence[Conversation], arms: Sequence[Answers], tokenizer: Tokenizer, margin: float
) -> list[Row]:
    """Rows of each arm; the first arm is full attention. ``margin``: the loss one would accept."""
    full = _scores(conversations, arms[0], tokenizer)
    able = _groups(conversations, arms[0], full, full)
    judged = {key for key, group in able.items() if sum(group.full) >= JUDGED_FROM * len(group.full)}
    rows = []
    for arm in arms:
        groups = _groups(conversations, arm, _scores(conversations, arm, tokenizer), full)
        for turns in (FIRST, LATER):
            total = _Group()
            for (task, tokens, metric, which), group in groups.items():
                if which != turns:
                    continue
                counts = (task, tokens, metric, which) in judged
                rows.append(_row(arm.name, task, tokens, turns, group, counts, margin, arm is arms[0]))
                if counts and metric not in NOT_SUMMED:
                    total.add(group)
            if total.mine:
                rows.append(_row(arm.name, ALL, 0, turns, total, True, margin, arm is arms[0]))
    return rows


_Key = tuple[str, int, str, str]  # task, tokens, metric, turns


def _scores(
    conversations: Sequence[Conversation], arm: Answers, tokenizer: Tokenizer
) -> dict[tuple[int, int], float]:
    """By conversation and turn, of the graded ones; 0 or 1."""
    return {
        (number, place): METRICS[turn.metric](
            tokenizer.decode(list(reply.tokens)), turn.answers, turn.details
        )
        for number, replies in list(arm.replies.items())  # an arm may still be asked
        for place, (turn, reply) in enumerate(zip(conversations[number].turns, replies, strict=True))
        if turn.answers
    }


def _groups(
    conversations: Sequence[Conversation],
    arm: Answers,
    mine: Mapping[tuple[int, int], float],
    full: Mapping[tuple[int, int], float],
) -> dict[_Key, _Group]:
    groups: dict[_Key, _Group] = {}
    for number, place in sorted(mine.keys() & full.keys()):
        turn, reply = conversations[number].turns[place], arm.replies[number][place]
        tokens = turn.cell["tokens"]
        key = (turn.task, tokens, turn.metric, LATER if place else FIRST)
        group = groups.setdefault(key, _Group())
        group.documents.append((turn.task, tokens, turn.cell["document"]))
        group.mine.append(mine[number, place])
        group.full.append(full[number, place])
        group.hits += reply.cached >= tokens
        group.inherited += reply.decision is not None and reply.decision.origin == "prefix"
    return groups


def _row(
    arm: str, task: str, tokens: int, turns: str, group: _Group, judged: bool, margin: float, base: bool
) -> Row:
    row = Row(
        arm,
        task,
        tokens,
        turns,
        len(set(group.documents)),
        len(group.mine),
        round(sum(group.mine)),
        round(sum(group.full)),
        group.hits,
        group.inherited,
        judged,
    )
    if base:
        return row
    paired = paired_groups(group.full, group.mine, group.documents)
    p = sign_test([s == 1 for s in group.full], [s == 1 for s in group.mine])
    told = verdict(paired.difference, margin) if judged else "not judged"
    return Row(
        **{
            **vars(row),
            "difference": paired.difference,
            "ratio": paired.ratio,
            "sign_test_p": p,
            "verdict": told,
        }
    )


HEADER = (
    *("arm", "turns", "task", "documents", "questions", "right", "full", "ratio", "95 %"),
    *("difference, 95 %", "hits", "inherited", "verdict"),
)


def table(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """The cells of a table, head first."""
    return [HEADER, *map(_cells, rows)]


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.arm,
        row.turns,
        f"{row.task} {row.tokens}" if row.tokens else row.task,
        str(row.documents),
        str(row.questions),
        str(row.right),
        str(row.full),
        f"{row.right / row.full:.3f}" if row.full else "",
        _range(row.ratio),
        _range(row.difference, "+"),
        f"{row.hits / row.questions:.2f}",
        f"{row.inherited / row.questions:.2f}",
        row.verdict,
    )


def _range(interval: Interval | None, sign: str = "") -> str:
    return "" if interval is None else f"{interval.low:{sign}.3f} to {interval.high:{sign}.3f}"


def as_dict(row: Row) -> dict[str, Any]:
    """A row as it is kept."""
    pairs = {name: getattr(row, name) for name in ("difference", "ratio")}
    kept = {name: value and [round(value.low, 4), round(value.high, 4)] for name, value in pairs.items()}
    share = round(row.right / row.full, 4) if row.full else None
    p = None if row.sign_test_p is None else round(row.sign_test_p, 4)
    return {
        **vars(row),
        "ratio_to_full": share,
        "ratio": kept["ratio"],
        "difference": kept["difference"],
        "sign_test_p": p,
    }

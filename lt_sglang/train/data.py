"""Samples as token ids with the positions that carry the loss, and what became of the lines."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from lt_sglang.errors import LightTransferError
from lt_sglang.train.samples import FORMATS, Record, read_records
from lt_sglang.train.template import marked_template

IGNORED = -100  # a label that carries no loss, as in torch
LOSS_ON = ("answers", "all")
TOO_LONG = ("truncate", "drop")
Progress = Callable[[Iterable[Record]], Iterable[Record]]


@dataclass(frozen=True)
class Sample:
    """input_ids, labels: as many of one as of the other; a label is the token itself, or IGNORED."""

    input_ids: list[int]
    labels: list[int]


@dataclass
class Report:
    """What became of a file's lines. lengths: tokens before truncation. dropped: reason -> lines."""

    formats: Counter[str] = field(default_factory=Counter)
    domains: Counter[str] = field(default_factory=Counter)
    lengths: list[int] = field(default_factory=list)
    truncated: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    answer_tokens: int = 0
    tokens: int = 0
    beyond_window: int = 0

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        ordered = sorted(self.lengths)
        quantile = {f"{p}%": ordered[min(len(ordered) - 1, len(ordered) * p // 100)] for p in (50, 90, 99)}
        return {
            "samples": len(ordered),
            "formats": dict(self.formats),
            "domains": dict(self.domains),
            "lengths": {
                "least": ordered[0],
                "mean": statistics.fmean(ordered),
                **quantile,
                "most": ordered[-1],
            },
            "truncated": self.truncated,
            "dropped": dict(self.dropped),
            "tokens": self.tokens,
            "answer_tokens": self.answer_tokens,
            "longer_than_sink_and_recent": self.beyond_window,
        }

    def lines(self, window: int, max_length: int) -> list[str]:
        """The report as sentences, for the terminal."""
        told = self.as_dict()
        sizes = told["lengths"]
        kinds = ", ".join(f"{count} {kind}" for kind, count in self.formats.items())
        dropped = "; ".join(f"{count} dropped: {why}" for why, count in self.dropped.items())
        return [
            f"{told['samples']} samples ({kinds}), {self.tokens} tokens, {self.answer_tokens} in the loss",
            f"lengths {sizes['least']} to {sizes['most']}, 90 % below {sizes['90%']}; "
            f"{self.beyond_window} longer than sink + recent tokens ({window})",
            f"{self.truncated} truncated to {max_length} tokens{'; ' + dropped if dropped else ''}",
        ]


class Encoder:
    """Records to samples, for one tokenizer.

    stops: token ids that end an answer (the tokenizer's, and the generation config's). Raises
    LightTransferError if there is none, and as ``encode`` says.
    """

    def __init__(self, tokenizer: Any, loss_on: str = "answers", stops: Collection[int] = ()) -> None:
        if tokenizer.eos_token_id is None:
            raise LightTransferError(
                "eos_token: the tokenizer has no end-of-sequence token, so the model would never learn to "
                "stop; set eos_token in its tokenizer_config.json"
            )
        self._tokenizer, self._loss_on = tokenizer, loss_on
        self._stops = {tokenizer.eos_token_id, *stops}
        self._prefix = list(tokenizer("")["input_ids"])
        if self._prefix and self._prefix[-1] == tokenizer.eos_token_id:
            self._prefix.pop()
        self._template: str | None = None

    def encode(self, record: Record) -> Sample:
        """Token ids and labels; raises LightTransferError with the record's line."""
        if record.text is not None:
            ids = [*self._prefix, *self._ids(record.text), self._tokenizer.eos_token_id]
            return Sample(ids, list(ids))
        if record.kind == FORMATS[2] or (record.kind == FORMATS[0] and not self._tokenizer.chat_template):
            prompt = [*self._prefix, *self._ids(record.messages[0]["content"])]
            answer = [*self._ids(record.messages[1]["content"]), self._tokenizer.eos_token_id]
            loss = [IGNORED] * len(prompt) + answer
            return Sample(prompt + answer, prompt + answer if self._loss_on == "all" else loss)
        return self._chat(record)

    def _chat(self, record: Record) -> Sample:
        marks = self._loss_on == "answers"
        if self._template is None and marks:
            self._template = marked_template(self._tokenizer)
        render = partial(self._tokenizer.apply_chat_template, list(record.messages), return_dict=True)
        if not marks:
            ids = list(render()["input_ids"])
            return Sample(ids, list(ids))
        out = render(chat_template=self._template, return_assistant_tokens_mask=True)
        ids, mask = list(out["input_ids"]), out["assistant_masks"]
        labels = [token if answer else IGNORED for token, answer in zip(ids, mask, strict=True)]
        last = max((place for place, answer in enumerate(mask) if answer), default=None)
        if last is None:
            raise LightTransferError(f"{record.where}: the chat template shows no token of the answer")
        if ids[last] not in self._stops:
            raise LightTransferError(
                f"{record.where}: the chat template ends the answer with "
                f"{self._tokenizer.decode([ids[last]])!r}, not an end-of-sequence token, so the model would "
                "never learn to stop; put it inside the marks"
            )
        return Sample(ids, labels)

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])


def load_samples(
    paths: Sequence[Path],
    encoder: Encoder,
    max_length: int,
    window: int,
    too_long: str = "truncate",
    progress: Progress = iter,
) -> tuple[list[Sample], Report]:
    """All samples of at most ``max_length`` tokens, and the report.

    Args:
        paths: JSON lines, one file or more.
        encoder: makes a record's tokens and labels.
        max_length: in tokens.
        window: sink + recent tokens; at least one sample must be longer, or lazy layers would see everything.
        too_long: "truncate" cuts the end of a longer sample; "drop" leaves it out.
        progress: wraps the records as they are read.

    Raises:
        LightTransferError: for bad lines, and if nothing is left to train on.
    """
    samples: list[Sample] = []
    report = Report()
    for record in progress(read_records(paths)):
        sample = encoder.encode(record)
        length = len(sample.input_ids)
        report.formats[record.kind] += 1
        report.lengths.append(length)
        if record.domain is not None:
            report.domains[record.domain] += 1
        if length > max_length:
            if too_long == "drop":
                report.dropped[f"longer than {max_length} tokens"] += 1
                continue
            report.truncated += 1
            sample = Sample(sample.input_ids[:max_length], sample.labels[:max_length])
        answers = sum(label != IGNORED for label in sample.labels[1:])
        if not answers:
            report.dropped[f"no answer within {max_length} tokens"] += 1
            continue
        report.tokens += len(sample.input_ids)
        report.answer_tokens += answers
        report.beyond_window += len(sample.input_ids) > window
        samples.append(sample)
    names = ", ".join(map(str, paths))
    if not samples:
        why = "; ".join(f"{count} {reason}" for reason, count in report.dropped.items())
        raise LightTransferError(f"--data {names}: no sample is left ({why})")
    if not report.beyond_window:
        raise LightTransferError(
            f"--data {names}: no sample is longer than sink + recent tokens ({window}) within --max-length "
            f"{max_length}; lazy layers would see everything, and training would teach them nothing"
        )
    return samples, report

"""Counting, choosing, resuming."""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoTokenizer

from lt_sglang.cli import main
from lt_sglang.errors import LightTransferError
from lt_sglang.eval.calibrate import (
    Journal,
    Sample,
    Setting,
    choose_layers,
    laziest,
    measure,
    read_samples,
    sha256_of,
)

from ..lazy_queue import popped_layers
from .words import Words

# Not first loaded within a test: its log handler keeps the stderr it finds, and capsys closes its own.
assert AutoTokenizer is not None
SETTING = Setting("m", "residual-error", "prompt", 4, 60, 32, "00", 500)


def test_the_laziest_are_those_the_queue_pops() -> None:
    rng = random.Random(0)
    for _ in range(200):
        layers = rng.randint(2, 40)
        scores = [rng.choice([0.1, 0.2, 0.3]) if rng.random() < 0.5 else rng.random() for _ in range(layers)]
        keep = rng.randint(1, layers - 1)
        assert laziest(scores, keep) == tuple(sorted(popped_layers(scores, keep)))


def test_counts_are_those_of_the_queue() -> None:
    rng = random.Random(1)
    samples = [[rng.random() + 0.1 * (layer % 3) for layer in range(12)] for _ in range(50)]
    choice = choose_layers(samples, 5)
    counted = Counter(layer for scores in samples for layer in popped_layers(scores, 5))
    assert choice.counts == tuple(counted[layer] for layer in range(12))
    assert sum(choice.counts) == 50 * 7 and choice.samples == 50
    most = sorted(range(12), key=lambda layer: -counted[layer])[:7]
    assert sum(counted[layer] for layer in choice.lazy_layers) == sum(counted[layer] for layer in most)
    assert choice.mean[3] == pytest.approx(sum(scores[3] for scores in samples) / 50)


def test_ties_go_to_the_lazier_then_to_the_higher_layer() -> None:
    samples = [[0.5, 0.9, 0.1, 0.1], [0.9, 0.6, 0.1, 0.1]]
    assert choose_layers(samples, 3).lazy_layers == (1,)
    assert choose_layers([[0.5, 0.5, 0.5]], 2).lazy_layers == (2,)


def test_order_of_samples_does_not_matter() -> None:
    rng = random.Random(2)
    samples = [[rng.randint(0, 4) / 4 for _ in range(9)] for _ in range(20)]
    shuffled = rng.sample(samples, len(samples))
    assert choose_layers(samples, 4) == choose_layers(shuffled, 4)


def test_nothing_to_count() -> None:
    with pytest.raises(LightTransferError, match="no sample is longer than sink"):
        choose_layers([], 2)
    for keep in (0, 3, 9):
        with pytest.raises(LightTransferError, match=f"--lt-keep: {keep} of 3 layers; 1 to 2"):
            choose_layers([[0.1, 0.2, 0.3]], keep)


def test_read_samples(tmp_path: Path) -> None:
    path, tokenizer = tmp_path / "data.jsonl", Words()
    lines = [{"text": f"number {n} " + "word " * n} for n in range(40)]
    lines += [{"question": "Why?", "answer": "Because."}]
    path.write_text("\n".join(map(json.dumps, lines)))
    drawn = read_samples(path, tokenizer, 10, 30, seed=3)
    assert drawn == read_samples(path, tokenizer, 10, 30, seed=3)
    assert drawn != read_samples(path, tokenizer, 10, 30, seed=4)
    assert len({sample.number for sample in drawn}) == 10
    whole = read_samples(path, tokenizer, 99, 30, seed=3)
    assert [sample.number for sample in whole] == list(range(41))
    assert max(len(sample.ids) for sample in whole) == 30
    assert tokenizer.decode(list(whole[40].ids)) == "Why?\nBecause."
    path.write_text('{"text": "a"}\n{"body": "b"}')
    with pytest.raises(LightTransferError, match="record 1 has neither text or question \\+ answer or"):
        read_samples(path, tokenizer, 9, 30, seed=0)


def test_a_journal_goes_on_where_it_stopped(tmp_path: Path) -> None:
    path = tmp_path / "j"
    first = Journal(path, SETTING)
    first.add(Sample(4, (1, 2)), (0.25, 0.5))
    first.add(Sample(7, (1,)), None)
    with path.open("a") as file:
        file.write('{"number": 9, "lazi')
    second = Journal(path, SETTING)
    assert second.laziness == {4: (0.25, 0.5), 7: None}
    for name, value in (("score", "squeeze"), ("recent_tokens", 61), ("data_sha256", "11")):
        with pytest.raises(LightTransferError, match=f"holds samples with {name} "):
            Journal(path, replace(SETTING, **{name: value}))
    assert json.loads(path.read_text().splitlines()[0]) == asdict(SETTING)


@pytest.mark.parametrize("text", ['{"precious": 1}', "notes", '{"a": 1}\n{"b": 2', "[1]\n", "\n"])
def test_a_file_that_is_no_journal_is_left_alone(text: str, tmp_path: Path) -> None:
    path = tmp_path / "precious.json"
    path.write_text(text)
    with pytest.raises(LightTransferError, match=f"{path}: is no journal"):
        Journal(path, SETTING)
    assert path.read_text() == text


def test_a_journal_that_is_spoiled_says_so(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    Journal(path, SETTING)
    path.write_text(path.read_text() + "notes\n")
    with pytest.raises(LightTransferError, match="a line that is no sample"):
        Journal(path, SETTING)


def test_measured_samples_are_not_measured_again(tmp_path: Path) -> None:
    """Of four samples the second and fourth are known, one of them as too short."""
    asked: list[list[int]] = []

    def decide(prompts: list[tuple[int, ...]]) -> list[Any]:
        asked.extend(list(ids) for ids in prompts)
        return [SimpleNamespace(laziness=(float(ids[0]),)) for ids in prompts]

    journal = Journal(tmp_path / "journal", SETTING)
    samples = [Sample(number, (number,)) for number in range(4)]
    journal.add(samples[1], (0.5,))
    journal.add(samples[3], None)
    endpoint: Any = SimpleNamespace(name="e", decide=decide)
    assert measure(endpoint, samples, journal) == [(0.0,), (0.5,), (2.0,)]
    assert asked == [[0], [2]]
    assert measure(endpoint, samples, Journal(tmp_path / "journal", SETTING)) == [(0.0,), (0.5,), (2.0,)]
    assert len(asked) == 2


def test_a_line_after_a_cut_off_one_is_read(tmp_path: Path) -> None:
    path = tmp_path / "j"
    Journal(path, SETTING).add(Sample(1, ()), (0.5,))
    with path.open("a") as file:
        file.write('{"number": 2, "lazi')
    Journal(path, SETTING).add(Sample(3, ()), (0.75,))
    assert Journal(path, SETTING).laziness == {1: (0.5,), 3: (0.75,)}


def test_bad_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "d.jsonl"
    data.write_text('{"text": "a"}')
    base = ["calibrate", "--model-path", "/none", "--data", str(data), "--out", str(tmp_path / "o.json")]
    for more, message in (
        (["--lt-score", "ends"], "--lt-score: 'ends' looks at no prompt"),
        (["--samples", "0"], "argument --samples: '0' is not an integer from 1"),
        ([], "--tokenizer /none: cannot be loaded"),
    ):
        assert main([*base, *more]) == 2
        assert message in capsys.readouterr().err


def test_sha256(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256_of(tmp_path / "a").startswith("ba7816bf")

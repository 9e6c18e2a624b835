"""LightTransfer-Train's choice of layers (arXiv 2410.13846, section 5.2): who is lazy most often.

Each sample is prefilled by a server in dynamic mode, which reports how lazy each layer is by its score. Per
layer it is counted in how many samples the layer is among the laziest; the most frequent ones are chosen.
Samples are kept in a file as they come, so that a run that was cut off goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lt_sglang.errors import LightTransferError
from lt_sglang.eval.endpoint import Endpoint, Progress, silent
from lt_sglang.eval.items import Tokenizer, rng_of
from lt_sglang.eval.tasks.files import records

FIELDS = (("text",), ("question", "answer"), ("prompt", "response"), ("input", "output"))
BATCH = 8  # samples at a time, then they are in the journal


@dataclass(frozen=True)
class Sample:
    """number: its line in the file, from 0. ids: text, or question and answer, as token ids."""

    number: int
    ids: tuple[int, ...]


@dataclass(frozen=True)
class Setting:
    """What a stored sample depends on; a file of another setting is not continued."""

    model: str
    score: str
    decide: str
    sink_tokens: int
    recent_tokens: int
    last_queries: int
    data_sha256: str
    max_tokens: int


@dataclass(frozen=True)
class Choice:
    """The chosen layers and their evidence.

    lazy_layers: sorted. counts: per layer, in how many samples it was among the laziest. mean: per layer, its
    mean laziness. samples: how many there were.
    """

    lazy_layers: tuple[int, ...]
    counts: tuple[int, ...]
    mean: tuple[float, ...]
    samples: int


def laziest(laziness: Sequence[float], keep: int) -> tuple[int, ...]:
    """All layers but the ``keep`` least lazy ones; among equals the higher index is lazy, as in the queue."""
    order = sorted(range(len(laziness)), key=lambda layer: (laziness[layer], layer))
    return tuple(sorted(order[keep:]))


def choose_layers(laziness: Sequence[Sequence[float]], keep: int) -> Choice:
    """Count, and take the most frequent ones; ties go to the higher mean laziness, then the higher index.

    Args:
        laziness: per sample, per layer; higher is lazier.
        keep: layers that stay full.

    Raises:
        LightTransferError: without samples, or if ``keep`` is not a number of layers below all.
    """
    if not laziness:
        raise LightTransferError("calibrate: no sample is longer than sink + recent tokens; none was counted")
    layers = len(laziness[0])
    if not 1 <= keep < layers:
        raise LightTransferError(f"--lt-keep: {keep} of {layers} layers; 1 to {layers - 1} can stay full")
    counts = [0] * layers
    for scores in laziness:
        for layer in laziest(scores, keep):
            counts[layer] += 1
    mean = [sum(scores[layer] for scores in laziness) / len(laziness) for layer in range(layers)]
    order = sorted(range(layers), key=lambda layer: (counts[layer], mean[layer], layer))
    return Choice(tuple(sorted(order[keep:])), tuple(counts), tuple(mean), len(laziness))


def read_samples(path: Path, tokenizer: Tokenizer, count: int, max_tokens: int, seed: int) -> list[Sample]:
    """``count`` lines of a JSON lines file, drawn by ``seed``, as token ids.

    Longer ones than ``max_tokens`` lose their beginning. A line has ``text``, or ``question`` and ``answer``
    (also prompt / response, input / output). Raises LightTransferError that names the line.
    """
    lines = records(path, "--data")
    drawn = sorted(rng_of(seed, "calibrate").sample(range(len(lines)), min(count, len(lines))))
    samples = []
    for number in drawn:
        line = lines[number]
        names = next((names for names in FIELDS if all(name in line for name in names)), None)
        if names is None:
            known = " or ".join(" + ".join(names) for names in FIELDS)
            raise LightTransferError(f"--data {path}: record {number} has neither {known}")
        wrong = next((name for name in names if not isinstance(line[name], str)), None)
        if wrong is not None:
            raise LightTransferError(f"--data {path}: record {number}: {wrong} is no text")
        text = "\n".join(line[name] for name in names)
        ids = [*tokenizer.prefix, *tokenizer.encode(text)]
        samples.append(Sample(number, tuple(ids[-max_tokens:])))
    return samples


def sha256_of(path: Path) -> str:
    """SHA-256 of the file's bytes."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


class Journal:
    """The samples measured so far, one JSON line each, after a first line with their setting.

    Raises:
        LightTransferError: the file is of another setting, and names what differs.
    """

    def __init__(self, path: Path, setting: Setting) -> None:
        self._path = path
        self.laziness: dict[int, tuple[float, ...] | None] = {}
        if not path.exists():
            path.write_text(json.dumps(asdict(setting)) + "\n", encoding="utf-8")
            return
        text = path.read_text(encoding="utf-8")
        first, *lines = text.splitlines() or [""]
        known = _object(first)
        if known is None or known.keys() != asdict(setting).keys():
            raise LightTransferError(f"{path}: is no journal of calibrate's; give another --journal or --out")
        for name, value in asdict(setting).items():
            if known.get(name) != value:
                raise LightTransferError(
                    f"{path}: holds samples with {name} {known.get(name)!r}, not {value!r}; delete it, or "
                    "give another --out"
                )
        if not text.endswith("\n"):
            # A run was cut off within the last line, which may be the first.
            text = text[: text.rfind("\n") + 1] if lines else text + "\n"
            lines = lines[:-1]
            path.write_text(text, encoding="utf-8")
        for line in lines:
            sample = _object(line)
            if sample is None or sample.keys() != {"number", "laziness"}:
                raise LightTransferError(f"{path}: holds a line that is no sample; delete it")
            scores = sample["laziness"]
            self.laziness[sample["number"]] = None if scores is None else tuple(scores)

    def add(self, sample: Sample, laziness: tuple[float, ...] | None) -> None:
        """Store one sample; None if it was too short to tell."""
        self.laziness[sample.number] = laziness
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"number": sample.number, "laziness": laziness}) + "\n")


def _object(line: str) -> dict[str, Any] | None:
    """The sample in a line of JSON; None if the line holds none."""
    try:
        found = json.loads(line)
    except json.JSONDecodeError:
        return None
    return found if isinstance(found, dict) else None


def measure(
    endpoint: Endpoint, samples: Sequence[Sample], journal: Journal, progress: Progress[Any] = silent
) -> list[tuple[float, ...]]:
    """The laziness of every sample that is long enough, in the order of the file.

    Samples in the journal are not measured again. Raises LightTransferError, also for a server that is not
    in dynamic mode.
    """
    todo = [sample for sample in samples if sample.number not in journal.laziness]
    batches = [todo[start : start + BATCH] for start in range(0, len(todo), BATCH)]
    for batch in progress(batches, len(batches)):
        told = endpoint.decide([sample.ids for sample in batch])
        for sample, decision in zip(batch, told, strict=True):
            if decision is None:
                raise LightTransferError(
                    f"{endpoint.name}: tells no lazy layers; calibrate needs a server with --lt-mode dynamic"
                )
            journal.add(sample, decision.laziness)
    found = (journal.laziness[sample.number] for sample in samples)
    return [scores for scores in found if scores is not None]

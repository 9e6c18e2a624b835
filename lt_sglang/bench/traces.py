"""Public traces: lengths, arrival times and shared prefixes of real traffic, without its text.

The files are not part of the package. Where one is missing, a seeded generator takes its place; it draws from
the quantiles in ``fits/``, which ``python -m lt_sglang.bench.traces NAME FILE`` takes from the file.
Prefixes are lists of block ids, 512 tokens each, as in Mooncake's format: equal ids are equal text.

Sources: Mooncake (FAST25 release, conversation trace, Apache-2.0); Azure Public Dataset (LLM inference trace
2023, conversations, CC-BY 4.0).
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from lt_sglang.errors import LightTransferError

BLOCK_TOKENS = 512
# Dense at the ends, where traffic differs most.
PROBABILITIES = (0.0, 0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 0.999, 1.0)
# How far back a generated request looks for one whose prefix it continues.
RECENT_REQUESTS = 200


@dataclass(frozen=True)
class Row:
    """One request of a trace: seconds since its beginning, tokens, and the blocks of its prompt.

    blocks: empty where the trace does not say what requests share.
    """

    at: float
    input_tokens: int
    output_tokens: int
    blocks: tuple[int, ...] = ()


@dataclass(frozen=True)
class Fit:
    """What a generator needs: values at PROBABILITIES.

    gap: seconds between arrivals. shared: share of a prompt's blocks that an earlier prompt began with.
    """

    source: str
    requests: int
    input_tokens: tuple[float, ...]
    output_tokens: tuple[float, ...]
    gap: tuple[float, ...]
    shared: tuple[float, ...]


def rows(source: str, path: Path, seed: int) -> Iterator[Row]:
    """The trace at ``path``, or, where there is no such file, an endless one drawn from its fit."""
    if path.is_file():
        yield from read(source, path)
    else:
        yield from generate(load_fit(source), seed)


def read(source: str, path: Path) -> list[Row]:
    """The whole trace; raises LightTransferError if the file is not of that format."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            found = list(_READERS[source](file))
    except (OSError, ValueError, KeyError) as error:
        raise LightTransferError(f"{path}: not the {source} trace ({error!r})") from None
    if not found:
        raise LightTransferError(f"{path}: the {source} trace is empty")
    return found


def fit(source: str, trace: Sequence[Row]) -> Fit:
    """Quantiles of a trace."""
    gaps = np.diff([row.at for row in trace])
    gap = _quantiles(gaps)
    # Most gaps of a trace in bursts are 0, so the few others must not be blurred: keep the rate.
    blurred = float(np.trapezoid(gap, PROBABILITIES))
    return Fit(
        source,
        len(trace),
        _quantiles([row.input_tokens for row in trace]),
        _quantiles([row.output_tokens for row in trace]),
        tuple(round(value * float(gaps.mean()) / blurred, 4) for value in gap),
        _quantiles(list(_shared_shares(trace))),
    )


def load_fit(source: str) -> Fit:
    """The fit that ships with the package."""
    file = resources.files(__package__) / "fits" / f"{source}.json"
    data: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return Fit(**{**data, **{key: tuple(value) for key, value in data.items() if isinstance(value, list)}})


def generate(fitted: Fit, seed: int) -> Iterator[Row]:
    """Endless requests whose lengths, gaps and prefix shares have the fit's quantiles."""
    rng = np.random.default_rng(seed)
    at, next_block = 0.0, 0
    recent: list[tuple[int, ...]] = []
    while True:
        tokens = max(1, round(_draw(rng, fitted.input_tokens)))
        count = -(-tokens // BLOCK_TOKENS)
        shared = round(_draw(rng, fitted.shared) * count)
        blocks: tuple[int, ...] = ()
        if fitted.shared[-1] > 0:
            # Only a prompt at least that long can have been continued.
            candidates = [one for one in recent if len(one) >= shared] if shared else []
            if candidates:
                blocks = candidates[rng.integers(len(candidates))][:shared]
            fresh = range(next_block, next_block + count - len(blocks))
            next_block = fresh.stop
            blocks += tuple(fresh)
            recent = [*recent[1 - RECENT_REQUESTS :], blocks]
        yield Row(at, tokens, max(1, round(_draw(rng, fitted.output_tokens))), blocks)
        at += _draw(rng, fitted.gap)


def _draw(rng: np.random.Generator, quantiles: Sequence[float]) -> float:
    return float(np.interp(rng.random(), PROBABILITIES, quantiles))


def _quantiles(values: Sequence[float] | np.ndarray) -> tuple[float, ...]:
    return tuple(round(float(value), 4) for value in np.quantile(np.asarray(values), PROBABILITIES))


def _shared_shares(trace: Sequence[Row]) -> Iterator[float]:
    seen: set[int] = set()
    for row in trace:
        known = 0
        for block in row.blocks:
            if block not in seen:
                break
            known += 1
        seen.update(row.blocks)
        yield known / len(row.blocks) if row.blocks else 0.0


def _read_mooncake(lines: Iterator[str]) -> Iterator[Row]:
    for line in lines:
        data = json.loads(line)
        yield Row(
            data["timestamp"] / 1000, data["input_length"], data["output_length"], tuple(data["hash_ids"])
        )


def _read_azure(lines: Iterator[str]) -> Iterator[Row]:
    first: datetime | None = None
    for line in csv.DictReader(lines):
        # Seven digits after the point; datetime reads six.
        at = datetime.fromisoformat(line["TIMESTAMP"][:26])
        first = first or at
        yield Row(
            (at - first).total_seconds(),
            max(1, int(line["ContextTokens"])),
            max(1, int(line["GeneratedTokens"])),
        )


_READERS = {"mooncake": _read_mooncake, "azure": _read_azure}


def main(arguments: Sequence[str]) -> int:
    """Write the fit of a trace into the package."""
    if len(arguments) != 2 or arguments[0] not in _READERS:
        print(f"usage: python -m lt_sglang.bench.traces {{{','.join(_READERS)}}} FILE", file=sys.stderr)
        return 2
    source, path = arguments
    target = Path(__file__).parent / "fits" / f"{source}.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(asdict(fit(source, read(source, Path(path)))), indent=1) + "\n")
    print(target)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

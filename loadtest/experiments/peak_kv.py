"""The most KV memory that a server holds while it prefills one long prompt: units of the real allocator.

    python -m loadtest.experiments.peak_kv OUT [--rehearse]

The paper cuts each layer as it is popped, so that a prefill peaks at P + 1 layers of K and V. Here a prompt
is prefilled in one chunk and in several, in static and in dynamic mode and by stock SGLang, each on a CPU
server of its own with nothing else in it. A second plug-in (``watch``) stands beside ours in the scheduler.
It notes at each allocation how much is in use, and how much of it the prefix cache would not give back: that
is what the prompt needs, and what admission reckons with (``Demand.of_new``). The rest is cached on the way:
a window at the end of each chunk, as long as nobody else wants it. OUT/report.json is a result file:
peaks in bytes, and in layers of the prompt (bytes over those of all its tokens in one layer).

--rehearse: static mode in chunks alone, a shorter prompt.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import random
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from loadtest.experiments.offline import stamped
from lt_sglang.memory.demand import Demand

FILE_VARIABLE, WATCH = "LT_KV_WATCH", "loadtest.experiments.peak_kv:watch"
SINKS, RECENT, KEEP = 4, 60, 3
PROMPT, CHUNK, REHEARSED = 2048, 256, 768
OUTPUT = 1
STATIC: dict[str, Any] = {"lazy_layers": [1, 3, 5]}
DYNAMIC: dict[str, Any] = {"mode": "dynamic", "keep": KEEP}
# What each server is told of its lazy layers; None: stock SGLang.
MODES: dict[str, Mapping[str, Any] | None] = {
    "stock": None,
    "static": STATIC,
    "dynamic": DYNAMIC,
    "dynamic, first chunk": {**DYNAMIC, "decide": "first-chunk"},
}


@dataclass(frozen=True)
class Peak:
    """units: at once, at most; of them, by kind of slots: full, streaming, sinks (slots of stock)."""

    units: int
    full: int
    streaming: int = 0
    sinks: int = 0


@dataclass(frozen=True)
class Peaks:
    """in_use: what is not free. needed: and would not be given back by the prefix cache."""

    in_use: Peak
    needed: Peak

    @classmethod
    def read(cls, file: Path) -> Peaks:
        """What ``watch`` wrote."""
        written = json.loads(file.read_text(encoding="utf-8"))
        return cls(**{name: Peak(**peak) for name, peak in written.items()})


def watch() -> None:
    """A plug-in of SGLang's: write the peaks to the file named by LT_KV_WATCH, whenever one rises."""
    from sglang.srt.mem_cache.allocator.token import TokenToKVPoolAllocator

    from lt_sglang.memory.allocator import ElasticAllocator
    from lt_sglang.memory.units import UnitList

    file = Path(os.environ[FILE_VARIABLE])
    peaks: dict[str, Peak] = {}

    def note(**found: Peak) -> None:
        higher = {
            name: peak for name, peak in found.items() if name not in peaks or peak.units > peaks[name].units
        }
        if not higher:
            return
        peaks.update(higher)
        written = file.with_suffix(".part")
        written.write_text(json.dumps({name: asdict(peak) for name, peak in peaks.items()}), encoding="utf-8")
        written.replace(file)

    allocators: list[ElasticAllocator] = []
    made, take, alloc = ElasticAllocator.__init__, UnitList.take, TokenToKVPoolAllocator.alloc

    @functools.wraps(made)
    def remembered(self: Any, *args: Any, **kwargs: Any) -> None:
        made(self, *args, **kwargs)
        allocators.append(self)

    @functools.wraps(take)
    def taken(self: Any, *args: Any) -> Any:
        first = take(self, *args)
        for owner in allocators:
            units, tree, store = owner.units.size - len(owner.units), owner.tree_cache, owner.sink_store
            full, streaming, sinks = owner.full_used, owner.swa_attn_allocator.used, owner.sinks.used
            needed = in_use = Peak(units, full, streaming, sinks)
            if tree is not None and store is not None:
                needed = Peak(
                    units - owner.evictable_units(tree),
                    full - tree.full_evictable_size(),
                    streaming - tree.swa_evictable_size(),
                    sinks - store.droppable * store.slots_of_set,
                )
            note(in_use=in_use, needed=needed)
        return first

    @functools.wraps(alloc)
    def allocated(self: Any, need_size: int) -> Any:
        slots = alloc(self, need_size)
        if not allocators:
            used = self.size - self.available_size()
            note(in_use=Peak(used, used), needed=Peak(used, used))
        return slots

    ElasticAllocator.__init__ = remembered  # type: ignore[method-assign]
    UnitList.take = taken  # type: ignore[method-assign, assignment]
    TokenToKVPoolAllocator.alloc = allocated


def measure(mode: str, prompt: int, chunk: int, folder: Path) -> dict[str, Any]:
    """Prefill one prompt on a server of its own; the row of a report."""
    from tests.engine.models import COMMON, FIRST_TOKEN, NUM_LAYERS, VOCAB_SIZE, ensure_model
    from tests.engine.server import ServerSpec, running
    from tests.engine.server_kinds import kv_bytes

    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "peak"
    file.unlink(missing_ok=True)
    room = 2 * prompt + 1000
    lazy = MODES[mode]
    if lazy is not None:
        lazy = {**lazy, "sink_tokens": SINKS, "recent_tokens": RECENT, "kv_bytes": kv_bytes(room, 1)}
    spec = ServerSpec(
        "peak",
        lambda: ensure_model("llama"),
        lazy,
        (
            *("--chunked-prefill-size", str(chunk), "--max-total-tokens", str(room)),
            *("--context-length", "4096", "--max-running-requests", "4", "--mem-fraction-static", "0.3"),
        ),
        env={FILE_VARIABLE: str(file)},
        beside=WATCH,
    )
    rng = random.Random(5)
    tokens = [rng.randrange(FIRST_TOKEN, VOCAB_SIZE) for _ in range(prompt)]
    with running(spec, folder) as server:
        server.flush_cache()
        server.generate(tokens, OUTPUT)
        memory = None if lazy is None else server.lighttransfer()["memory"]
    peaks = Peaks.read(file)
    token_layer = COMMON["num_key_value_heads"] * 2 * COMMON["head_dim"] * 4
    unit_bytes = NUM_LAYERS * token_layer if memory is None else memory["unit_bytes"]
    row: dict[str, Any] = {
        "mode": mode,
        "prompt": prompt,
        "chunk": chunk,
        "chunks": -(-prompt // chunk),
        "unit_bytes": unit_bytes,
    }
    for name, peak in vars(peaks).items():
        held = peak.units * unit_bytes
        layers = round(held / (prompt * token_layer), 3)
        row[name] = {**asdict(peak), "bytes": held, "layers_of_the_prompt": layers}
    if memory is not None:
        demand = Demand.from_dict(memory["demand"])
        row |= {"demand": memory["demand"], "reckoned_units": demand.of_new(prompt, OUTPUT)}
    return row


def main() -> int:
    """Every server after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rehearse", action="store_true")
    args = parser.parse_args()
    out = args.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    prompt = REHEARSED if args.rehearse else PROMPT
    report = stamped(
        "peak-kv",
        "the most KV memory in use while one prompt is prefilled, alone on a server",
        model="tiny llama, 6 layers, 3 of them lazy",
        tokens=prompt,
        windows=[SINKS, RECENT],
    )
    report["rows"] = []
    runs = [("static", CHUNK)] if args.rehearse else [(mode, c) for mode in MODES for c in (prompt, CHUNK)]
    for number, (mode, chunk) in enumerate(runs):
        row = measure(mode, prompt, chunk, out / str(number))
        report["rows"].append(row)
        print(json.dumps({key: value for key, value in row.items() if key != "demand"}), flush=True)
        (out / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

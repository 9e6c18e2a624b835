"""lt_sglang.layers.layer_sets: by hand, and by seeded churn against a simple model."""

from __future__ import annotations

import random
from array import array
from collections import OrderedDict
from dataclasses import dataclass

import pytest
import torch

from lt_sglang.layers.layer_sets import DEFAULT_SET, UNDECIDED, LayerSet, LayerSetStore, banks
from lt_sglang.layers.prefix_index import PromptStart, prompt_start

LAYERS = 6
ROWS = 12
LAZY = (0, 4, 5)


def store(capacity: int = 4) -> LayerSetStore:
    return LayerSetStore(capacity, LAZY, LAYERS, ROWS, "cpu")


def key(name: str) -> PromptStart:
    return prompt_start(array("q", list(f"{name} and what follows".encode())), 4, (None, None))


def first(sets: LayerSetStore, name: str) -> LayerSet | None:
    return next(sets.find(key(name)), None)


def decided(sets: LayerSetStore, request: str, block: str) -> None:
    sets.create(request, key(block))
    sets.mark_known(request)


def test_banks_of_a_known_list() -> None:
    assert banks((0, 4, 5), 6) == [3, 0, 1, 2, 4, 5]
    rng = random.Random(1)
    for _ in range(100):
        layers = rng.randint(2, 40)
        lazy = sorted(rng.sample(range(layers), rng.randint(1, layers - 1)))
        found = banks(lazy, layers)
        keep = layers - len(lazy)
        assert sorted(found) == list(range(layers))
        assert [layer for layer in range(layers) if found[layer] >= keep] == lazy


def test_tables_are_where_and_what_they_are_said_to_be() -> None:
    """Whatever SGLang has made torch's default while it loads a model."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        sets = LayerSetStore(4, LAZY, LAYERS, ROWS, "meta")
    finally:
        torch.set_default_dtype(default)
    tables = {name: value for name, value in vars(sets).items() if isinstance(value, torch.Tensor)}
    assert {name: (tuple(table.shape), table.dtype) for name, table in tables.items()} == {
        "bank_of": ((4, LAYERS), torch.int32),
        "laziness": ((4, LAYERS), torch.float32),
        "set_of": ((ROWS,), torch.int32),
        "lazy_counts": ((LAYERS,), torch.int64),
        "laziness_sums": ((LAYERS + 1,), torch.float64),
    }
    assert {table.device.type for table in tables.values()} == {"meta"}


def test_set_0_is_the_configured_list() -> None:
    sets = store()
    sets.use_default("a")
    assert sets.of("a") is sets.default
    assert sets.describe("a") == {"lazy_layers": list(LAZY), "laziness": None, "origin": "default"}
    assert (sets.bank_of[1:] == UNDECIDED).all()
    sets.release("a", 3)
    assert sets.requests == 0 and sets.of("a") is None and sets.check_integrity() == []
    sets.use_default("b")
    sets.use_default("probe", counted=False)
    assert sets.stats.short == 2


def test_what_a_request_is_told() -> None:
    sets = store()
    decided(sets, "a", "block")
    entry = sets.of("a")
    assert entry is not None
    sets.bank_of[entry.index] = sets.bank_of[DEFAULT_SET].flip(0)
    sets.laziness[entry.index] = 0.1234567
    assert sets.describe("a") is None, "not known before its forward was queued"
    sets.bring()
    sets.bank_of[entry.index] = -1  # what was brought is its own copy
    told = {"lazy_layers": [0, 1, 5], "laziness": [0.123457] * LAYERS}
    assert sets.describe("a") == {**told, "origin": "prompt"}
    sets.inherit("b", entry, key("block"))
    sets.inherit("c", entry, key("block"))
    assert sets.describe("b") == {**told, "origin": "prefix"} and sets.stats.inherited == 2
    assert sets.describe("a") == {**told, "origin": "prompt"}


def test_all_that_were_decided_are_found() -> None:
    """Users who begin alike have sets of their own; the last used comes first."""
    sets = store()
    one, two = sets.create("a", key("same")), sets.create("b", key("same"))
    assert first(sets, "same") is None, "nothing to inherit before it is decided"
    sets.mark_known("b")
    assert list(sets.find(key("same"))) == [two]
    sets.mark_known("a")
    assert list(sets.find(key("same"))) == [one, two] and one.stored and two.stored
    assert (sets.stats.decided, sets.stored) == (2, 2)
    for name in "ab":
        sets.release(name, 1)
    assert list(sets.find(key("same"))) == [one, two], "they stay for those that begin alike"
    sets.inherit("c", two, key("same"))
    assert list(sets.find(key("same"))) == [two, one]
    assert sets.check_integrity() == []


def test_a_stored_set_forgets_who_used_it() -> None:
    """It may live as long as the server."""
    sets = store()
    decided(sets, "a", "a")
    entry = sets.of("a")
    assert entry is not None
    sets.inherit("b", entry, key("block"))
    for name in "ab":
        sets.release(name, None)
    assert not entry.users and not entry.heirs and entry.stored


def test_a_set_that_is_not_stored_is_free_once_released() -> None:
    sets = store(capacity=2)
    for number in range(5):
        sets.create(f"aborted-{number}", key("x"))
        sets.release(f"aborted-{number}", None)
    assert sets.stored == sets.requests == 0 and sets.check_integrity() == []


def test_uids_are_never_used_twice() -> None:
    """The prefix cache is entered under them: K and V of an evicted set must not be found again."""
    sets = store(capacity=2)
    uids = set()
    for number in range(20):
        decided(sets, f"r{number}", f"block {number}")
        entry = sets.of(f"r{number}")
        assert entry is not None
        uids.add(entry.uid)
        sets.release(f"r{number}", 1)
    assert len(uids) == 20 and sets.default.uid not in uids
    assert sets.stats.evicted == 19


def test_who_found_a_set_that_is_gone_by_now_is_told() -> None:
    sets = store(capacity=2)
    decided(sets, "a", "a")
    entry = first(sets, "a")
    assert entry is not None and entry.stored
    sets.release("a", None)
    decided(sets, "b", "b")
    assert not entry.stored
    with pytest.raises(AssertionError):
        sets.inherit("c", entry, key("a"))


def test_the_least_recently_used_idle_set_makes_room() -> None:
    sets = store(capacity=4)
    for name in "abc":
        decided(sets, name, name)
    for name in "ac":
        sets.release(name, None)
    entry = first(sets, "a")
    assert entry is not None
    sets.inherit("a2", entry, key("a"))
    sets.release("a2", None)
    sets.create("d", key("d"))
    assert first(sets, "c") is None, "b is in use, a was used last"
    assert first(sets, "a") is not None and first(sets, "b") is not None
    assert sets.check_integrity() == []


def test_more_running_requests_than_sets_is_an_error() -> None:
    sets = store(capacity=3)
    decided(sets, "a", "a")
    sets.create("b", key("b"))
    with pytest.raises(RuntimeError, match="all 3 layer sets are in use"):
        sets.create("c", key("c"))


def test_clear_keeps_the_sets_of_running_requests() -> None:
    sets = store(capacity=3)
    decided(sets, "a", "a")
    decided(sets, "b", "b")
    sets.release("b", None)
    sets.clear()
    assert sets.stored == 0 and first(sets, "a") is None
    assert sets.of("a") is not None and sets.check_integrity() == []
    # The same prompt may be decided again meanwhile; the old set is nobody else's.
    decided(sets, "a2", "a")
    assert list(sets.find(key("a"))) == [sets.of("a2")]
    sets.release("a", 1)
    assert sets.check_integrity() == []
    decided(sets, "c", "c")
    assert sets.check_integrity() == []


def test_rows_are_written_at_the_flush() -> None:
    sets = store()
    decided(sets, "a", "a")
    entry = sets.of("a")
    assert entry is not None
    sets.place("a", 5)
    assert sets.set_of.tolist() == [DEFAULT_SET] * ROWS
    sets.flush()
    assert int(sets.set_of[5]) == entry.index
    sets.release("a", 5)
    assert int(sets.set_of[5]) == entry.index, "a forward may still read it"
    # The row is another request's before the next flush.
    sets.create("b", key("b"))
    sets.place("b", 5)
    sets.flush()
    other = sets.of("b")
    assert other is not None and int(sets.set_of[5]) == other.index != entry.index
    sets.release("b", 5)
    sets.flush()
    assert sets.set_of.tolist() == [DEFAULT_SET] * ROWS


def test_finished_requests_are_counted_with_their_scores() -> None:
    """By lazy layer, and their scores where a prompt decided; a default list has none."""
    sets = store()
    decided(sets, "a", "block")
    entry = sets.of("a")
    assert entry is not None
    sets.bank_of[entry.index] = torch.tensor([0, 1, 2, 3, 4, 5])
    sets.laziness[entry.index] = torch.tensor([0.5, -1.0, 0.0, 2.0, 1.0, 0.25])
    sets.inherit("b", entry, key("block"))
    sets.use_default("c")
    for request in "abc":
        sets.count(request)
    assert sets.finished.read() == [0] * LAYERS, "the device is not asked for each"
    sets.count_finished()
    assert sets.finished.read() == [1, 0, 0, 2, 3, 3]
    assert sets.scored.read() == [1.0, -2.0, 0.0, 4.0, 2.0, 0.5, 2.0]
    sets.flush()
    assert sets.scored.read()[-1] == 2


def test_releasing_twice_or_an_unknown_request_does_nothing() -> None:
    sets = store()
    sets.release("nobody", 3)
    decided(sets, "a", "a")
    sets.release("a", 3)
    sets.release("a", 3)
    assert sets.check_integrity() == [] and sets.requests == 0


def _break_doubled(sets: LayerSetStore) -> None:
    sets._free.append(sets._of_request["a"].index)


def _break_filed(sets: LayerSetStore) -> None:
    (entry,) = sets._stored.values()
    sets._stored = OrderedDict({entry.uid + 1: entry})


def _break_hidden(sets: LayerSetStore) -> None:
    sets._index.clear()


def _break_uncounted(sets: LayerSetStore) -> None:
    sets._of_request["a"].users.clear()


def _break_leaked(sets: LayerSetStore) -> None:
    sets.default.users.add("ghost")


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (_break_doubled, "lost or doubled"),
        (_break_filed, "not its own"),
        (_break_hidden, "1 layer sets are stored, 0 can be found"),
        (_break_uncounted, "does not count it"),
        (_break_leaked, "count 2 requests, 1 use one"),
    ],
)
def test_the_check_finds_damage(damage, says: str) -> None:
    sets = store()
    decided(sets, "a", "a")
    assert sets.check_integrity() == []
    damage(sets)
    assert says in "; ".join(sets.check_integrity())


@dataclass
class Running:
    """A request of the churn: its row, the set index it was given, and whether it is decided."""

    block: str | None
    row: int
    index: int
    decided: bool


@pytest.mark.parametrize("seed", range(4))
def test_churn(seed: int) -> None:
    """Any order of events: nothing lost, running requests keep their set, rows say what is running."""
    rng = random.Random(seed)
    sets = store(capacity=ROWS + 3)
    running: dict[str, Running] = {}
    known: dict[str, list[int]] = {}  # prompt -> uids of the sets that may be found by it
    for step in range(3000):
        event = rng.random()
        free_rows = [row for row in range(1, ROWS) if row not in {r.row for r in running.values()}]
        if event < 0.45 and free_rows:
            name, row = f"r{step}", rng.choice(free_rows)
            block = rng.choice([None, *"abcdefghijklmnopqrst"])
            found = [] if block is None else list(sets.find(key(block)))
            assert sorted(entry.uid for entry in found) == sorted(known.get(block or "", []))
            if block is None:
                sets.use_default(name)
            elif found and rng.random() < 0.8:
                sets.inherit(name, rng.choice(found), key(block))
            else:
                sets.create(name, key(block))
                left = {entry.uid for entry in sets._stored.values()}
                known = {b: [u for u in uids if u in left] for b, uids in known.items()}
            entry = sets.of(name)
            assert entry is not None
            sets.place(name, row)
            running[name] = Running(block, row, entry.index, entry.known)
        elif event < 0.65 and (undecided := [n for n, r in running.items() if not r.decided]):
            name = rng.choice(undecided)
            sets.mark_known(name)
            running[name].decided = True
            entry = sets.of(name)
            assert entry is not None and running[name].block is not None
            known.setdefault(str(running[name].block), []).append(entry.uid)
        elif event < 0.95 and running:
            name = rng.choice(list(running))
            sets.release(name, running.pop(name).row)
        elif event < 0.96:
            sets.clear()
            known = {}
        assert sets.check_integrity() == []
        assert sets.requests == len(running) and sets.stored == sum(map(len, known.values()))
        indices = {}
        for name, request in running.items():
            entry = sets.of(name)
            assert entry is not None and entry.index == request.index
            assert indices.setdefault(entry.index, entry) is entry, "two sets in one row of the table"
        if rng.random() < 0.3:
            sets.flush()
            expected = [DEFAULT_SET] * ROWS
            for request in running.values():
                expected[request.row] = request.index
            assert sets.set_of.tolist() == expected
    for name, request in running.items():
        sets.release(name, request.row)
    sets.clear()
    assert sets.requests == sets.stored == 0 and sets.check_integrity() == []

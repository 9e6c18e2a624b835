"""lt_sglang.layers.prefix_index: who begins like whom, by hand and against a scan of all that was filed."""

from __future__ import annotations

import os
import random
import sys
from array import array
from collections import Counter
from collections.abc import Callable
from itertools import islice
from types import FrameType
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from lt_sglang.layers import prefix_index as module
from lt_sglang.layers.prefix_index import MOST_PROMPTS, PrefixIndex, PromptStart, prompt_start

BLOCK = 64


def begin(tokens: list[int], block: int = BLOCK, owner: str | None = None) -> PromptStart:
    return prompt_start(array("q", tokens), block, (owner, None))


def tokens(rng: random.Random, length: int) -> list[int]:
    return [rng.randrange(50000) for _ in range(length)]


def test_a_prompt_is_found_if_its_first_block_and_its_owner_agree() -> None:
    rng = random.Random(1)
    prompt = tokens(rng, BLOCK + 100)
    index = PrefixIndex()
    index.file(7, begin(prompt, owner="one"))
    for changed in (0, BLOCK - 1, BLOCK, len(prompt) - 1):
        other = list(prompt)
        other[changed] += 1
        assert list(index.find(begin(other, owner="one"))) == ([7] if changed >= BLOCK else [])
    assert list(index.find(begin(prompt, owner="two"))) == []
    assert list(index.find(begin(prompt[: BLOCK + 1], owner="one"))) == [7]


def test_tokens_of_another_width_are_other_tokens() -> None:
    """Two arrays of the same bytes are not the same prompt."""
    index = PrefixIndex()
    index.file(1, prompt_start(array("q", [1] * 8), 4, None))
    narrow = array("i", array("q", [1] * 8).tobytes())
    assert list(index.find(prompt_start(narrow, 8, None))) == []


def test_a_conversation_is_found_among_all_that_share_its_system_prompt() -> None:
    """Whatever its length, and though others were there later."""
    rng = random.Random(2)
    system = tokens(rng, 1600)
    index = PrefixIndex()
    turns = [system + tokens(rng, rng.choice([1, 5, 60, 512, 1031])) for _ in range(200)]
    for key, turn in enumerate(turns):
        index.file(key, begin(turn))
    for key in rng.sample(range(200), 50):
        following = turns[key] + tokens(rng, rng.choice([1, 30, 512, 900]))
        assert next(index.find(begin(following))) == key
        assert next(index.find(begin(turns[key]))) == key
        if len(turns[key]) > len(system) + 5:
            assert next(index.find(begin(turns[key][:-1]))) == key, "also of one that ends earlier"
    everyone = list(index.find(begin(system + [7])))
    assert sorted(everyone) == list(range(200)), "each once"
    assert list(index.find(begin(tokens(rng, 2000)))) == []


def test_of_equals_the_one_that_is_continued_then_the_last_used() -> None:
    rng = random.Random(3)
    trunk = tokens(rng, BLOCK + 40)
    index = PrefixIndex()
    index.file(0, begin(trunk))
    for key in (1, 2, 3):
        index.file(key, begin(trunk + [key] + tokens(rng, 50)))
    assert list(index.find(begin(trunk + [9]))) == [0, 3, 2, 1]
    assert list(index.find(begin(trunk + [2, 9]))) == [2, 0, 3, 1]
    index.file(1, begin(trunk + [1, 5]))
    assert list(index.find(begin(trunk[:-1]))) == [1, 3, 2, 0]
    index.file(3, begin(trunk))
    assert list(index.find(begin(trunk + [9]))) == [3, 0, 1, 2]
    index.drop(3)
    assert list(index.find(begin(trunk + [9]))) == [0, 1, 2]


def test_agreement_counts_along_the_whole_way() -> None:
    """A prompt is compared with each stretch of the trie where it has come to, not with its own beginning."""
    trunk = list(range(100, 100 + BLOCK + 3))
    index = PrefixIndex()
    index.file(0, begin(trunk + [4, 5, 6, 7, 8]))
    index.file(1, begin(trunk + [4, 5, 6]))
    index.file(2, begin(trunk + [4, 5, 6, 9]))
    index.file(3, begin(trunk + [0]))
    assert list(index.find(begin(trunk + [4, 5, 6, 7, 8, 1]))) == [0, 1, 2, 3]
    assert list(index.find(begin(trunk + [4, 5, 6, 9, 1]))) == [2, 1, 0, 3]
    assert list(index.find(begin(trunk + [4, 5]))) == [2, 1, 0, 3]


def test_how_many_tokens_agree() -> None:
    """Within an edge, at its end, beyond everything; of any width."""
    trunk = list(range(100, 100 + BLOCK + 3))
    index = PrefixIndex()
    assert index.agreed(begin(trunk)) == 0
    index.file(0, begin(trunk + [4, 5, 6, 7, 8]))
    index.file(1, begin(trunk + [4, 5, 9]))
    for more, agreed in (([4, 5, 6, 7, 8, 1], 5), ([4, 5, 6, 1], 3), ([4, 5, 1], 2), ([4, 5], 2), ([1], 0)):
        assert index.agreed(begin(trunk + more)) == len(trunk) + agreed
    assert index.agreed(begin(trunk[:BLOCK] + [1])) == BLOCK
    assert index.agreed(begin([1] + trunk[1:])) == 0
    assert index.agreed(begin(trunk, owner="another")) == 0
    index.clear()
    assert index.agreed(begin(trunk)) == 0


def test_what_is_dropped_leaves_nothing() -> None:
    rng = random.Random(4)
    index = PrefixIndex()
    prompts = [tokens(rng, BLOCK + 1500) for _ in range(5)]
    for key in range(5):
        for prompt in prompts[key:]:
            index.file(key, begin(prompt))
    for key in range(5):
        assert key in index.keys
        index.drop(key)
        assert all(key not in set(index.find(begin(prompt))) for prompt in prompts)
    assert not index.keys and not index._roots and not index._long and index._bytes == 0


def test_a_key_that_everybody_uses_stays_small() -> None:
    """A document with a thousand questions, and longer and longer prompts."""
    rng = random.Random(5)
    document = tokens(rng, BLOCK + 500)
    index = PrefixIndex()
    for _ in range(1000):
        index.file(1, begin(last := document + tokens(rng, 20)))
    assert list(index.find(begin(last))) == list(index.find(begin(document))) == [1]
    assert index._bytes == 8 * (500 + 20 * MOST_PROMPTS)
    for _ in range(100):
        index.file(1, begin(document := document + tokens(rng, 20)))
    assert index._bytes == 8 * (500 + 100 * 20)
    index.drop(1)
    assert not index._roots and index._bytes == 0


def test_a_prompt_that_is_filed_again_is_not_the_next_to_be_forgotten() -> None:
    rng = random.Random(3)
    one, two, *others = (begin(tokens(rng, BLOCK + 1)) for _ in range(MOST_PROMPTS + 1))
    index = PrefixIndex()
    for prompt in (one, two, one, *others):
        index.file(7, prompt)
    assert list(index.find(one)) == [7] and list(index.find(two)) == []


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those used least recently are found by their first blocks only."""
    monkeypatch.setattr(module, "MOST_BYTES", 8 * 1000)
    rng = random.Random(6)
    block = tokens(rng, BLOCK)
    prompts = [block + tokens(rng, 300) for _ in range(6)]
    index = PrefixIndex()
    for key, prompt in enumerate(prompts):
        index.file(key, begin(prompt))
        assert index._bytes <= 8 * 1000
    assert index.keys == set(range(6))
    assert list(index.find(begin(block + [1]))) == [5, 4, 3, 2, 1, 0]
    assert next(index.find(begin(prompts[3]))) == 3
    assert next(index.find(begin(prompts[0]))) == 5, "of its prompt only the first block is known"
    index.file(0, begin(prompts[0]))
    assert next(index.find(begin(prompts[0]))) == 0
    assert list(index.find(begin(prompts[3]))) == [0, 5, 4, 3, 2, 1], "now it is 3 that was shortened"
    for key in range(6):
        index.drop(key)
    assert not index._roots and index._bytes == 0


def _work(search: Callable[[], Any]) -> int:
    """How many lines of the module a search runs."""
    lines = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal lines
        if frame.f_code.co_filename != module.__file__:
            return None
        lines += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        search()
    finally:
        sys.settrace(before)
    return lines


@pytest.mark.parametrize("behind", [2, 600])
def test_the_first_few_of_thousands_cost_no_more_than_of_few(behind: int) -> None:
    """A scheduler looks at every waiting prompt, and all of them may begin with one system prompt.

    Conversations that part soon after it, each found by its next turn, and users that were never there.
    """
    rng = random.Random(7)
    system = tokens(rng, BLOCK + 1000)
    work = {}
    for count in (64, 4096):
        index = PrefixIndex()
        turns = [system + [key] + tokens(rng, behind) for key in range(count)]
        for key, turn in enumerate(turns):
            index.file(key, begin(turn))
        old, new = begin(turns[5] + [1, 2, 3]), begin(system + [count])
        assert next(index.find(old)) == 5
        assert list(islice(index.find(new), 4)) == [count - 1, count - 2, count - 3, count - 4]
        work[count] = _work(lambda: [next(index.find(old)), *islice(index.find(new), 4)])  # noqa: B023
        work[-count] = _work(lambda: index.file(5, old)) + _work(lambda: index.drop(9))  # noqa: B023
    assert work[4096] == work[64] and work[-4096] == work[-64]


class Scan(RuleBasedStateMachine):
    """The index beside a list of everything filed, which is looked through from end to end.

    Nearly all tokens are the same, so that prompts agree for long, part within edges and end inside another.
    """

    BLOCKS = st.sampled_from([[0, 0]] * 7 + [[0, 1]])
    RESTS = st.lists(st.sampled_from([0, 0, 0, 1]), min_size=1, max_size=12)
    TOKENS = st.tuples(BLOCKS, RESTS).map(lambda parts: parts[0] + parts[1])
    OWNERS = st.sampled_from("aaaab")

    def __init__(self) -> None:
        super().__init__()
        self.index = PrefixIndex()
        self.filed: list[tuple[int, str, list[int]]] = []  # the last at the end

    @rule(many=st.lists(st.tuples(st.integers(0, 9), TOKENS, OWNERS), min_size=1, max_size=9))
    def file(self, many: list[tuple[int, list[int], str]]) -> None:
        for key, prompt, owner in many:
            self.file_one(key, prompt, owner)

    def file_one(self, key: int, prompt: list[int], owner: str) -> None:
        self.index.file(key, begin(prompt, 2, owner))
        mine = [one for one in self.filed if one[0] == key and one[1:] != (owner, prompt)]
        gone = [one for one in self.filed if one == (key, owner, prompt)]
        gone += mine[:1] if len(mine) == MOST_PROMPTS else []
        self.filed = [one for one in self.filed if one not in gone] + [(key, owner, prompt)]

    @precondition(lambda self: len(self.filed) > 5)
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted({key for key, _, _ in self.filed})))
        self.index.drop(key)
        self.filed = [one for one in self.filed if one[0] != key]

    @precondition(lambda self: len(self.filed) > 30)
    @rule()
    def clear(self) -> None:
        self.index.clear()
        self.filed = []

    @rule(prompt=TOKENS, owner=OWNERS)
    def find(self, prompt: list[int], owner: str) -> None:
        best: dict[int, tuple[int, bool, int]] = {}
        for time, (key, by, other) in enumerate(self.filed):
            if by == owner and other[:2] == prompt[:2]:
                common = next(
                    (i for i, (a, b) in enumerate(zip(prompt, other, strict=False)) if a != b),
                    min(len(prompt), len(other)),
                )
                rank = common, common == len(other), time
                best[key] = max(best.get(key, rank), rank)
        expected = sorted(best, key=lambda key: best[key], reverse=True)
        assert list(self.index.find(begin(prompt, 2, owner))) == expected
        longest = max((rank[0] for rank in best.values()), default=0)
        assert self.index.agreed(begin(prompt, 2, owner)) == longest

    @invariant()
    def nothing_is_left_over(self) -> None:
        """Every node has a use; children and ends are in the order of time; sizes add up."""
        assert self.index.keys == {key for key, _, _ in self.filed}
        nodes = list(self.index._roots.values())
        total, ends = 0, Counter[int]()
        for node in nodes:
            total += len(node.edge)
            ends.update(list(node.ends))
            nodes += node.children.values()
            assert node.ends or len(node.children) > (node.parent is not None), "a node of no use"
            times = [child.time for child in node.children.values()]
            assert times == sorted(times) and list(node.ends.values()) == sorted(node.ends.values())
            assert node.time == max([*times, *node.ends.values()])
            for first, child in node.children.items():
                assert child.edge.startswith(first) and child.parent is node
        assert total == self.index._bytes
        assert ends == Counter(key for key, _, _ in self.filed)


def test_any_order_of_events_agrees_with_the_scan() -> None:
    number = int(os.environ.get("LT_SEED", "0")) or random.randrange(1, 1 << 30)
    print(f"LT_SEED={number}")  # shown with a failure
    phases = (Phase.generate,) if os.environ.get("LT_NO_SHRINK") else (Phase.generate, Phase.shrink)
    run_state_machine_as_test(
        seed(number)(Scan),
        settings=settings(
            max_examples=60,
            stateful_step_count=50,
            deadline=None,
            database=None,
            phases=phases,
            suppress_health_check=list(HealthCheck),
        ),
    )

"""lt_sglang.dynamic.beginnings: who begins like whom."""

from __future__ import annotations

import random
from array import array
from collections import OrderedDict
from collections.abc import Iterator
from itertools import islice

from lt_sglang.dynamic.beginnings import (
    MOST_DIGESTS,
    MOST_RESTS,
    STEP,
    BeginningIndex,
    Beginnings,
    beginnings,
)

BLOCK = 64


def begin(tokens: list[int]) -> Beginnings:
    return beginnings(array("q", tokens), BLOCK, (None, None))


def tokens(rng: random.Random, length: int) -> list[int]:
    return [rng.randrange(50000) for _ in range(length)]


def test_digests_end_at_the_block_and_every_step() -> None:
    rng = random.Random(1)
    prompt = tokens(rng, BLOCK + 2 * STEP + 10)
    found = begin(prompt)
    assert [end // 8 for end in found.ends] == [BLOCK, BLOCK + STEP, BLOCK + 2 * STEP]
    assert len(set(found.digests)) == 3 and len(found.rest) == 80
    for changed in (0, BLOCK - 1, BLOCK, BLOCK + STEP, len(prompt) - 1):
        other = list(prompt)
        other[changed] += 1
        same = [a == b for a, b in zip(found.digests, begin(other).digests, strict=True)]
        assert same == [changed >= end // 8 for end in found.ends]


def test_a_conversation_is_found_among_all_that_share_its_system_prompt() -> None:
    """Whatever its length, and though others were there later."""
    rng = random.Random(2)
    system = tokens(rng, 3 * STEP + 100)
    index = BeginningIndex()
    turns = [system + tokens(rng, rng.choice([1, 5, 60, STEP, 2 * STEP + 7])) for _ in range(200)]
    for key, turn in enumerate(turns):
        index.file(key, begin(turn))
    for key in rng.sample(range(200), 50):
        following = turns[key] + tokens(rng, rng.choice([1, 30, STEP, 900]))
        assert next(index.find(begin(following))) == key
        assert next(index.find(begin(turns[key]))) == key
    everyone = list(index.find(begin(system + [7])))
    assert sorted(everyone) == list(range(200)), "each once"
    assert list(index.find(begin(tokens(rng, 4 * STEP)))) == []


def test_the_longest_agreement_comes_first_then_the_last_used() -> None:
    rng = random.Random(3)
    trunk = tokens(rng, BLOCK + 3 * STEP)
    index = BeginningIndex()
    for key, length in enumerate([BLOCK, BLOCK + STEP, BLOCK + 2 * STEP]):
        index.file(key, begin(trunk[:length] + tokens(rng, 700)))
    assert list(index.find(begin(trunk))) == [2, 1, 0]
    assert list(index.find(begin(trunk[: BLOCK + 3]))) == [2, 1, 0], "equals: the last filed first"
    index.file(0, begin(trunk[:BLOCK] + tokens(rng, 100)))
    assert list(index.find(begin(trunk[: BLOCK + 3]))) == [0, 2, 1]


def test_what_is_dropped_leaves_nothing() -> None:
    rng = random.Random(4)
    index = BeginningIndex()
    prompts = [tokens(rng, BLOCK + 1500) for _ in range(5)]
    for key in range(5):
        for prompt in prompts[key:]:
            index.file(key, begin(prompt))
    for key in range(5):
        assert key in index.keys
        index.drop(key)
        assert all(key not in set(index.find(begin(prompt))) for prompt in prompts)
    assert not index.keys and not index._at


def test_a_key_that_everybody_uses_stays_small() -> None:
    """A document with a thousand questions, and longer and longer prompts."""
    rng = random.Random(5)
    document = tokens(rng, BLOCK + STEP)
    index = BeginningIndex()
    for _ in range(3 * MOST_RESTS):
        index.file(1, begin(document + tokens(rng, 20)))
    assert len(index._rests[begin(document).digests[-1]][1]) <= MOST_RESTS
    for _ in range(40):
        last = document + tokens(rng, 40 * STEP)
        index.file(1, begin(last))
    assert len(index._digests[1]) <= MOST_DIGESTS
    assert list(index.find(begin(last))) == list(index.find(begin(document))) == [1]
    index.drop(1)
    assert not index._at and not index._rests


def test_the_first_few_of_thousands_cost_no_more_than_of_few() -> None:
    """A scheduler looks at every waiting prompt, and all of them may begin with one system prompt."""
    rng = random.Random(7)
    system = tokens(rng, BLOCK + 2 * STEP)
    index = BeginningIndex()
    for key in range(3000):
        index.file(key, begin(system + tokens(rng, STEP + 20)))

    class Counted(OrderedDict):  # type: ignore[type-arg]
        looked = 0

        def __reversed__(self) -> Iterator[int]:
            for key in super().__reversed__():
                Counted.looked += 1
                yield key

    index._at = {digest: Counted(here) for digest, here in index._at.items()}
    index._rests = {digest: Counted(here) for digest, here in index._rests.items()}
    assert list(islice(index.find(begin(system + tokens(rng, 700))), 4)) == [2999, 2998, 2997, 2996]
    assert Counted.looked < 10

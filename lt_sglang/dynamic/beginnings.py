"""Finds things filed under prompts by how those begin, the most alike first.

A prompt has a digest for its first block and for every STEP tokens more, and a rest. Digests are hints, no
more: whoever looks something up must check that it fits.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

STEP = 512
DIGEST_BYTES = 16
# Of one key; a key that is filed under more forgets what it was filed under before.
MOST_DIGESTS, MOST_RESTS = 512, 8


@dataclass(frozen=True)
class Beginnings:
    """How one prompt begins.

    data: its tokens' bytes. ends: for each digest, how many of them it covers. digests: shortest first.
    """

    data: bytes
    ends: tuple[int, ...]
    digests: tuple[bytes, ...]

    @property
    def rest(self) -> bytes:
        """What no digest covers: less than STEP tokens."""
        return self.data[self.ends[-1] :]


def beginnings(tokens: Any, block: int, owner: Hashable) -> Beginnings:
    """Of a prompt of more than ``block`` tokens (an array); ``owner``: what else prompts must share."""
    data = bytes(tokens.tobytes())
    ends = tuple(tokens.itemsize * end for end in range(block, len(tokens) + 1, STEP))
    running = blake2b(repr(owner).encode(), digest_size=DIGEST_BYTES)
    digests, begin = [], 0
    for end in ends:
        running.update(data[begin:end])
        digests.append(running.copy().digest())
        begin = end
    return Beginnings(data, ends, tuple(digests))


class BeginningIndex:
    """Keys (ints) filed under prompts; a key may be filed under many."""

    def __init__(self) -> None:
        # By digest, the keys that were filed or used last at the end; and those of prompts that go on by less
        # than a step, with the rests.
        self._at: dict[bytes, OrderedDict[int, None]] = {}
        self._rests: dict[bytes, OrderedDict[int, set[bytes]]] = {}
        self._digests: dict[int, set[bytes]] = {}

    def file(self, key: int, prompt: Beginnings) -> None:
        """Find ``key`` by ``prompt`` from now on, before those that were filed earlier."""
        known = self._digests.get(key)
        if known is not None and len(known.union(prompt.digests)) > MOST_DIGESTS:
            self.drop(key)
        self._digests.setdefault(key, set()).update(prompt.digests)
        for digest in prompt.digests:
            here = self._at.setdefault(digest, OrderedDict())
            here[key] = None
            here.move_to_end(key)
        ending = self._rests.setdefault(prompt.digests[-1], OrderedDict())
        rests = ending.setdefault(key, set())
        ending.move_to_end(key)
        if len(rests) >= MOST_RESTS:
            rests.clear()
        rests.add(prompt.rest)

    def drop(self, key: int) -> None:
        """No longer find ``key``."""
        for digest in self._digests.pop(key):
            for index in (self._at, self._rests):
                here = index.get(digest)
                if here is not None and key in here:
                    del here[key]
                    if not here:
                        del index[digest]

    def clear(self) -> None:
        """Find nothing any more."""
        self._at.clear()
        self._rests.clear()
        self._digests.clear()

    def find(self, prompt: Beginnings) -> Iterator[int]:
        """Each key that begins like ``prompt``, once: those that agree longest first.

        Of equals, first those with a prompt that ``prompt`` continues, as the next turn of a conversation
        does; then the last used. Nothing may be filed or dropped while it is iterated.
        """
        seen: set[int] = set()
        for end, digest in zip(reversed(prompt.ends), reversed(prompt.digests), strict=True):
            # Thousands may share a system prompt: most callers stop at the first few.
            ending = self._rests.get(digest, OrderedDict())
            for key in reversed(ending):
                if key not in seen and any(prompt.data.startswith(rest, end) for rest in ending[key]):
                    seen.add(key)
                    yield key
            for key in reversed(self._at.get(digest, OrderedDict())):
                if key not in seen:
                    seen.add(key)
                    yield key

    @property
    def keys(self) -> set[int]:
        """All that can be found."""
        return set(self._digests)

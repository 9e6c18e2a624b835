"""Finds things filed under prompts by how those begin, the most alike first.

For each first block there is a compressed trie over the tokens behind it. A search is one walk along the
prompt, however many things are filed. Every node knows when something was last filed below it, so of the
thousands that share a system prompt the last used come out first, and nobody looks at the others.
What is found is a hint: whoever looks something up must check that it fits.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import Any

# Of one key; a key that is filed under more forgets the one it was filed under first.
MOST_PROMPTS = 8
# Of all prompts behind their first blocks. Beyond it, keys used least recently keep only their first blocks.
MOST_BYTES = 128 << 20


@dataclass(frozen=True)
class PromptStart:
    """One prompt. owner: what else prompts must share. block, rest: its tokens' bytes. width: of a token."""

    owner: Hashable
    block: bytes
    rest: bytes
    width: int

    @property
    def root(self) -> Root:
        """Which trie it belongs to."""
        return self.owner, self.block, self.width


Root = tuple[Hashable, bytes, int]


def prompt_start(tokens: Any, block: int, owner: Hashable) -> PromptStart:
    """How a prompt begins, an array of more than ``block`` tokens; ``owner``: what else must be equal."""
    data, width = bytes(tokens.tobytes()), int(tokens.itemsize)
    return PromptStart(owner, data[: block * width], data[block * width :], width)


class _Node:
    """The prompts that share all tokens up to here.

    edge: the bytes since the parent. ends: the keys filed under exactly this prompt, with the time of it.
    children: by their first token. Both in the order of time. time: when something was last filed here or
    below; no two filings have the same.
    """

    __slots__ = ("children", "edge", "ends", "parent", "time")

    def __init__(self, edge: bytes, parent: _Node | None, time: int = 0) -> None:
        self.edge = edge
        self.parent = parent
        self.ends: OrderedDict[int, int] = OrderedDict()
        self.children: OrderedDict[bytes, _Node] = OrderedDict()
        self.time = time

    def latest(self) -> Iterator[int]:
        """The keys filed here and below, the last filed first; a key comes once for each of its prompts."""
        heap: list[tuple[int, int | _Node, Iterator[tuple[int, int | _Node]]]] = []

        def push(earlier: Iterator[tuple[int, int | _Node]]) -> None:
            for time, what in earlier:
                heappush(heap, (-time, what, earlier))
                return

        def expand(node: _Node) -> None:
            push((time, key) for key, time in reversed(node.ends.items()))
            push((child.time, child) for child in reversed(node.children.values()))

        expand(self)
        while heap:
            _, what, earlier = heappop(heap)
            push(earlier)
            if isinstance(what, _Node):
                expand(what)
            else:
                yield what

    def settle(self, before: int) -> None:
        """Something was taken away here or below; ``before``: the time known to the parent."""
        node: _Node = self
        while True:
            last_end = next(reversed(node.ends.values()), 0)
            last_child = next(reversed(node.children.values()), None)
            node.time = max(last_end, last_child.time if last_child else 0)
            parent = node.parent
            if node.time == before or parent is None:
                return
            # Seldom: what is taken away is mostly what was used least recently.
            parent.children = OrderedDict(sorted(parent.children.items(), key=lambda item: item[1].time))
            node, before = parent, parent.time


class PrefixIndex:
    """Keys (ints) filed under prompts; a key may be filed under many."""

    def __init__(self) -> None:
        self._roots: dict[Root, _Node] = {}
        # By key, the nodes of its prompts, the last filed at the end.
        self._prompts: dict[int, OrderedDict[_Node, Root]] = {}
        # The keys of which more than a first block is filed, the last filed at the end.
        self._long: OrderedDict[int, None] = OrderedDict()
        self._bytes = 0
        self._time = 0

    def file(self, key: int, prompt: PromptStart) -> None:
        """Find ``key`` by ``prompt`` from now on, before those that were filed earlier."""
        self._time += 1
        self._file(key, prompt.root, self._node(prompt), self._time)
        if len(self._prompts[key]) > MOST_PROMPTS:
            self._forget(key, next(iter(self._prompts[key])))
        self._long[key] = None
        self._long.move_to_end(key)
        while self._bytes > MOST_BYTES and self._long:
            self._shorten(next(iter(self._long)))

    def drop(self, key: int) -> None:
        """No longer find ``key``."""
        for node in list(self._prompts[key]):
            self._forget(key, node)
        del self._prompts[key]
        self._long.pop(key, None)

    def clear(self) -> None:
        """Find nothing any more."""
        self._roots.clear()
        self._prompts.clear()
        self._long.clear()
        self._bytes = 0

    def find(self, prompt: PromptStart) -> Iterator[int]:
        """Each key that begins like ``prompt``, once: those that agree longest first.

        Of equals, first those with a prompt that ``prompt`` continues, as the next turn of a conversation
        does; then the last used. Nothing may be filed or dropped while it is iterated.
        """
        node = self._roots.get(prompt.root)
        if node is None:
            return
        path, at, rest = [node], 0, prompt.rest
        seen: set[int] = set()
        while (child := node.children.get(rest[at : at + prompt.width])) is not None:
            if not rest.startswith(child.edge, at):
                yield from _new(child.latest(), seen)
                break
            node, at = child, at + len(child.edge)
            path.append(node)
        for node in reversed(path):
            if node.parent is not None:  # no prompt ends with its first block, but some were shortened to it
                yield from _new(reversed(node.ends), seen)
            yield from _new(node.latest(), seen)

    def agreed(self, prompt: PromptStart) -> int:
        """How many of its first tokens ``prompt`` shares with any that is filed; 0, or a block at least."""
        node = self._roots.get(prompt.root)
        if node is None:
            return 0
        at, rest, width = 0, prompt.rest, prompt.width
        while (child := node.children.get(rest[at : at + width])) is not None:
            common = _common(child.edge, rest, at, width)
            at += common
            if common < len(child.edge):
                break
            node = child
        return (len(prompt.block) + at) // width

    @property
    def keys(self) -> set[int]:
        """All keys that can be found."""
        return set(self._prompts)

    def _node(self, prompt: PromptStart) -> _Node:
        """The node of a prompt, made if need be."""
        node = self._roots.get(prompt.root)
        if node is None:
            node = self._roots[prompt.root] = _Node(b"", None)
        at, rest, width = 0, prompt.rest, prompt.width
        while at < len(rest):
            token = rest[at : at + width]
            child = node.children.get(token)
            if child is None:
                child = node.children[token] = _Node(rest[at:], node)
                self._bytes += len(child.edge)
            elif not rest.startswith(child.edge, at):
                child = _split(child, _common(child.edge, rest, at, width), width)
            node, at = child, at + len(child.edge)
        return node

    def _file(self, key: int, root: Root, node: _Node, time: int) -> None:
        node.ends[key] = time
        node.ends.move_to_end(key)
        prompts = self._prompts.setdefault(key, OrderedDict())
        prompts[node] = root
        prompts.move_to_end(node)
        while time > node.time:
            node.time = time
            if node.parent is None:
                break
            node.parent.children.move_to_end(node.edge[: root[2]])
            node = node.parent

    def _forget(self, key: int, node: _Node) -> None:
        root = self._prompts[key].pop(node)
        width = root[2]
        del node.ends[key]
        before = node.time
        while not node.ends and not node.children:
            parent = node.parent
            self._bytes -= len(node.edge)
            if parent is None:
                del self._roots[root]
                return
            del parent.children[node.edge[:width]]
            node, before = parent, parent.time
        if node.parent is not None and not node.ends and len(node.children) == 1:
            (child,) = node.children.values()
            child.edge, child.parent = node.edge + child.edge, node.parent
            node.parent.children[child.edge[:width]] = child  # where the node was
            node = child
        node.settle(before)

    def _shorten(self, key: int) -> None:
        """Keep only the first blocks of what ``key`` is filed under."""
        prompts = self._prompts[key]
        # Keys are shortened in the order in which they were filed last, so by this the order of time stays.
        last = next(reversed(prompts)).ends[key]
        for node, root in list(prompts.items()):
            if node.parent is not None:
                self._forget(key, node)
                self._file(key, root, self._node(PromptStart(*root[:2], b"", root[2])), last)
        del self._long[key]


def _new(keys: Iterator[int], seen: set[int]) -> Iterator[int]:
    for key in keys:
        if key not in seen:
            seen.add(key)
            yield key


def _split(child: _Node, at: int, width: int) -> _Node:
    """A node put into the edge of ``child`` after ``at`` bytes."""
    parent = child.parent
    assert parent is not None
    middle = _Node(child.edge[:at], parent, child.time)
    parent.children[child.edge[:width]] = middle
    child.edge, child.parent = child.edge[at:], middle
    middle.children[child.edge[:width]] = child
    return middle


def _common(edge: bytes, rest: bytes, at: int, width: int) -> int:
    """How many bytes, whole tokens, ``edge`` and ``rest`` from ``at`` on have in common."""
    low, high = 0, len(edge) // width  # in tokens; low agree, high + 1 are more than agree
    while low < high:
        middle = (low + high + 1) // 2
        if rest.startswith(edge[low * width : middle * width], at + low * width):
            low = middle
        else:
            high = middle - 1
    return low * width

"""Which layers of which request are lazy: the layer sets, and which requests share one.

A layer set is a row of the device table ``bank_of``. A request gets one when its prefill begins:

    prompt no longer than sink + recent tokens     set 0, the configured list: its scores would all be equal
    at least its first block is in the prefix cache, written for a stored set
                                                   that set: it reads K and V that were written for it
    otherwise                                      a new one, undecided until its prefill decides it

The first block is the first sink + recent tokens of a prompt. Every set is a name space of its own in
SGLang's prefix cache, so a request never reads K and V that were written for other lazy layers. A decided set
is stored under the prompts of its users, and found by prompts that begin like them (layers/prefix_index.py):
users who share a system prompt each find their own conversation. Stored sets live until their row is needed,
the least recently used first; what is left of an evicted set in the prefix cache can no longer be reached,
and ages out.

The store is host state that every rank keeps alike. What the device must know (which request row uses which
set) is queued and written by ``flush`` on the forward stream.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from lt_sglang.layers.async_host_copy import AsyncHostCopy
from lt_sglang.layers.chosen import ChosenLayers, bring
from lt_sglang.layers.prefix_index import PrefixIndex, PromptStart
from lt_sglang.memory.row_table import set_rows

DEFAULT_SET = 0
UNDECIDED = -1


@dataclass
class LayerSet:
    """One set.

    uid: never used twice; names its part of the prefix cache. prompt: of the request that is to decide it.
    stored: whether later requests find it. users: requests. heirs: those that inherited it. decision: its
    layers, from the forward that decided it on. selected_for: digest of the whole prompt that decided it.
    branching_seqlen: where a list was applied before the end of its prompt (layers/prefill.py), else 0.
    """

    index: int
    uid: int
    known: bool = False
    prompt: PromptStart | None = None
    stored: bool = False
    users: set[str] = field(default_factory=set)
    heirs: set[str] = field(default_factory=set)
    chosen: ChosenLayers | None = None
    selected_for: bytes = b""
    branching_seqlen: int = 0


@dataclass
class LayerSetStats:
    """Counters since the start, for metrics and tests; in requests.

    resumed: retracted requests that computed their prompts again; no other counter counts them.
    """

    decided: int = 0
    inherited: int = 0
    short: int = 0
    evicted: int = 0
    resumed: int = 0


class LayerSetStore:
    """The layer sets of all requests of one rank.

    Args:
        capacity: rows of the table, set 0 included; more than there can be running requests.
        default_lazy: lazy layers of set 0. num_layers: L.
        request_rows: rows of SGLang's req_to_token table.

    Attributes:
        bank_of: int32 [capacity, L], bank of each layer (memory/banks.py); UNDECIDED where not yet known.
        laziness: float32 [capacity, L], the scores it was decided by; 0 in set 0.
        set_of: int32 [request_rows], set of the request in that row of req_to_token.
        stats: counters.
        lazy_counts: int64 [L], counted requests in which each layer was lazy.
        finished: its values on the host.
        laziness_sums: float64 [L + 1], of counted requests with decided layers the sums of their scores, and
            their number. scored: its values on the host.
    """

    def __init__(
        self, capacity: int, default_lazy: Sequence[int], num_layers: int, request_rows: int, device: str
    ) -> None:
        self.capacity = capacity
        self.num_layers = num_layers
        self.keep = num_layers - len(default_lazy)
        self.stats = LayerSetStats()
        self.bank_of = torch.full((capacity, num_layers), UNDECIDED, dtype=torch.int32, device=device)
        self.bank_of[DEFAULT_SET] = torch.tensor(banks(default_lazy, num_layers), dtype=torch.int32)
        self.laziness = torch.zeros((capacity, num_layers), dtype=torch.float32, device=device)
        self.set_of = torch.full((request_rows,), DEFAULT_SET, dtype=torch.int32, device=device)
        self.default = LayerSet(DEFAULT_SET, uid=0, known=True)
        self.default.chosen = ChosenLayers.known(banks(default_lazy, num_layers), [0.0] * num_layers)
        self._free = list(range(capacity - 1, 0, -1))
        self._stored: OrderedDict[int, LayerSet] = OrderedDict()  # by uid
        self._index = PrefixIndex()
        self._of_request: dict[str, LayerSet] = {}
        self.lazy_counts = torch.zeros(num_layers, dtype=torch.int64, device=device)
        self.finished = AsyncHostCopy(self.lazy_counts)
        self.laziness_sums = torch.zeros(num_layers + 1, dtype=torch.float64, device=device)
        self.scored = AsyncHostCopy(self.laziness_sums)
        self._pending: dict[int, int] = {}
        self._counted: list[int] = []
        self._selecting: list[LayerSet] = []
        self._next_uid = 1

    def find(self, prompt: PromptStart) -> Iterator[LayerSet]:
        """Stored sets of prompts that begin like this one, the most alike first."""
        for uid in self._index.find(prompt):
            yield self._stored[uid]

    def agreed(self, prompt: PromptStart) -> int:
        """How many tokens ``prompt`` shares with one that a stored set is found by.

        0, or its first block at least.
        """
        return self._index.agreed(prompt)

    def branch(self, request: str, tokens: int) -> None:
        """The list is applied to ``request`` at ``tokens``, before the end of its prompt."""
        self._of_request[request].branching_seqlen = tokens

    def of(self, request: str) -> LayerSet | None:
        """The set ``request`` uses, or None if its prefill has not begun."""
        return self._of_request.get(request)

    def stored_set(self, uid: int) -> LayerSet | None:
        """The set of this uid, if later requests can still use it."""
        return self._stored.get(uid)

    def inherit(self, request: str, entry: LayerSet, prompt: PromptStart, *, resumed: bool = False) -> None:
        """Let ``request`` use the stored set ``entry``, which its own prompt finds from now on too.

        resumed: it was retracted and comes back, which no counter shows.
        """
        assert entry.stored
        self._stored.move_to_end(entry.uid)
        self._index.file(entry.uid, prompt)
        self._use(request, entry)
        entry.heirs.add(request)
        self.stats.inherited += not resumed

    def use_default(self, request: str, *, counted: bool = True) -> None:
        """Let ``request``, whose prompt is short, use set 0."""
        self._use(request, self.default)
        self.stats.short += counted

    def create(self, request: str, prompt: PromptStart) -> LayerSet:
        """Give ``request`` a new, undecided set; a stored set nobody uses makes room if it must."""
        if not self._free:
            self._evict()
        entry = LayerSet(self._free.pop(), self._next_uid, prompt=prompt)
        self._next_uid += 1
        self._use(request, entry)
        return entry

    def mark_known(
        self, request: str, *, stored: bool = True, selected_for: bytes = b"", resumed: bool = False
    ) -> None:
        """The forward that is about to run selects the layers of ``request``.

        stored: whether later requests find it. selected_for: digest of the whole prompt. resumed: the request
        was retracted and brings the layers it had, which no counter shows.
        """
        entry = self._of_request[request]
        assert entry.prompt is not None
        entry.known, entry.stored, entry.selected_for = True, stored, selected_for
        self.stats.decided += not resumed
        self.stats.resumed += resumed
        if stored:
            self._stored[entry.uid] = entry
            self._index.file(entry.uid, entry.prompt)
        entry.prompt = None
        self._selecting.append(entry)

    def bring(self) -> None:
        """Have the layers chosen by the forward that was just queued copied to the host; does not wait."""
        if self._selecting:
            found = bring(self.bank_of, self.laziness, [entry.index for entry in self._selecting])
            for entry, chosen in zip(self._selecting, found, strict=True):
                entry.chosen = chosen
            self._selecting.clear()

    def place(self, request: str, row: int) -> None:
        """``request`` is in row ``row`` of req_to_token from the next forward on."""
        self._pending[row] = self._of_request[request].index

    def count(self, request: str) -> None:
        """``request`` finished: its lazy layers are counted with the next ``count_finished`` or flush."""
        entry = self._of_request.get(request)
        if entry is not None and entry.known:
            self._counted.append(entry.index)

    def count_finished(self) -> None:
        """Add up what finished requests had, on the current stream, which must follow their forwards."""
        if not self._counted:
            return
        done = torch.tensor(self._counted, dtype=torch.int64).to(self.set_of.device, non_blocking=True)
        self._counted.clear()
        self.lazy_counts += (self.bank_of[done] >= self.keep).sum(0)
        decided = (done != DEFAULT_SET).to(torch.float64)
        self.laziness_sums[:-1] += decided @ self.laziness[done].to(torch.float64)
        self.laziness_sums[-1] += decided.sum()

    def release(self, request: str, row: int | None) -> None:
        """``request`` ends or gives its row back; a stored set stays for those that begin alike."""
        entry = self._of_request.pop(request, None)
        if entry is None:
            return
        entry.users.discard(request)
        entry.heirs.discard(request)
        if row is not None:
            self._pending[row] = DEFAULT_SET
        if entry is not self.default and not entry.stored and not entry.users:
            self._free.append(entry.index)

    def clear(self) -> None:
        """Forget every stored set that no running request uses (the prefix cache was flushed).

        A set in use is no longer found either: its K and V are gone from the prefix cache.
        """
        for entry in self._stored.values():
            entry.stored = False
            if not entry.users:
                self._free.append(entry.index)
        self._stored.clear()
        self._index.clear()

    def flush(self) -> None:
        """Do the queued device work on the current stream, before the forward that needs it."""
        self.count_finished()
        set_rows(self.set_of, self._pending)
        self._pending.clear()

    @property
    def stored(self) -> int:
        """Sets that later requests can inherit."""
        return len(self._stored)

    @property
    def requests(self) -> int:
        """Requests that use a set."""
        return len(self._of_request)

    def describe(self, request: str) -> dict[str, object] | None:
        """The decided layers of ``request``, for its response; None until a forward was queued that decides.

        Does not wait for the device where that forward's tokens have been read, as they have by the time a
        request answers.

        lazy_layers: list. laziness: by layer, higher is lazier; None where no prompt decided. origin:
        "prompt", "prefix" (inherited with a cached prefix) or "default" (the prompt was too short to tell).
        """
        entry = self._of_request.get(request)
        if entry is None or entry.chosen is None:
            return None
        default = entry is self.default
        found = entry.chosen
        return {
            "lazy_layers": [layer for layer, bank in enumerate(found.banks) if bank >= self.keep],
            "laziness": None if default else [round(x, 6) for x in found.laziness],
            "origin": "default" if default else "prefix" if request in entry.heirs else "prompt",
        }

    def check_integrity(self) -> list[str]:
        """What is wrong with the store, one sentence each; empty when all is well."""
        wrong = []
        in_use = {id(entry): entry for entry in self._of_request.values()}
        in_use.update((id(entry), entry) for entry in self._stored.values())
        in_use.pop(id(self.default), None)
        indices = sorted([entry.index for entry in in_use.values()] + self._free)
        if indices != list(range(1, self.capacity)):
            wrong.append(f"layer sets are lost or doubled: {len(indices)} accounted of {self.capacity - 1}")
        for uid, entry in self._stored.items():
            if entry.uid != uid or not entry.stored or not entry.known:
                wrong.append(f"layer set {entry.index} is stored under a name that is not its own")
        if self._index.keys != set(self._stored):
            wrong.append(f"{len(self._stored)} layer sets are stored, {len(self._index.keys)} can be found")
        for request, entry in self._of_request.items():
            if request not in entry.users:
                wrong.append(f"request {request} uses layer set {entry.index}, which does not count it")
        counted = sum(len(entry.users) for entry in (*in_use.values(), self.default))
        if counted != len(self._of_request):
            wrong.append(f"layer sets count {counted} requests, {len(self._of_request)} use one")
        return wrong

    def _use(self, request: str, entry: LayerSet) -> None:
        assert request not in self._of_request
        entry.users.add(request)
        self._of_request[request] = entry

    def _evict(self) -> None:
        entry = next((entry for entry in self._stored.values() if not entry.users), None)
        if entry is None:
            raise RuntimeError(f"all {self.capacity} layer sets are in use by running requests")
        del self._stored[entry.uid]
        self._index.drop(entry.uid)
        entry.stored = False
        self._free.append(entry.index)
        self.stats.evicted += 1


def banks(lazy: Sequence[int], num_layers: int) -> list[int]:
    """Bank of each layer for a known list: full layers take the full banks in order, lazy ones the others."""
    keep = num_layers - len(lazy)
    full = iter(range(keep))
    streaming = iter(range(keep, num_layers))
    return [next(streaming) if layer in set(lazy) else next(full) for layer in range(num_layers)]

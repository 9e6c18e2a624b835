"""Everything the attention backends of dynamic mode share: memory, tables, scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lt_sglang.config import LAST_QUERIES_FIRST_CHUNK, LightTransferConfig
from lt_sglang.errors import LightTransferError
from lt_sglang.identify.observation_window import ObservationWindow
from lt_sglang.identify.scores.base import Score
from lt_sglang.identify.stopwatch import Stopwatch
from lt_sglang.layers.layer_sets import LayerSetStore
from lt_sglang.layers.prefill import Kind, Prefill
from lt_sglang.memory.banks import BankLayout
from lt_sglang.memory.flat_pool import FlatPool

STORED_SETS = 4096


@dataclass(frozen=True)
class Ranks:
    """This rank's share of the heads, and how to reduce over the tensor-parallel group.

    heads: real query heads here (SGLang may pad them at the end, on a CPU). total_heads: of all ranks.
    """

    heads: int
    total_heads: int
    reduce: Callable[[torch.Tensor], torch.Tensor]
    reduce_max: Callable[[torch.Tensor], torch.Tensor]
    reduce_min: Callable[[torch.Tensor], torch.Tensor]


@dataclass
class TableChecks:
    """Prefills after which ``check_tables`` compared the ranks' tables, by what it found."""

    same: int = 0
    different: int = 0


class DynamicState:
    """Memory, layer tables and score of one rank.

    Attributes:
        score: None if every request gets the configured list.
        projections: by layer, [n, heads * dim] -> [n, hidden], this rank's part of the output projection.
        observed: last queries of the staged request.
        stopwatch: runs while layers are scored and queues popped.
        table_checks: counters.
        before_stop: called, on every rank, before different tables stop the server.
    """

    def __init__(
        self,
        config: LightTransferConfig,
        pool: FlatPool,
        kv_dtype: torch.dtype,
        sets: LayerSetStore,
        score: Score | None,
        ranks: Ranks,
        projections: dict[int, Callable[[torch.Tensor], torch.Tensor]],
    ) -> None:
        self.config = config
        self.pool = pool
        self.kv_dtype = kv_dtype
        self.sets = sets
        self.score = score
        self.ranks = ranks
        self.projections = projections
        self.stopwatch = Stopwatch.of(pool.kv.k.device)
        self.table_checks = TableChecks()
        self.before_stop: Callable[[], None] = lambda: None
        first_chunk = config.decide == "first-chunk"
        self.observed = ObservationWindow(LAST_QUERIES_FIRST_CHUNK if first_chunk else config.last_queries)

    @property
    def layout(self) -> BankLayout:
        """Where the banks are."""
        return self.pool.layout

    @property
    def keep(self) -> int:
        """P, layers that keep full attention."""
        return self.layout.full_banks

    def hidden(self, forward_batch: Any, tokens: int) -> torch.Tensor | None:
        """The residual stream at the input of the layer that is running, if the score needs it.

        Source: sglang/srt/layers/layer_boundary/residual/stream.py. Raises LightTransferError if the model
        does not keep it there, or not whole on every rank.
        """
        if self.score is None or not self.score.needs_hidden:
            return None
        stream = getattr(forward_batch, "residual_stream", None)
        residual = None if stream is None else stream.residual
        if residual is None or residual.shape[0] < tokens:
            raise LightTransferError(
                f"score: {self.score.name} needs the residual stream, which this model or setting does not "
                "show at the attention layer; use --lt-score lighttransfer or discarded-mass"
            )
        return residual[:tokens]

    def listed(self, layer: int) -> float:
        """What stands for a score where a list is given: 1 for its layers, which queues then pop, else 0."""
        return float(layer in self.config.lazy_layers)

    def finish(self, plans: Sequence[Prefill]) -> None:
        """After a prefill's last layer: check the tables if asked, free the last queries if used."""
        selecting = [plan for plan in plans if plan.kind == Kind.SELECT]
        if selecting and self.config.check_tables:
            self._check_tables([plan.layer_set for plan in selecting])
        if any(plan.prefix for plan in selecting) and not any(plan.kind == Kind.STAGED for plan in plans):
            self.observed.clear()

    def _check_tables(self, sets: list[int]) -> None:
        """Raise if the tensor-parallel ranks decided differently; a collective, and a wait for the device.

        sets: the same on every rank (host state).
        """
        table = self.sets.bank_of[torch.tensor(sets, device=self.sets.bank_of.device)].float()
        low, high = self.ranks.reduce_min(table.clone()), self.ranks.reduce_max(table.clone())
        if torch.equal(low, high):
            self.table_checks.same += 1
            return
        self.table_checks.different += 1
        layer = int((low != high).any(0).nonzero()[0])
        self.before_stop()
        raise LightTransferError(
            f"check_tables: the ranks put layer {layer} of a request into different banks "
            f"({low[:, layer].tolist()} and {high[:, layer].tolist()})"
        )


def projections_of(model: torch.nn.Module) -> dict[int, Callable[[torch.Tensor], torch.Tensor]]:
    """The output projection of every attention layer, by layer index; without reduction and bias."""
    from sglang.srt.layers.radix_attention import RadixAttention

    modules = dict(model.named_modules())
    found: dict[int, Callable[[torch.Tensor], torch.Tensor]] = {}
    for name, module in modules.items():
        if isinstance(module, RadixAttention):
            project = getattr(modules[name.rpartition(".")[0]], "o_proj", None)
            if project is not None:
                found[module.layer_id] = _partial(project)
    return found


def _partial(project: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    def apply(rows: torch.Tensor) -> torch.Tensor:
        return project.quant_method.apply(project, rows, None)

    return apply


def tp_ranks(local_heads: int, total_heads: int) -> Ranks:
    """The ranks of SGLang's attention tensor-parallel group.

    local_heads: query heads of this rank, padding included. total_heads: real ones of all ranks.
    """
    from sglang.srt.runtime_context import get_parallel

    parallel = get_parallel()
    group, size, rank = parallel.attn_tp_group, parallel.attn_tp_size, parallel.attn_tp_rank

    def reduce_with(operation: Any) -> Callable[[torch.Tensor], torch.Tensor]:
        def apply(tensor: torch.Tensor) -> torch.Tensor:
            if size > 1:
                torch.distributed.all_reduce(tensor, op=operation, group=group.device_group)
            return tensor

        return apply

    return Ranks(
        heads=min(max(total_heads - rank * local_heads, 0), local_heads),
        total_heads=total_heads,
        reduce=lambda tensor: group.all_reduce(tensor) if size > 1 else tensor,
        reduce_max=reduce_with(torch.distributed.ReduceOp.MAX),
        reduce_min=reduce_with(torch.distributed.ReduceOp.MIN),
    )

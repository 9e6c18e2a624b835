"""The model runner that owns lazy layers: pools, sink rows, windows, and the checks at start.

Source: sglang/srt/model_executor/model_runner.py.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sglang.srt.layers.radix_attention import AttentionType, RadixAttention
from sglang.srt.managers.utils import is_health_check_generate_req
from sglang.srt.model_executor.model_runner import ModelRunner
from sglang.srt.runtime_context import get_schedule
from sglang.srt.utils import get_device_module

from lt_sglang.attention.indices import StreamingTables, Windows
from lt_sglang.config import LIST, LightTransferConfig
from lt_sglang.errors import LightTransferError
from lt_sglang.identify.scores.factory import get_score
from lt_sglang.identify.state import STORED_SETS, DynamicState, projections_of, tp_ranks
from lt_sglang.layers.full_rows import FullRows
from lt_sglang.layers.layer_sets import LayerSetStore
from lt_sglang.layers.prefill import PrefillTracker
from lt_sglang.layers.prefill_plans import PrefillPlans
from lt_sglang.memory.flat_pool import FlatPool
from lt_sglang.memory.kv_keys import request_id
from lt_sglang.memory.pools import LightTransferKVCacheConfigurator
from lt_sglang.memory.sinks import SinkStore
from lt_sglang.memory.weights import announcing
from lt_sglang.names import BACKEND

logger = logging.getLogger(__name__)

# Sink sets that may be stored for each request that may run; they take memory only while it is free.
STORED_SINKS = 4


class LightTransferModelRunner(ModelRunner):
    """ModelRunner with lazy layers; with an empty list of lazy layers it is ModelRunner.

    Attributes:
        lt_config: the configuration being served, the same on every rank.
        sink_store: the sink sets, or None when no layer is lazy.
        dynamic: in dynamic mode, memory, layer tables and score; else None.
        prefills: in dynamic mode, which request is to be decided when; else None.
        full_rows: in dynamic mode, how the rows of each slot were computed; else None.
        prefill_plans: what the backend of dynamic mode is told of the prefill that runs.
    """

    decode_cuda_graph_runner: Any  # ModelRunner's, like the next two
    weight_updater: Any
    forward_stream: Any

    def __init__(self, *args: Any, lt_config: LightTransferConfig, **kwargs: Any) -> None:
        self.lt_config = lt_config
        self.sink_store: SinkStore | None = None
        self.kv_cache_configurator: Any = None
        self.dynamic: DynamicState | None = None
        self.prefills: PrefillTracker | None = None
        self.full_rows: FullRows | None = None
        self.prefill_plans = PrefillPlans()
        super().__init__(*args, **kwargs)

    def load_model(self) -> None:
        """Load the weights, then give every lazy layer its window; raises LightTransferError."""
        if self.lt_config.lazy_layers:
            _check_kind(self.model_config)
        super().load_model()
        layers = self._attention_layers()
        self.lt_config.check_model(len(layers))
        _check_layers(layers)
        if not self.lt_config.lazy_layers:
            return
        if not self.is_hybrid_swa or self.sliding_window_size != self.lt_config.retained_tokens - 1:
            raise LightTransferError(
                "model config: SGLang did not take the sliding window of the lazy layers "
                f"(is_hybrid_swa={self.is_hybrid_swa}, sliding_window_size={self.sliding_window_size})"
            )
        if self.lt_config.dynamic:
            return  # no layer has a window of its own; the backend knows who is lazy where
        for layer_id in self.lt_config.lazy_layers:
            layers[layer_id].sliding_window_size = self.lt_config.recent_tokens - 1

    def _attention_layers(self) -> dict[int, RadixAttention]:
        return {m.layer_id: m for m in self.model.modules() if isinstance(m, RadixAttention)}

    def init_kv_cache_configurator(self, draft_parallel_layout: Any = None) -> None:
        """Build the configurator of KV memory that full and lazy layers share."""
        super().init_kv_cache_configurator(draft_parallel_layout)
        if self.lt_config.lazy_layers:
            stock: Any = self.kv_cache_configurator
            self.kv_cache_configurator = LightTransferKVCacheConfigurator.adopt(stock, self.lt_config)

    def alloc_memory_pool(self, *args: Any, **kwargs: Any) -> None:
        """Allocate the pools and the sink store."""
        super().alloc_memory_pool(*args, **kwargs)
        if not self.lt_config.lazy_layers:
            return
        lazy = tuple(self.layer_info.swa_attention_layer_ids)
        if lazy != self.lt_config.lazy_layers:
            raise LightTransferError(
                f"KV pools: SGLang made layers {list(lazy)} streaming, "
                f"asked for {list(self.lt_config.lazy_layers)}"
            )
        pool = self.kv_cache_configurator.flat_pool
        if pool is None or not pool.complete:
            raise LightTransferError("KV pools: SGLang did not build its pools in the memory of lazy layers")
        rows = self.req_to_token_pool.req_to_token.shape[0]
        self.sink_store = SinkStore(
            capacity=STORED_SINKS * rows,
            sink_tokens=self.lt_config.sink_tokens,
            request_rows=rows,
            device=self.device,
            source=self.token_to_kv_pool_allocator.sinks,
        )
        self.token_to_kv_pool_allocator.sink_store = self.sink_store
        if self.lt_config.dynamic:
            self._init_dynamic()

    def init_weight_updater(self) -> None:
        """As ModelRunner; every change of weights is counted, so that sinks of old ones are not shared."""
        super().init_weight_updater()
        self.weight_updater = announcing(self.weight_updater, self._weights_change)

    def load_lora_adapter(self, *args: Any, **kwargs: Any) -> Any:
        """As ModelRunner; counts as a change of weights."""
        self._weights_change()
        return super().load_lora_adapter(*args, **kwargs)

    def load_lora_adapter_from_tensors(self, *args: Any, **kwargs: Any) -> Any:
        """As ModelRunner; counts as a change of weights."""
        self._weights_change()
        return super().load_lora_adapter_from_tensors(*args, **kwargs)

    def unload_lora_adapter(self, *args: Any, **kwargs: Any) -> Any:
        """As ModelRunner; counts as a change of weights."""
        self._weights_change()
        return super().unload_lora_adapter(*args, **kwargs)

    def _weights_change(self) -> None:
        if self.sink_store is not None:
            self.sink_store.weights += 1
            cache = self.token_to_kv_pool_allocator.tree_cache
            if cache is not None:  # adapters may be loaded before there is one
                # SGLang flushes the cache behind an update, and does not where HiCache still copies.
                cache.finish_copies()

    def init_attention_backends(self) -> None:
        """As ModelRunner; raises LightTransferError if SGLang settled for another backend in any phase."""
        super().init_attention_backends()
        if not type(self.attn_backend).__module__.startswith("lt_sglang."):
            raise LightTransferError(
                f"attention backend: SGLang built {type(self.attn_backend).__name__}, which knows no lazy "
                f"layers; use --attention-backend {BACKEND} for both phases"
            )

    def _init_dynamic(self) -> None:
        config, model = self.lt_config, self.model_config
        if not model.is_generation:
            raise LightTransferError(
                "mode: dynamic needs a model that generates; embedding and reward models run with static"
            )
        pool = self.flat_pool
        assert pool is not None
        layers = self._attention_layers()
        shapes = {(m.tp_q_head_num, m.tp_k_head_num, m.qk_head_dim) for m in layers.values()}
        if len(shapes) != 1:
            raise LightTransferError(
                f"model: layers of different shapes {sorted(shapes)} cannot change places"
            )
        projections = projections_of(self.model)
        score = None if config.score == LIST else get_score(config.score)
        if score is not None and score.needs_hidden and len(projections) != len(layers):
            raise LightTransferError(f"score: {config.score} needs an o_proj beside every attention layer")
        request_rows = self.req_to_token_pool.req_to_token.shape[0]
        sets = LayerSetStore(
            request_rows + STORED_SETS, config.lazy_layers, len(layers), request_rows, self.device
        )
        text = model.hf_text_config
        total_heads = getattr(text, "original_num_attention_heads", model.num_attention_heads)
        self.dynamic = DynamicState(
            config,
            pool,
            self.kv_cache_dtype,
            sets,
            score,
            tp_ranks(next(iter(shapes))[0], total_heads),
            projections,
        )
        self.prefills = PrefillTracker(config, sets, self.kv_cache_configurator.sizes.demand.undecided)
        self.full_rows = FullRows(len(self.token_to_kv_pool_allocator.full_to_swa_index_mapping), self.device)

    def begin_batch(self, batch: Any) -> None:
        """Plan the layers of a prefill batch (a ScheduleBatch); called right before its forward."""
        if self.prefills is not None and batch.forward_mode.is_extend():
            probes = {request_id(req) for req in batch.reqs if is_health_check_generate_req(req)}
            plans = self.prefills.begin([(request_id(req), req) for req in batch.reqs], probes)
            self.prefill_plans.put(plans)

    def windows(self) -> Windows:
        """w_sink and w_recent."""
        return Windows(self.lt_config.sink_tokens, self.lt_config.recent_tokens)

    @property
    def flat_pool(self) -> FlatPool | None:
        """K and V of all layers; None when no layer is lazy, and before they are allocated."""
        pool: FlatPool | None = getattr(self.kv_cache_configurator, "flat_pool", None)
        return pool

    def streaming_tables(self) -> StreamingTables:
        """The device tables that turn positions into slots."""
        assert self.sink_store is not None
        return StreamingTables(
            req_to_token=self.req_to_token_pool.req_to_token,
            full_to_streaming=self.token_to_kv_pool_allocator.full_to_swa_index_mapping,
            sink_set_of=self.sink_store.set_of,
            sink_slots_of=self.sink_store.slots_of,
        )

    def flush_sinks(self) -> None:
        """Copy sinks behind the last forward that was launched: their old slots are about to be written."""
        assert self.sink_store is not None and self.flat_pool is not None
        with self.behind_forwards():
            self.sink_store.flush_copies(self.flat_pool.copy_rows)

    @contextmanager
    def behind_forwards(self) -> Iterator[None]:
        """Device work goes where forwards run: without overlap they follow the scheduler's own work."""
        device = get_device_module()
        alone = get_schedule().disable_overlap_schedule
        stream = device.current_stream() if alone else self.forward_stream
        stream.wait_stream(device.current_stream())
        with device.stream(stream):
            yield

    def forward(self, forward_batch: Any, *args: Any, **kwargs: Any) -> Any:
        """As ModelRunner, after the sink rows this forward reads have been filled."""
        if self.sink_store is not None:
            assert self.flat_pool is not None
            self.sink_store.flush(self.flat_pool.copy_rows)
        if self.dynamic is None:
            return super().forward(forward_batch, *args, **kwargs)
        self.dynamic.sets.flush()
        self._wait_for_loads()
        self._tell_rows(forward_batch)
        if forward_batch.forward_mode.is_decode() and not self._fits_graph(forward_batch):
            return self._forward_eagerly(forward_batch, *args, **kwargs)
        try:
            output = super().forward(forward_batch, *args, **kwargs)
        finally:
            self.prefill_plans.clear()
        self.dynamic.sets.bring()
        return output

    def _wait_for_loads(self) -> None:
        """HiCache loads bank after bank, and each request has its own layer in a bank."""
        pool: Any = self.token_to_kv_pool
        counter = pool.layer_transfer_counter
        if counter is not None:
            counter.wait_until(counter.num_layers - 1)

    def _tell_rows(self, forward_batch: Any) -> None:
        """Note how the rows that this forward writes are computed."""
        assert self.full_rows is not None
        if forward_batch.forward_mode.is_decode():
            self.full_rows.decode(forward_batch.out_cache_loc)
        elif forward_batch.rids and not forward_batch.forward_mode.is_idle():  # not a warm-up
            self.full_rows.prefill(forward_batch.out_cache_loc, self.prefill_plans.of(forward_batch))

    def _forward_eagerly(self, forward_batch: Any, *args: Any, **kwargs: Any) -> Any:
        graphs, self.decode_cuda_graph_runner = self.decode_cuda_graph_runner, None
        try:
            return super().forward(forward_batch, *args, **kwargs)
        finally:
            self.decode_cuda_graph_runner = graphs

    def _fits_graph(self, forward_batch: Any) -> bool:
        fits = getattr(self.attn_backend, "fits_graph", None)
        return fits is None or bool(fits(forward_batch))

    def describe(self) -> dict[str, Any]:
        """What /server_info shows under ``lighttransfer``."""
        report: dict[str, Any] = self.lt_config.to_dict()
        report["num_lazy_layers"] = len(self.lt_config.lazy_layers)
        report["attention_backend"] = type(self.attn_backend).__name__
        if self.sink_store is not None:
            allocator, sizes = self.token_to_kv_pool_allocator, self.kv_cache_configurator.sizes
            report["memory"] = {
                "units": sizes.units,
                "units_free": len(allocator.units),
                "unit_bytes": sizes.unit_bytes,
                "demand": sizes.demand.to_dict(),
                "full_slots_used": allocator.full_used,
                "streaming_slots_used": allocator.swa_attn_allocator.used,
                "longest_request": sizes.longest,
                "full_limit": sizes.full_limit,
                "sink_sets": self.sink_store.capacity,
                "sink_sets_used": self.sink_store.used,
                "sink_sets_in_use": self.sink_store.in_use,
                "sink_requests": self.sink_store.requests,
            }
            report["sinks"] = vars(self.sink_store.stats).copy()
            if allocator.tree_cache.host is not None:
                report["host_memory"] = allocator.tree_cache.host.describe()
        if self.dynamic is not None:
            report["layer_sets"] = {
                "stored": self.dynamic.sets.stored,
                "requests": self.dynamic.sets.requests,
                **vars(self.dynamic.sets.stats),
            }
        return report


def _check_kind(model: Any) -> None:
    """Raise LightTransferError for a model (a ModelConfig of SGLang's) that takes more than text."""
    if model.is_multimodal:
        raise LightTransferError(
            f"model: {', '.join(model.hf_config.architectures or ())} takes more than text, which was not "
            "tested with lazy layers; --language-model-only serves its text model alone"
        )


def _check_layers(layers: dict[int, RadixAttention]) -> None:
    if sorted(layers) != list(range(len(layers))):
        raise LightTransferError(
            "model: its attention layers are not numbered 0 to n - 1, so lazy layers cannot be named; "
            "supported are decoder-only models such as Llama, Mistral, Qwen2, Qwen3, Qwen2-MoE, Mixtral"
        )
    for layer_id, layer in layers.items():
        odd = {
            "a sliding window of its own": layer.sliding_window_size not in (-1, None),
            "cross-attention": layer.is_cross_attention,
            "logit soft-capping": bool(layer.logit_cap),
            "non-causal attention": layer.attn_type != AttentionType.DECODER,
            "different K and V head sizes": layer.qk_head_dim != layer.v_head_dim,
        }
        for what, present in odd.items():
            if present:
                raise LightTransferError(
                    f"model: layer {layer_id} has {what}, which lazy layers do not support"
                )

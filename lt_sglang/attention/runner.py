"""What the attention backends need of the model runner (lt_sglang/model_runner.py)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from lt_sglang.attention.indices import StreamingTables, Windows
    from lt_sglang.config import LightTransferConfig
    from lt_sglang.identify.state import DynamicState
    from lt_sglang.layers.prefill_plans import PrefillPlans
    from lt_sglang.memory.flat_pool import FlatPool


@runtime_checkable
class HybridRunner(Protocol):
    """A ModelRunner of SGLang's with lazy layers.

    Attributes:
        lt_config: the configuration being served.
        dynamic: in dynamic mode, memory, layer tables and score; else None.
        device: "cuda" or "cpu".
        init_new_workspace: SGLang's; whether a backend allocates a FlashInfer workspace of its own.
        kv_index_translator: SGLang's.
        prefill_plans: in dynamic mode, the plan of the prefill that is running.
        flat_pool: K and V of all layers.
    """

    lt_config: LightTransferConfig
    dynamic: DynamicState | None
    device: str
    init_new_workspace: bool
    kv_index_translator: Any
    prefill_plans: PrefillPlans
    flat_pool: FlatPool

    def windows(self) -> Windows:
        """w_sink and w_recent."""
        ...

    def streaming_tables(self) -> StreamingTables:
        """The device tables that turn positions into slots."""
        ...

"""What an engine runs in place of SGLang's scheduler process: wait until it may take the GPU, then that.

Environment, beside that of lt_sglang/launch/held.py:

    LT_WATCH=1      print which kernels FlashInfer's ragged prefill (full layers) planned with
    LT_FORCE_FA2=1  and let it choose FA2, as it does on an A100, also where FA3 exists
"""

from __future__ import annotations

import functools
import os
from typing import Any

from lt_sglang.launch import held


def scheduler(*args: Any, **kwargs: Any) -> Any:
    """SGLang's run_scheduler_process, once it may go on."""
    return held.scheduler(*args, before=_watch if os.environ.get("LT_WATCH") else None, **kwargs)


def _watch() -> None:
    """Print each backend that a ragged prefill plans with, once."""
    from flashinfer import prefill

    if os.environ.get("LT_FORCE_FA2"):
        prefill.determine_attention_backend = lambda *_, **__: "fa2"
    wrapper = prefill.BatchPrefillWithRaggedKVCacheWrapper
    plan = wrapper.plan
    seen: set[str] = set()

    @functools.wraps(plan)
    def planned(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = plan(self, *args, **kwargs)
        if self._backend not in seen:
            seen.add(self._backend)
            print(f"RAGGED PREFILL {self._backend}", flush=True)
        return result

    wrapper.plan = wrapper.begin_forward = planned

"""What a test engine runs in place of SGLang's scheduler process: wait for the GPU, then the real thing.

Most of an engine's start is importing. Behind the gate an engine imports while another one measures, and
holds no GPU memory. Set in the environment of the job:

    LT_GATE         a file; the scheduler goes on once it exists
    LT_WATCH=1      print which kernels FlashInfer's ragged prefill (full layers) planned with
    LT_FORCE_FA2=1  and let it choose FA2, as it does on an A100, also where FA3 exists
    LT_SHUFFLE_LAYERS=1  dynamic mode: compute each score, then add noise to it, so that every request's
                    layers differ (dummy weights would choose the same ones for all)
"""

from __future__ import annotations

import functools
import os
import time
from pathlib import Path
from typing import Any

from sglang.srt.managers.scheduler import run_scheduler_process


def scheduler(*args: Any, **kwargs: Any) -> Any:
    """SGLang's run_scheduler_process, behind the gate."""
    gate = os.environ.get("LT_GATE")
    while gate and not Path(gate).exists():
        time.sleep(0.05)
    if os.environ.get("LT_WATCH"):
        watch_ragged(force_fa2=bool(os.environ.get("LT_FORCE_FA2")))
    if os.environ.get("LT_SHUFFLE_LAYERS"):
        shuffle_layers()
    return run_scheduler_process(*args, **kwargs)


def shuffle_layers() -> None:
    """Add noise to every score of dynamic mode, after it was computed."""
    import torch

    from lt_sglang.identify.scores.base import Score

    laziness = Score.laziness

    @functools.wraps(laziness)
    def noisy(self: Any, evidence: Any) -> torch.Tensor:
        score = laziness(self, evidence)
        return score + 100 * torch.rand_like(score)

    Score.laziness = noisy  # type: ignore[method-assign]


def watch_ragged(force_fa2: bool) -> None:
    """Print each backend that a ragged prefill plans with, once; with ``force_fa2`` it can only be FA2."""
    from flashinfer import prefill

    if force_fa2:
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

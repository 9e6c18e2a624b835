"""Flags that turn SGLang's features on: many on one server, policies on the others (specs.py)."""

from __future__ import annotations

import json
import os
import tempfile

from .adapters import ADAPTERS, adapter_folder
from .models import model_folder

# Where FEATURES publishes what it stores and removes (--kv-events-config).
KV_EVENTS = f"ipc://{tempfile.gettempdir()}/lt-sglang-kv-events-{os.getpid()}"
# As many of SGLang's features as one server can have.
FEATURE_FLAGS = (
    *("--enable-priority-scheduling", "--schedule-policy", "lof"),
    *("--priority-scheduling-preemption-threshold", "3", "--retraction-policy", "priority"),
    *("--radix-eviction-policy", "priority"),
    *("--enable-lora", "--lora-backend", "torch_native", "--max-loras-per-batch", "3"),
    *("--lora-paths", *(f"{name}={adapter_folder(model_folder('llama'), name)}" for name in ADAPTERS)),
    *("--grammar-backend", "xgrammar", "--enable-custom-logit-processor"),
    *("--enable-return-hidden-states", "--enable-metrics", "--enable-cache-report"),
    *("--chat-template", "chatml", "--default-priority-value", "1"),
    *("--kv-events-config", json.dumps({"publisher": "zmq", "endpoint": KV_EVENTS})),
)

# Each of SGLang's schedule and eviction policies is some server's (tests/contract/test_verdicts.py).
POLICIES = {
    "qwen2": ("--schedule-policy", "lpm", "--radix-eviction-policy", "lfu", "--stream-interval", "4"),
    "qwen3": (
        *("--schedule-policy", "random", "--prefill-decode-interval", "2"),
        *("--prefill-decode-interval-min-bs", "2", "--num-continuous-decode-steps", "2"),
    ),
    "qwen2_moe": (
        *("--schedule-policy", "dfs-weight", "--radix-eviction-policy", "slru"),
        *("--min-free-slots-delay", "2", "--scheduler-recv-interval", "2"),
    ),
    "mixtral": (
        *("--schedule-policy", "hrrn", "--disable-overlap-schedule"),
        *("--max-prefill-tokens", "700", "--prefill-max-requests", "3"),
    ),
    "qwen2-tp2": (
        *("--schedule-policy", "shortest-prefill-first", "--radix-eviction-policy", "tlru"),
        *("--radix-eviction-policy-config", json.dumps({"threshold": 400, "next_prompt_estimate": 100})),
    ),
    "dynamic-first-chunk": ("--schedule-policy", "lpm", "--radix-eviction-policy", "lfu"),
    "dynamic-list": ("--enable-priority-scheduling", "--schedule-policy", "lof"),
}

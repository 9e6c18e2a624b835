"""Sizes and flags of the servers that tests share.

Their memory is small on purpose: little more than the longest request takes, so that slots, cached prefixes
and sink sets are reused many times over.
"""

from __future__ import annotations

from pathlib import Path

LONGEST_PROMPT = 3000
NEW_TOKENS = 64
FULL_POOL = 6400
KV_TOKENS = 4000
CHUNK = 256
FLAGS = (
    *("--chunked-prefill-size", str(CHUNK)),
    *("--max-running-requests", "8"),
    *("--context-length", "4096"),
)
TINY_POOL = ("--max-total-tokens", str(FULL_POOL), "--mem-fraction-static", "0.3")
# --max-total-tokens counts full layers, so a model that has none is sized by memory alone.
BY_MEMORY = ("--mem-fraction-static", "0.1")


SMOLLM2_FLAGS = (
    "--chunked-prefill-size",
    "2048",
    "--max-total-tokens",
    "8000",
    "--mem-fraction-static",
    "0.5",
)
REUSE_FLAGS = (
    *("--chunked-prefill-size", str(CHUNK)),
    *("--max-running-requests", "32"),
    *("--context-length", "4096"),
)
# Memory for one request that fills it.
TIGHT_POOL = 800
TIGHT_FLAGS = (
    *("--chunked-prefill-size", "32"),
    *("--max-running-requests", "8"),
    *("--context-length", "4096"),
    *("--max-total-tokens", str(TIGHT_POOL)),
    *("--mem-fraction-static", "0.3"),
)
# Windows slide at every step instead of every 128.
RESTLESS = {"SGLANG_SWA_EVICTION_INTERVAL": "1"}
# Admission reckons with a small share of each output that may end early, so that decode runs out of memory.
HOPEFUL = ("--schedule-conservativeness", "0.05")
# Host memory for all that the tests send.
HICACHE = ("--enable-hierarchical-cache", "--hicache-ratio", "6")
PRIORITY = ("--enable-priority-scheduling",)
RETRACT = {"SGLANG_TEST_RETRACT": "1", "SGLANG_TEST_RETRACT_INTERVAL": "50"}
# That makes pools of a million tokens, too many to look through after every step.
WIDE_POOL = {"SGLANG_CHECK_KV_PAGE_INVARIANTS": "0"}
# Where SGLang itself has a Triton kernel and nothing else: a millisecond for every token and layer.
INTERPRETED = {"TRITON_INTERPRET": "1"}
# The CPU launcher points SGLang at a library that is not NCCL; the plug-in's hook must do without.
OWN_NCCL_HOOK = {"SGLANG_NCCL_SO_PATH": ""}
# Servers that hostile requests are sent to: everything a client may reach is on.
ADMIN_KEY, CLIENT_KEY = "key-of-the-admin", "key-of-a-client"
# /v1/responses asks for the model by its name, and a template of Jinja is rendered as most models' are.
EXPOSED = (
    *("--enable-metrics", "--admin-api-key", ADMIN_KEY, "--served-model-name", "default"),
    *("--chat-template", str(Path(__file__).resolve().parents[1] / "fuzz/chat.jinja")),
)
HEADER_OVERRIDES = {"SGLANG_ENABLE_REQUEST_HEADER_OVERRIDES": "1"}

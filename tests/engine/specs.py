"""The servers the tests share. The order is the order they run in: each is started once.

Pools are small on purpose: twice the longest request in the full pool, a fraction of that in the
streaming pool, so that slots, cached prefixes and sink sets are reused many times over.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from lt_sglang.demo.smollm2 import ensure_model as ensure_smollm2

from .adapters import ensure_adapted_model
from .feature_flags import FEATURE_FLAGS, POLICIES
from .models import NUM_LAYERS, ensure_model
from .server import ServerSpec

LONGEST_PROMPT = 3000
NEW_TOKENS = 64
FULL_POOL = 6400
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

# 32 running requests compete for 18 sink sets.
REUSE_FLAGS = (
    *("--chunked-prefill-size", str(CHUNK)),
    *("--max-running-requests", "32"),
    *("--context-length", "4096"),
)
# Pools for one request that fills them.
TIGHT_POOL = 800
TIGHT_FLAGS = (
    *("--chunked-prefill-size", "32"),
    *("--max-running-requests", "8"),
    *("--context-length", "4096"),
    *("--max-total-tokens", str(TIGHT_POOL)),
    *("--mem-fraction-static", "0.3"),
)
# Admission reckons with 16 new tokens a request, so that decode runs out of memory; and windows slide at
# every step instead of every 128.
RESTLESS = {
    "SGLANG_CLIP_MAX_NEW_TOKENS_ESTIMATION": "16",
    "SGLANG_SWA_EVICTION_INTERVAL": "1",
}
PRIORITY = ("--enable-priority-scheduling",)
RETRACT = {"SGLANG_TEST_RETRACT": "1", "SGLANG_TEST_RETRACT_INTERVAL": "50"}
# That makes pools of a million tokens, too many to look through after every step.
WIDE_POOL = {"SGLANG_CHECK_KV_PAGE_INVARIANTS": "0"}
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

STOCK = "stock"
STOCK_WITHOUT_PLUGIN = "stock-without-plugin"
NO_LAZY_LAYER = "no-lazy-layer"
RADIX = "llama"
NO_RADIX = "mistral"
REUSE = "llama-reuse"
TIGHT = "llama-tight"
TENSOR_PARALLEL = "qwen2-tp2"
FUZZED = "llama-fuzzed"
FUZZED_DYNAMIC = "dynamic-fuzzed"
SMOLLM2 = "smollm2"
FEATURES = "features"
EMBEDDING = "embedding"
DYNAMIC = "dynamic"
FIRST_CHUNK = "dynamic-first-chunk"
DYNAMIC_LIST = "dynamic-list"
DYNAMIC_CHURN = "dynamic-churn"
DYNAMIC_TP = "dynamic-tp2"
DYNAMIC_SMOLLM2 = "dynamic-smollm2"
DYNAMIC_RETRACT = "dynamic-retract"

# Outputs of these are held against one another: whoever asks one asks the others.
COMPARED = (STOCK, STOCK_WITHOUT_PLUGIN, NO_LAZY_LAYER, RADIX)


@dataclass(frozen=True)
class LazyServer:
    """A server with lazy layers, and what its reference needs."""

    name: str
    model: Callable[[], Path]
    layers: tuple[int, ...]
    sinks: int
    recent: int
    flags: tuple[str, ...] = (*FLAGS, *TINY_POOL)
    tp: int = 1
    expected: int = LONGEST_PROMPT + NEW_TOKENS
    env: Mapping[str, str] = field(default_factory=dict)
    beside: str | None = None

    @property
    def spec(self) -> ServerSpec:
        """How to start it."""
        lazy: dict[str, Any] = {
            "lazy_layers": list(self.layers),
            "sink_tokens": self.sinks,
            "recent_tokens": self.recent,
            "expected_tokens": self.expected,
        }
        return ServerSpec(
            self.name, self.model, lazy, self.flags, env=self.env, tp=self.tp, beside=self.beside
        )


@dataclass(frozen=True)
class DynamicServer:
    """A server that finds each request's lazy layers, and what its reference needs.

    keep: layers that keep full attention. default: lazy layers of short prompts. more: further keys of the
    configuration.
    """

    name: str
    model: Callable[[], Path]
    keep: int
    default: tuple[int, ...]
    score: str
    decide: str = "prompt"
    sinks: int = 4
    recent: int = 60
    flags: tuple[str, ...] = (*FLAGS, *TINY_POOL)
    tp: int = 1
    expected: int = LONGEST_PROMPT + NEW_TOKENS
    env: Mapping[str, str] = field(default_factory=dict)
    more: Mapping[str, Any] = field(default_factory=dict)

    @property
    def spec(self) -> ServerSpec:
        """How to start it."""
        lazy: dict[str, Any] = {
            "mode": "dynamic",
            "keep": self.keep,
            "lazy_layers": list(self.default),
            "score": self.score,
            "decide": self.decide,
            "sink_tokens": self.sinks,
            "recent_tokens": self.recent,
            "expected_tokens": self.expected,
            **self.more,
        }
        return ServerSpec(self.name, self.model, lazy, self.flags, env=self.env, tp=self.tp)


ALTERNATING = tuple(range(1, NUM_LAYERS, 2))
FIRST_AND_LAST = (0, NUM_LAYERS - 1)
MIDDLE = tuple(range(1, NUM_LAYERS - 1))
ALL = tuple(range(NUM_LAYERS))
SMOLLM2_ODD = tuple(range(1, 30, 2))


def _tiny(
    name: str, family: str, layers: tuple[int, ...], sinks: int, recent: int, **changes: Any
) -> LazyServer:
    return LazyServer(name, partial(ensure_model, family), layers, sinks, recent, **changes)


LAZY_SERVERS = {
    server.name: server
    for server in (
        _tiny(NO_LAZY_LAYER, "llama", (), 4, 60),
        _tiny(RADIX, "llama", ALTERNATING, 4, 60),
        _tiny(
            REUSE,
            "llama",
            ALTERNATING,
            4,
            16,
            flags=(*REUSE_FLAGS, *TINY_POOL, *PRIORITY),
            expected=640,
            env=RESTLESS,
        ),
        _tiny(TIGHT, "llama", ALTERNATING, 4, 60, flags=TIGHT_FLAGS, expected=TIGHT_POOL),
        _tiny(
            NO_RADIX,
            "mistral",
            FIRST_AND_LAST,
            4,
            32,
            flags=(*FLAGS, *TINY_POOL, "--disable-radix-cache"),
            env=RETRACT,
        ),
        _tiny("qwen2", "qwen2", MIDDLE, 129, 128, flags=(*FLAGS, *TINY_POOL, *POLICIES["qwen2"])),
        _tiny(
            "qwen3",
            "qwen3",
            ALL,
            4,
            60,
            flags=(*FLAGS, *BY_MEMORY, *POLICIES["qwen3"]),
            expected=64,
            env=WIDE_POOL | {"SGLANG_RADIX_FORCE_MISS": "1"},
        ),
        _tiny("qwen2_moe", "qwen2_moe", (3, 4, 5), 0, 32, flags=(*FLAGS, *TINY_POOL, *POLICIES["qwen2_moe"])),
        _tiny(
            "mixtral",
            "mixtral",
            (0, 2, 4),
            129,
            128,
            flags=(*FLAGS, *TINY_POOL, *POLICIES["mixtral"]),
            env={"SGLANG_UNIFIED_RADIX_TREE_CORE_BACKEND": "python", "SGLANG_PREFILL_TILE_BUDGET": "512"},
        ),
        _tiny(
            TENSOR_PARALLEL,
            "qwen2",
            (0, 2, 5),
            4,
            60,
            flags=(*FLAGS, *TINY_POOL, *POLICIES[TENSOR_PARALLEL]),
            tp=2,
            env=OWN_NCCL_HOOK,
        ),
        LazyServer(
            FEATURES,
            partial(ensure_adapted_model, "llama"),
            ALTERNATING,
            4,
            60,
            flags=(*FLAGS, *TINY_POOL, *FEATURE_FLAGS),
            expected=640,
            env=RESTLESS,
            beside="tests.engine.unpinned:register",
        ),
        _tiny(
            EMBEDDING,
            "llama",
            ALTERNATING,
            4,
            60,
            flags=(*FLAGS, *TINY_POOL, "--is-embedding", "--schedule-policy", "routing-key"),
        ),
        _tiny(
            FUZZED,
            "llama",
            ALTERNATING,
            4,
            60,
            flags=(*FLAGS, *TINY_POOL, *EXPOSED),
            env=HEADER_OVERRIDES,
        ),
        LazyServer(
            SMOLLM2,
            ensure_smollm2,
            SMOLLM2_ODD,
            4,
            1020,
            flags=SMOLLM2_FLAGS,
            expected=6100,
        ),
    )
}

DYNAMIC_SERVERS = {
    server.name: server
    for server in (
        # Sized so that nothing is retracted: a retracted request is decided a second time, unseen.
        DynamicServer(
            DYNAMIC,
            partial(ensure_model, "llama"),
            3,
            (1, 2, 5),
            "lighttransfer",
            flags=(*FLAGS, *TINY_POOL, "--schedule-conservativeness", "1.5"),
            expected=1000,
            more={"staging_tokens": LONGEST_PROMPT},
        ),
        DynamicServer(
            FIRST_CHUNK,
            partial(ensure_model, "qwen2_moe"),
            2,
            (0, 2, 3, 5),
            "residual-error",
            decide="first-chunk",
            flags=(*REUSE_FLAGS, *TINY_POOL, *POLICIES[FIRST_CHUNK]),
            expected=640,
            env=RESTLESS,
        ),
        # A pool that the outputs of a few requests fill: they are retracted, and their prompts' K and V go.
        DynamicServer(
            DYNAMIC_RETRACT,
            partial(ensure_model, "llama"),
            3,
            (1, 2, 5),
            "lighttransfer",
            flags=(
                *("--chunked-prefill-size", str(CHUNK)),
                *("--max-running-requests", "16"),
                *("--context-length", "2048"),
                *("--max-total-tokens", "2400"),
                *("--mem-fraction-static", "0.3"),
            ),
            expected=400,
            env=RESTLESS,
            more={"staging_tokens": 1000},
        ),
        DynamicServer(
            FUZZED_DYNAMIC,
            partial(ensure_model, "llama"),
            3,
            (1, 2, 5),
            "residual-error",
            flags=(*FLAGS, *TINY_POOL, *EXPOSED, "--api-key", CLIENT_KEY),
            expected=1000,
            env=HEADER_OVERRIDES,
            more={"staging_tokens": LONGEST_PROMPT},
        ),
        DynamicServer(
            DYNAMIC_CHURN,
            partial(ensure_model, "llama"),
            3,
            (1, 2, 5),
            "lighttransfer",
            recent=28,
            flags=(*REUSE_FLAGS, *TINY_POOL, *PRIORITY),
            expected=640,
            env=RESTLESS,
        ),
        DynamicServer(
            DYNAMIC_LIST,
            partial(ensure_model, "qwen2"),
            3,
            (0, 3, 5),
            "list",
            flags=(*FLAGS, *TINY_POOL, *POLICIES[DYNAMIC_LIST]),
            expected=1000,
            more={"staging_tokens": LONGEST_PROMPT},
        ),
        DynamicServer(
            DYNAMIC_TP,
            ensure_smollm2,
            15,
            SMOLLM2_ODD,
            "residual-error",
            recent=252,
            flags=(*SMOLLM2_FLAGS, "--chunked-prefill-size", "512"),
            tp=2,
            expected=2000,
            env=OWN_NCCL_HOOK,
            more={"check_tables": True},
        ),
        DynamicServer(
            DYNAMIC_SMOLLM2,
            ensure_smollm2,
            15,
            SMOLLM2_ODD,
            "lighttransfer",
            recent=1020,
            flags=SMOLLM2_FLAGS,
            expected=6100,
        ),
    )
}

STOCK_SERVERS = {
    spec.name: spec
    for spec in (
        ServerSpec(STOCK, partial(ensure_model, "llama"), None, (*FLAGS, *TINY_POOL)),
        ServerSpec(
            STOCK_WITHOUT_PLUGIN, partial(ensure_model, "llama"), None, (*FLAGS, *TINY_POOL), plugin=False
        ),
    )
}

SERVERS: dict[str, ServerSpec] = {
    **STOCK_SERVERS,
    **{name: server.spec for name, server in (LAZY_SERVERS | DYNAMIC_SERVERS).items()},
}

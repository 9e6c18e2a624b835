"""The servers the tests share. The order is the order they run in: each is started once.

Their memory is small on purpose: little more than the longest request takes, so that slots, cached prefixes
and sink sets are reused many times over.
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
from .models import COMMON, NUM_LAYERS, ensure_model
from .server import ServerSpec

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
EXPOSED = ("--enable-metrics", "--chat-template", "chatml", "--admin-api-key", ADMIN_KEY)
HEADER_OVERRIDES = {"SGLANG_ENABLE_REQUEST_HEADER_OVERRIDES": "1"}

STOCK = "stock"
STOCK_WITHOUT_PLUGIN = "stock-without-plugin"
NO_LAZY_LAYER = "no-lazy-layer"
RADIX = "llama"
NO_RADIX = "mistral"
REUSE = "llama-reuse"
TIGHT = "llama-tight"
PAGES = "llama-pages"
ONE_FULL = "qwen3-one-full"
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
DYNAMIC_PAGES = "dynamic-pages"
DYNAMIC_ONE_FULL = "dynamic-one-full"
DYNAMIC_TP = "dynamic-tp2"
DYNAMIC_SMOLLM2 = "dynamic-smollm2"
DYNAMIC_RETRACT = "dynamic-retract"

# Outputs of these are held against one another: whoever asks one asks the others.
COMPARED = (STOCK, STOCK_WITHOUT_PLUGIN, NO_LAZY_LAYER, RADIX)


def kv_bytes(tokens: int | None, tp: int) -> int | None:
    """KV memory of a rank for ``tokens`` tokens in all layers of a tiny model, 16 floats a head."""
    heads = max(1, COMMON["num_key_value_heads"] // tp)
    return None if tokens is None else tokens * NUM_LAYERS * heads * 2 * COMMON["head_dim"] * 4


@dataclass(frozen=True)
class LazyServer:
    """A server with lazy layers, and what its reference needs.

    kv_tokens: what its KV memory would hold of tokens in all layers; None leaves it to SGLang.
    """

    name: str
    model: Callable[[], Path]
    layers: tuple[int, ...]
    sinks: int
    recent: int
    flags: tuple[str, ...] = (*FLAGS, *TINY_POOL)
    tp: int = 1
    kv_tokens: int | None = KV_TOKENS
    env: Mapping[str, str] = field(default_factory=dict)
    beside: str | None = None

    @property
    def spec(self) -> ServerSpec:
        """How to start it."""
        lazy: dict[str, Any] = {
            "lazy_layers": list(self.layers),
            "sink_tokens": self.sinks,
            "recent_tokens": self.recent,
            "kv_bytes": kv_bytes(self.kv_tokens, self.tp),
        }
        return ServerSpec(
            self.name, self.model, lazy, self.flags, env=self.env, tp=self.tp, beside=self.beside
        )


@dataclass(frozen=True)
class DynamicServer:
    """A server that finds each request's lazy layers, and what its reference needs.

    keep: layers that keep full attention. default: lazy layers of short prompts. kv_tokens: as LazyServer.
    more: further keys of the configuration.
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
    kv_tokens: int | None = KV_TOKENS
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
            "kv_bytes": kv_bytes(self.kv_tokens, self.tp),
            **self.more,
        }
        return ServerSpec(self.name, self.model, lazy, self.flags, env=self.env, tp=self.tp)


ALTERNATING = tuple(range(1, NUM_LAYERS, 2))
FIRST_AND_LAST = (0, NUM_LAYERS - 1)
MIDDLE = tuple(range(1, NUM_LAYERS - 1))
ALL = tuple(range(NUM_LAYERS))
ALL_BUT_THREE = tuple(layer for layer in ALL if layer != 3)
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
            env=RESTLESS,
        ),
        _tiny(TIGHT, "llama", ALTERNATING, 4, 60, flags=TIGHT_FLAGS, kv_tokens=620),
        # Units of 16 tokens; and tokens of five units, one in the full layer.
        _tiny(
            PAGES,
            "llama",
            ALTERNATING,
            4,
            60,
            flags=(*FLAGS, *TINY_POOL, "--page-size", "16"),
            kv_tokens=3000,
        ),
        _tiny(ONE_FULL, "qwen3", ALL_BUT_THREE, 4, 60, kv_tokens=3000),
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
            kv_tokens=None,
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
        ),
        DynamicServer(
            FIRST_CHUNK,
            partial(ensure_model, "qwen2_moe"),
            2,
            (0, 2, 3, 5),
            "residual-error",
            decide="first-chunk",
            flags=(*REUSE_FLAGS, *TINY_POOL, *POLICIES[FIRST_CHUNK]),
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
            kv_tokens=1800,
            env=RESTLESS,
        ),
        DynamicServer(
            FUZZED_DYNAMIC,
            partial(ensure_model, "llama"),
            3,
            (1, 2, 5),
            "residual-error",
            flags=(*FLAGS, *TINY_POOL, *EXPOSED, "--api-key", CLIENT_KEY),
            env=HEADER_OVERRIDES,
        ),
        DynamicServer(
            DYNAMIC_CHURN,
            partial(ensure_model, "llama"),
            3,
            (1, 2, 5),
            "lighttransfer",
            recent=28,
            flags=(*REUSE_FLAGS, *TINY_POOL, *PRIORITY),
            env=RESTLESS,
        ),
        DynamicServer(
            DYNAMIC_PAGES,
            partial(ensure_model, "llama"),
            3,
            (1, 2, 5),
            "lighttransfer",
            flags=(*FLAGS, *TINY_POOL, "--schedule-conservativeness", "1.5", "--page-size", "16"),
        ),
        DynamicServer(
            DYNAMIC_ONE_FULL,
            partial(ensure_model, "llama"),
            1,
            (0, 1, 2, 4, 5),
            "lighttransfer",
            flags=(*FLAGS, *TINY_POOL, "--schedule-conservativeness", "1.5"),
        ),
        DynamicServer(
            DYNAMIC_LIST,
            partial(ensure_model, "qwen2"),
            3,
            (0, 3, 5),
            "list",
            flags=(*FLAGS, *TINY_POOL, *POLICIES[DYNAMIC_LIST]),
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
            kv_tokens=None,
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
            kv_tokens=None,
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

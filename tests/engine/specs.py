"""The servers the tests share. The order is the order they run in: each is started once."""

from __future__ import annotations

from functools import partial
from typing import Any

from lt_sglang.demo.smollm2 import ensure_model as ensure_smollm2

from .adapters import ensure_adapted_model
from .feature_flags import FEATURE_FLAGS, POLICIES
from .models import NUM_LAYERS, ensure_model
from .server import ServerSpec
from .server_flags import (
    BY_MEMORY,
    CHUNK,
    CLIENT_KEY,
    EXPOSED,
    FLAGS,
    HEADER_OVERRIDES,
    HICACHE,
    HOPEFUL,
    INTERPRETED,
    KV_TOKENS,
    OWN_NCCL_HOOK,
    PRIORITY,
    RESTLESS,
    RETRACT,
    REUSE_FLAGS,
    SMOLLM2_FLAGS,
    TIGHT_FLAGS,
    TINY_POOL,
    WIDE_POOL,
)
from .server_kinds import DynamicServer, LazyServer

STOCK = "stock"
STOCK_WITHOUT_PLUGIN = "stock-without-plugin"
NO_LAZY_LAYER = "no-lazy-layer"
RADIX = "llama"
NO_RADIX = "mistral"
REUSE = "llama-reuse"
TIGHT = "llama-tight"
PAGES = "llama-pages"
ONE_FULL = "qwen3-one-full"
SHARED_EXPERT = "qwen2_moe_shared"
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
DYNAMIC_CHURN_RETRACT = "dynamic-churn-retract"
DYNAMIC_CHURN_LIST = "dynamic-churn-list"
DYNAMIC_PAGES = "dynamic-pages"
DYNAMIC_ONE_FULL = "dynamic-one-full"
DYNAMIC_TP = "dynamic-tp2"
DYNAMIC_SMOLLM2 = "dynamic-smollm2"
DYNAMIC_RETRACT = "dynamic-retract"
HOST = "llama-hicache"
HOST_TP = "qwen2-hicache-tp2"
DYNAMIC_HOST = "dynamic-hicache"
DYNAMIC_HOST_TP = "dynamic-hicache-tp2"

# Outputs of these are held against one another: whoever asks one asks the others.
COMPARED = (STOCK, STOCK_WITHOUT_PLUGIN, NO_LAZY_LAYER, RADIX)

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
            flags=(*REUSE_FLAGS, *TINY_POOL, *PRIORITY, *HOPEFUL),
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
        _tiny(SHARED_EXPERT, "qwen2_moe_shared", (0, 1, 4), 4, 28, env=INTERPRETED, kv_tokens=600),
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
        # A token takes one unit in full layers and two in lazy ones; pages of 16.
        _tiny(
            HOST,
            "llama",
            MIDDLE,
            4,
            28,
            flags=(*REUSE_FLAGS, *TINY_POOL, *PRIORITY, *HOPEFUL, *HICACHE, "--page-size", "16"),
            kv_tokens=1800,
            env=RESTLESS,
        ),
        _tiny(
            HOST_TP,
            "qwen2",
            (0, 2, 5),
            4,
            60,
            flags=(*FLAGS, *TINY_POOL, *HICACHE),
            tp=2,
            kv_tokens=1800,
            env=OWN_NCCL_HOOK,
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


def _churned(
    name: str, *flags: str, score: str = "lighttransfer", kv_tokens: int = KV_TOKENS
) -> DynamicServer:
    return DynamicServer(
        name,
        partial(ensure_model, "llama"),
        3,
        (1, 2, 5),
        score,
        recent=28,
        flags=(*REUSE_FLAGS, *TINY_POOL, *PRIORITY, *flags),
        kv_tokens=kv_tokens,
        env=RESTLESS,
    )


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
                *HOPEFUL,
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
        _churned(DYNAMIC_CHURN),
        _churned(DYNAMIC_CHURN_RETRACT, *HOPEFUL),
        _churned(DYNAMIC_CHURN_LIST, *HOPEFUL, score="list"),
        _churned(DYNAMIC_HOST, *HICACHE, kv_tokens=1800),
        DynamicServer(
            DYNAMIC_HOST_TP,
            partial(ensure_model, "qwen2"),
            3,
            (0, 2, 5),
            "lighttransfer",
            flags=(*FLAGS, *TINY_POOL, *HICACHE),
            tp=2,
            kv_tokens=1800,
            env=OWN_NCCL_HOOK,
        ),
        DynamicServer(
            DYNAMIC_PAGES,
            partial(ensure_model, "llama"),
            3,
            (1, 2, 5),
            "lighttransfer",
            flags=(*FLAGS, *TINY_POOL, "--schedule-conservativeness", "1.5", "--page-size", "16"),
            last_queries=64,
        ),
        DynamicServer(
            DYNAMIC_ONE_FULL,
            partial(ensure_model, "llama"),
            1,
            (0, 1, 2, 4, 5),
            "lighttransfer",
            flags=(*FLAGS, *TINY_POOL, "--schedule-conservativeness", "1.5"),
            last_queries=8,
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

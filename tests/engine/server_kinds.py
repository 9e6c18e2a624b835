"""What a server of the tests is: how it is started, and what its reference needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .models import COMMON, NUM_LAYERS
from .server import ServerSpec
from .server_flags import (
    FLAGS,
    KV_TOKENS,
    TINY_POOL,
)


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
    last_queries: that the score looks at. more: further keys of the configuration.
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
    last_queries: int = 32
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
            "last_queries": self.last_queries,
            "sink_tokens": self.sinks,
            "recent_tokens": self.recent,
            "kv_bytes": kv_bytes(self.kv_tokens, self.tp),
            **self.more,
        }
        return ServerSpec(self.name, self.model, lazy, self.flags, env=self.env, tp=self.tp)

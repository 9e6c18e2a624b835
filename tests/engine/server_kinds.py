"""What a server of the tests is: how it is started, and what its reference needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .server import ServerSpec
from .server_flags import FLAGS, LONGEST_PROMPT, NEW_TOKENS, TINY_POOL


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

"""What a Ray Serve application of engines is configured with. Imports neither Ray nor SGLang."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

OWN_FLAGS = ("--port", "--host", "--tp-size", "--tp", "--tensor-parallel-size", "--nnodes", "--node-rank")


class SettingsError(ValueError):
    """A bad setting; the message names it."""


@dataclass(frozen=True)
class Settings:
    """One model.

    Attributes:
        model: folder or hub name; None for the demonstration model, on a CPU.
        tp: GPUs of one engine. nodes: over how many nodes they lie, equally.
        args: further arguments of ``lt-sglang serve``, such as --lt-lazy-layers.
        gpu: False serves on CPUs, for tests.
        cpus: CPUs that Ray reserves on each node of an engine.
        port_base: an engine listens on this port plus the number of its first GPU, for Prometheus; without a
            GPU, on any free port.
        replicas: how many engines; (low, high) scales with requests in progress.
        requests_per_replica: the number of requests in progress that scaling aims at.
        upscale_seconds, downscale_seconds: how long it must be above or below that.
        max_requests_per_replica: more wait in the front.
        start_seconds, drain_seconds: how long loading and the longest generation may take.
    """

    model: str | None
    tp: int = 1
    nodes: int = 1
    args: tuple[str, ...] = ()
    gpu: bool = True
    cpus: float = 8
    port_base: int = 30000
    replicas: tuple[int, int] = (1, 1)
    requests_per_replica: int = 32
    upscale_seconds: float = 30
    downscale_seconds: float = 900
    max_requests_per_replica: int = 256
    start_seconds: float = 1800
    drain_seconds: float = 600

    def __post_init__(self) -> None:
        if self.tp < 1 or self.nodes < 1 or self.tp % self.nodes:
            raise SettingsError(f"tp: {self.tp} GPUs cannot lie on {self.nodes} nodes equally")
        if not 0 < self.replicas[0] <= self.replicas[1]:
            raise SettingsError(f"replicas: {list(self.replicas)} is not [low, high] with 1 <= low <= high")
        for arg in self.args:
            if arg.partition("=")[0] in OWN_FLAGS:
                raise SettingsError(f"args: {arg} is what tp, nodes and port_base are for")
            if arg == "--use-ray":
                raise SettingsError("args: --use-ray starts schedulers that load no plug-in")

    @property
    def node_gpus(self) -> int:
        """GPUs on one node."""
        return self.tp // self.nodes

    @property
    def bundles(self) -> list[dict[str, float]]:
        """What one engine reserves, a bundle for each of its nodes."""
        bundle: dict[str, float] = {"CPU": self.cpus}
        if self.gpu:
            bundle["GPU"] = self.node_gpus
        return [dict(bundle) for _ in range(self.nodes)]

    @property
    def strategy(self) -> str:
        """One node, or as many as there are bundles."""
        return "STRICT_PACK" if self.nodes == 1 else "STRICT_SPREAD"

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Settings:
        """Read the ``args`` of a Serve config file; raises SettingsError on an unknown key."""
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(data) - known)
        if unknown:
            raise SettingsError(f"{unknown[0]}: unknown setting, known are {', '.join(sorted(known))}")
        values = {"model": None, **data}
        if "args" in values:
            values["args"] = tuple(map(str, values["args"]))
        replicas = values.get("replicas", (1, 1))
        values["replicas"] = (replicas, replicas) if isinstance(replicas, int) else tuple(replicas)
        return cls(**values)

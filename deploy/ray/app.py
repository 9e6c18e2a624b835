"""The Ray Serve application: ``serve run deploy.ray.app:build model=/models/mistral-7b tp=1``.

In a Serve config file: ``import_path: deploy.ray.app:build`` and the settings (settings.py) under ``args``.
"""

from __future__ import annotations

from typing import Any

from ray import serve
from ray.serve import Application

from deploy.ray.engine import Engine
from deploy.ray.front import Front
from deploy.ray.settings import Settings

FRONT_CPUS = 0.5


def build(args: dict[str, Any]) -> Application:
    """The application for one model; raises SettingsError."""
    settings = Settings.from_dict(args)
    low, high = settings.replicas
    engines = serve.deployment(Engine).options(
        name="engine",
        max_ongoing_requests=settings.max_requests_per_replica,
        # The actor is in the first bundle and takes all of it; a tensor-parallel group never leaves its node.
        placement_group_bundles=settings.bundles,
        placement_group_strategy=settings.strategy,
        ray_actor_options={
            "num_cpus": settings.cpus,
            "num_gpus": settings.node_gpus if settings.gpu else 0,
        },
        autoscaling_config={
            "min_replicas": low,
            "max_replicas": high,
            "target_ongoing_requests": settings.requests_per_replica,
            "upscale_delay_s": settings.upscale_seconds,
            "downscale_delay_s": settings.downscale_seconds,
        },
        # SGLang itself waits 20 s for a token before it calls itself unhealthy.
        health_check_period_s=10,
        health_check_timeout_s=60,
        # Serve waits for requests in progress; then __del__ ends the engine.
        graceful_shutdown_timeout_s=settings.drain_seconds + 90,
        graceful_shutdown_wait_loop_s=1,
    )
    front = serve.deployment(Front).options(
        name="front",
        num_replicas=2,
        max_ongoing_requests=10_000,
        ray_actor_options={"num_cpus": FRONT_CPUS},
        graceful_shutdown_timeout_s=settings.drain_seconds + 90,
    )
    return front.bind(engines.bind(settings))

"""The deployment that holds the GPUs: one engine a replica, and the way of a request through it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import threading
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any

import aiohttp
import ray

from deploy.ray.child import Child, EngineGone, choose_port
from deploy.ray.settings import Settings

logger = logging.getLogger("ray.serve")

DIST_PORT = 20000
REFUSAL_SECONDS = 1.0
FAREWELL_SECONDS = 1.0  # for the requests it breaks to say so
# Of one hop only (RFC 9110, 7.6.1), or wrong once the body has been read.
HOP_HEADERS = frozenset(
    {"connection", "content-length", "host", "keep-alive", "proxy-connection", "te", "trailer"}
    | {"transfer-encoding", "upgrade"}
)


class Engine:
    """A replica: starts an engine, passes requests on to it, says whether it is well, drains it.

    Serve calls ``check_health`` and, once no request is in progress, ``__del__``.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._requests = 0
        self._session: aiohttp.ClientSession | None = None
        arguments = engine_arguments(settings)
        # Two engines may have their first ranks on one node.
        port = choose_port(DIST_PORT, visible_gpus())
        self._address = f"{ray.util.get_node_ip_address()}:{port}"
        self._others = start_other_nodes(settings, arguments, self._address)
        if self._others:
            arguments += node_arguments(settings, 0, self._address)
        self._child = Child(arguments, choose_port(settings.port_base, visible_gpus()))
        self._child.wait_until_ready(settings.start_seconds)
        self._ending = False
        threading.Thread(target=self._follow, daemon=True).start()

    def _follow(self) -> None:
        """End with the engine: Serve sees a dead actor at once, a failing health check in half a minute."""
        self._child.wait()
        if not self._ending:
            logger.error("the engine has ended, and so does its replica")
            time.sleep(FAREWELL_SECONDS)
            os._exit(1)

    async def pass_on(
        self, method: str, path: str, headers: Mapping[str, str], body: bytes
    ) -> AsyncIterator[Any]:
        """Yield (status, headers), then the pieces of the body as they come.

        The first comes together with the first piece of the body: until then nothing has reached the client.

        Raises:
            EngineGone: before the first piece, if this engine is ending or has ended.
        """
        if not await asyncio.to_thread(self._child.takes_requests):
            # Serve prefers the replica with the fewest requests: one that refuses at once would get them all.
            await asyncio.sleep(REFUSAL_SECONDS)
            raise EngineGone("it takes no new requests")
        self._requests += 1
        try:
            async for piece in self._answer(method, path, headers, body):
                yield piece
        finally:
            self._requests -= 1

    async def _answer(
        self, method: str, path: str, headers: Mapping[str, str], body: bytes
    ) -> AsyncIterator[Any]:
        started = False
        try:
            async with self._client().request(
                method, self._child.url + path, headers=headers, data=body, allow_redirects=False
            ) as answer:
                head = (
                    answer.status,
                    {k: v for k, v in answer.headers.items() if k.lower() not in HOP_HEADERS},
                )
                async for piece in answer.content.iter_any():
                    if not started:
                        started = True
                        yield head
                    yield piece
                if not started:
                    yield head
        except aiohttp.ClientError as error:
            if started:
                raise
            raise EngineGone(str(error)) from None

    async def check_health(self) -> None:
        """Raise if a new engine should take this one's place.

        An engine that was told to end is left alone while a request is in progress.
        """
        if not self._child.alive:
            raise RuntimeError("the engine has ended")
        if self._others:
            await asyncio.gather(*(node.check.remote() for node in self._others))
        if await asyncio.to_thread(self._child.takes_requests):
            if not await asyncio.to_thread(self._child.generates):
                raise RuntimeError("the engine generates nothing")
        elif not self._requests:
            raise RuntimeError("the engine takes no requests")

    async def __del__(self) -> None:
        """Serve has drained this replica; what is left are requests that came another way."""
        child: Child | None = getattr(self, "_child", None)
        if child is None:
            return
        self._ending = True
        await asyncio.to_thread(child.stop, min(30.0, self._settings.drain_seconds))
        if self._session is not None:
            await self._session.close()
        for node in self._others:
            with contextlib.suppress(Exception):
                ray.kill(node)

    def _client(self) -> aiohttp.ClientSession:
        if self._session is None:
            # No time limit: how long a generation may take is the client's to say. Bytes pass as they are.
            self._session = aiohttp.ClientSession(
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=10),
                connector=aiohttp.TCPConnector(limit=0),
                auto_decompress=False,
            )
        return self._session


class OtherNode:
    """The ranks of an engine on a node that is not its first."""

    def __init__(self, arguments: list[str], port_base: int) -> None:
        self._child = Child(arguments, choose_port(port_base, visible_gpus()), serves=False)

    def check(self) -> None:
        """Raise if its process has ended."""
        if not self._child.alive:
            raise RuntimeError("the engine's ranks on this node have ended")


def engine_arguments(settings: Settings) -> list[str]:
    """Arguments of ``lt-sglang serve``, for every node of an engine."""
    arguments = [] if settings.model is None else [f"--model-path={settings.model}"]
    arguments += [f"--tp-size={settings.tp}", *settings.args]
    return arguments if settings.gpu else [*arguments, "--device", "cpu"]


def node_arguments(settings: Settings, rank: int, address: str) -> list[str]:
    """SGLang's own arguments for an engine over several nodes."""
    return [f"--nnodes={settings.nodes}", f"--node-rank={rank}", f"--dist-init-addr={address}"]


def start_other_nodes(settings: Settings, arguments: list[str], address: str) -> list[Any]:
    """An actor in each further bundle of the placement group; ``address``: of the first node's ranks."""
    if settings.nodes == 1:
        return []
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    group = ray.util.get_current_placement_group()
    actors = []
    for rank in range(1, settings.nodes):
        place = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=rank)
        options = {"num_cpus": settings.cpus, "num_gpus": settings.node_gpus if settings.gpu else 0}
        actor = ray.remote(OtherNode).options(scheduling_strategy=place, **options)
        ranks = [*arguments, *node_arguments(settings, rank, address)]
        actors.append(actor.remote(ranks, settings.port_base))
    return actors


def visible_gpus() -> list[str]:
    """The GPUs that Ray gave this process."""
    return [gpu for gpu in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu]

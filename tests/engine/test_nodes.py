"""More than one process that serves: two nodes of one engine, two replicas behind one port."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from lt_sglang.launch.cpu import cpu_environment
from lt_sglang.launch.processes import free_port, kill_tree, spawn

from . import storm
from .environment import server_environment
from .models import ensure_model
from .prompts import mixed_prompts
from .reference import Reference
from .server import Server, ServerSpec, running
from .server_flags import FLAGS, NEW_TOKENS, OWN_NCCL_HOOK, TINY_POOL
from .server_kinds import LazyServer
from .specs import LAZY_SERVERS, RADIX

pytestmark = [pytest.mark.engine, pytest.mark.slow]

PROMPTS, LONGEST = 24, 1500


def ask(server: Server, lazy: LazyServer) -> None:
    """Prompts at once, held against the reference."""
    prompts = mixed_prompts(lazy.sinks, lazy.recent, LONGEST, PROMPTS, seed=3)
    outputs = [reply.tokens for reply in server.generate_all(prompts, NEW_TOKENS)]
    Reference(lazy.model(), lazy.layers, lazy.sinks, lazy.recent).compare(prompts, outputs).assert_equal()


def test_two_nodes_with_one_kv_head(tmp_path: Path) -> None:
    """--nnodes 2, a rank each; the model's one KV head is on both of them."""
    lazy = LazyServer("nodes", lambda: ensure_model("llama_mqa"), (1, 3, 4), 4, 60, tp=2, env=OWN_NCCL_HOOK)
    meeting = f"127.0.0.1:{free_port()}"

    def node(rank: int) -> ServerSpec:
        flags = ("--nnodes", "2", "--node-rank", str(rank), "--dist-init-addr", meeting)
        return replace(lazy.spec, flags=(*lazy.flags, *flags))

    env = server_environment(tp=2, extra=lazy.env)
    second = spawn(node(1).command(free_port()), env, tmp_path / "second")
    try:
        with running(node(0), tmp_path) as server:
            ask(server, lazy)
            info = server.info()
            assert (info["nnodes"], info["tp_size"]) == (2, 2)
            storm.assert_all_returned(server)
    finally:
        kill_tree(second)


def test_two_replicas(tmp_path: Path) -> None:
    """--dp-size 2: two engines, each with pools of its own."""
    lazy = LAZY_SERVERS[RADIX]
    flags = (*FLAGS, *TINY_POOL, "--dp-size", "2", "--load-balance-method", "round_robin")
    # One core each, as for two ranks.
    cores = {"SGLANG_CPU_OMP_THREADS_BIND": cpu_environment(2, {})["SGLANG_CPU_OMP_THREADS_BIND"]}
    with running(replace(lazy.spec, name="replicas", flags=flags, env=cores), tmp_path) as server:
        ask(server, lazy)
        assert len(server.info()["internal_states"]) == 2
        storm.assert_all_returned(server)

"""What a server's KV memory holds, as its /server_info says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lt_sglang.bench.scenario import Scenario, Traffic
from lt_sglang.errors import LightTransferError
from lt_sglang.memory.demand import Demand
from lt_sglang.planner.mix import Mix, requests_at_once, running


def kv_tokens(state: Mapping[str, Any]) -> int | None:
    """Tokens of the longest request that one of the ``internal_states`` of /server_info holds, if known."""
    memory = _memory(state)
    if memory:
        return int(memory["longest_request"])
    capacity = (state.get("memory_usage") or {}).get("token_capacity")
    return int(capacity) if capacity else None


def held(server: Mapping[str, Any], mix: Mix) -> int:
    """Requests of ``mix`` that the KV memory holds; under DP attention those of all ranks.

    server: /server_info. Raises LightTransferError if that does not say how much it holds.
    """
    return sum(_held(state, mix) for state in server["internal_states"])


def check_fits(scenario: Scenario, server: Mapping[str, Any], name: str) -> None:
    """Raise LightTransferError if the longest request of ``scenario`` does not fit into a server's KV memory.

    Under DP attention a request lies on one rank, so the smallest counts. Lengths of traces, and of servers
    that do not say what they hold, are not checked.

    Args:
        scenario: whose requests.
        server: /server_info.
        name: what to call the server.
    """
    states = server["internal_states"]
    known = [tokens for tokens in map(kv_tokens, states) if tokens is not None]
    if not known:
        return
    room = min(known)
    for kind in scenario.traffic:
        prompt, output = longest_request(kind)
        if prompt + output > room:
            where = f" on each of {len(states)} ranks" if len(states) > 1 else ""
            raise LightTransferError(
                f"does not fit: the KV memory of {name} holds {room} tokens{where}, and a request needs "
                f"{prompt + output} (prompt {prompt}, output {output}); "
                "raise --mem-fraction-static, or use more GPUs or shorter prompts"
            )


def longest_request(kind: Traffic) -> tuple[int, int]:
    """Most tokens of a prompt, with what its conversation said before, and of its output; 0 of a trace."""
    if kind.input is None or kind.output is None:
        return 0, 0
    before = (kind.turns - 1) * (kind.input.high + kind.output.high)
    shared = kind.shared.tokens if kind.shared else 0
    return shared + before + kind.input.high, kind.output.high


def _held(state: Mapping[str, Any], mix: Mix) -> int:
    memory = _memory(state)
    if memory:
        demand = Demand.from_dict(memory["demand"])
        return requests_at_once(demand, int(memory["units"]), mix, memory["full_limit"])
    room = kv_tokens(state)
    if room is None:
        raise LightTransferError("load.fill: the server's /server_info does not say how many tokens it holds")
    each = sum(weight * part.tokens for weight, part in zip(running(mix), mix, strict=True))
    return int(room // each)


def _memory(state: Mapping[str, Any]) -> Mapping[str, Any] | None:
    return (state.get("lighttransfer") or {}).get("memory")

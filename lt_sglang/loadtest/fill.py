"""How many requests of a scenario fill a server's KV memory, from what the server says of itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import requests

from lt_sglang.errors import LightTransferError
from lt_sglang.loadtest.bounds import mean_lengths
from lt_sglang.loadtest.scenario import Scenario


def fitted(scenario: Scenario, url: str) -> Scenario:
    """``scenario`` as the server at ``url`` gets it.

    Raises LightTransferError if the server must be asked how much it holds, and does not say.
    """
    if not scenario.load.fill:
        return scenario
    try:
        answer = requests.get(f"{url}/server_info", timeout=60)
        answer.raise_for_status()
        server = answer.json()
    except requests.RequestException as error:
        raise LightTransferError(f"{url}: load.fill needs SGLang's /server_info ({error})") from None
    return filled(scenario, server)


def filled(scenario: Scenario, server: Mapping[str, Any]) -> Scenario:
    """``scenario`` with at most as many users and requests as ``server`` holds at once.

    server: /server_info. Raises LightTransferError if that does not say how much KV the server holds.
    """
    load, lengths = scenario.load, mean_lengths(scenario)
    if lengths is None:
        raise LightTransferError(f"{scenario.name}: load.fill needs traffic of known lengths")
    users = min(load.users, max(1, held(server, sum(lengths))))
    return replace(scenario, load=replace(load, users=users, requests=min(load.requests or users, users)))


def held(server: Mapping[str, Any], tokens: int) -> int:
    """Requests of ``tokens`` that the KV memory holds; under DP attention those of all ranks."""
    return sum(_held(state, tokens) for state in server["internal_states"])


def _held(state: Mapping[str, Any], tokens: int) -> int:
    pools = (state.get("lighttransfer") or {}).get("pools")
    if pools:
        # A lazy layer keeps the same of a request of any length, so the streaming pool is as many requests
        # as the split was made for.
        return int(min(pools["full_tokens"] // tokens, pools["expected_requests"]))
    capacity = (state.get("memory_usage") or {}).get("token_capacity")
    if not capacity:
        raise LightTransferError("load.fill: the server's /server_info does not say how many tokens it holds")
    return int(capacity) // tokens

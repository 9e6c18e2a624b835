"""Fit a scenario with ``load.fill`` to the server it is sent to, so that it fills the KV memory once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import requests

from lt_sglang.bench.bounds import mean_mix
from lt_sglang.bench.capacity import check_fits, held
from lt_sglang.bench.scenario import Scenario
from lt_sglang.errors import LightTransferError
from lt_sglang.launch.engine import server_info


def fitted(scenario: Scenario, url: str) -> Scenario:
    """``scenario`` as the server at ``url`` gets it.

    Raises:
        LightTransferError: the server must be asked how much it holds, and does not say, or holds less
            than one request.
    """
    if not scenario.load.fill:
        return scenario
    try:
        server = server_info(url)
    except requests.RequestException as error:
        raise LightTransferError(f"{url}: load.fill needs SGLang's /server_info ({error})") from None
    return filled(scenario, server, url)


def filled(scenario: Scenario, server: Mapping[str, Any], name: str) -> Scenario:
    """``scenario`` with at most as many users and requests as ``server`` holds at once.

    Args:
        scenario: of known lengths.
        server: /server_info.
        name: what to call the server.

    Raises:
        LightTransferError: /server_info does not say how much KV it holds, or that is too little.
    """
    load, mix = scenario.load, mean_mix(scenario)
    if mix is None:
        raise LightTransferError(f"{scenario.name}: load.fill needs traffic of known lengths")
    check_fits(scenario, server, name)
    users = min(load.users, max(1, held(server, mix)))
    return replace(scenario, load=replace(load, users=users, requests=min(load.requests or users, users)))

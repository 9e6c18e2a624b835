"""Where lazy layers change nothing, nothing changes: outputs are stock SGLang's, token by token."""

from __future__ import annotations

import random
from functools import cache

import pytest

from .host import Host, Prompts
from .prompts import mixed_prompts, random_prompt
from .reference import Reference
from .server import Server
from .server_flags import LONGEST_PROMPT, NEW_TOKENS
from .specs import LAZY_SERVERS, NO_LAZY_LAYER, RADIX, STOCK

pytestmark = pytest.mark.engine

SHORT_OUTPUT = 24


@cache
def full_reference() -> Reference:
    """Full attention in every layer."""
    return Reference(LAZY_SERVERS[NO_LAZY_LAYER].model(), (), 4, 60)


@cache
def long_prompts() -> Prompts:
    """Forty prompts of up to 3,000 tokens."""
    return tuple(map(tuple, mixed_prompts(4, 60, LONGEST_PROMPT, 40, seed=11)))


@cache
def short_prompts() -> Prompts:
    """Prompts that stay within sink + recent tokens to their last output token."""
    rng = random.Random(12)
    lazy = LAZY_SERVERS[RADIX]
    longest = lazy.sinks + lazy.recent - SHORT_OUTPUT
    return tuple(tuple(random_prompt(length, rng)) for length in range(1, longest + 1))


@pytest.mark.served_by(STOCK)
def test_stock_is_recorded(host: Host) -> None:
    """Stock SGLang's outputs, which the other tests of this file are held against, vary."""
    outputs = [reply.tokens for reply in host.outputs(STOCK, long_prompts(), NEW_TOKENS)]
    assert len({token for output in outputs for token in output}) > 100
    host.outputs(STOCK, short_prompts(), SHORT_OUTPUT)


@pytest.mark.served_by(NO_LAZY_LAYER)
def test_no_lazy_layer(host: Host) -> None:
    """The plug-in with an empty list of lazy layers, up to 3,000 tokens; the reference agrees with both."""
    _assert_equal(host, NO_LAZY_LAYER, long_prompts(), NEW_TOKENS)
    outputs = [reply.tokens for reply in host.outputs(NO_LAZY_LAYER, long_prompts(), NEW_TOKENS)]
    full_reference().compare(long_prompts(), outputs).assert_equal()


@pytest.mark.served_by(NO_LAZY_LAYER)
def test_no_lazy_layer_has_stock_pools(server: Server) -> None:
    """With no lazy layer there is no streaming pool, no sink store, and SGLang's own prefix cache."""
    shown = server.lighttransfer()
    assert shown["lazy_layers"] == "none" and "memory" not in shown
    assert "impl=LightTransferRadixCache" not in server.log_text()


@pytest.mark.served_by(RADIX)
def test_short_prompts_with_lazy_layers(host: Host) -> None:
    """Below sink + recent tokens a lazy layer sees everything."""
    _assert_equal(host, RADIX, short_prompts(), SHORT_OUTPUT)


@pytest.mark.served_by(RADIX)
def test_long_prompts_with_lazy_layers_differ(host: Host) -> None:
    """Above it, it does not: the comparison can fail."""
    ours = host.outputs(RADIX, long_prompts(), NEW_TOKENS)
    stock = host.outputs(STOCK, long_prompts(), NEW_TOKENS)
    assert sum(a.tokens != b.tokens for a, b in zip(ours, stock, strict=True)) > 5
    control = full_reference().compare(long_prompts(), [reply.tokens for reply in ours])
    control.assert_differs()


def _assert_equal(host: Host, name: str, prompts: Prompts, new_tokens: int) -> None:
    """Outputs equal stock SGLang's."""
    stock = [reply.tokens for reply in host.outputs(STOCK, prompts, new_tokens)]
    ours = [reply.tokens for reply in host.outputs(name, prompts, new_tokens)]
    full_reference().assert_same(prompts, stock, ours)

"""Two tensor-parallel ranks on a CPU give the reference's outputs and agree on every decision."""

from __future__ import annotations

import pytest

from . import storm
from .prompts import mixed_prompts
from .reference import Reference
from .server import Server
from .server_flags import LONGEST_PROMPT, NEW_TOKENS
from .specs import LAZY_SERVERS, TENSOR_PARALLEL

pytestmark = [pytest.mark.engine, pytest.mark.served_by(TENSOR_PARALLEL)]

LAZY = LAZY_SERVERS[TENSOR_PARALLEL]


@pytest.fixture(scope="module")
def reference() -> Reference:
    """Made once."""
    return Reference(LAZY.model(), LAZY.layers, LAZY.sinks, LAZY.recent)


def test_outputs_equal_the_reference(server: Server, reference: Reference) -> None:
    """Prompts of 1 to 3,000 tokens at once."""
    prompts = mixed_prompts(LAZY.sinks, LAZY.recent, LONGEST_PROMPT, 24, seed=21)
    outputs = [reply.tokens for reply in server.generate_all(prompts, NEW_TOKENS)]
    reference.compare(prompts, outputs).assert_equal()
    assert server.info()["tp_size"] == 2


def test_mixed_traffic(server: Server, reference: Reference) -> None:
    """Shared prefixes and dropped requests; SGLang's rank consensus checker is on (environment.STRICT)."""
    jobs = storm.storm(count=40, longest=800, longest_output=100, seed=3)
    outputs = storm.run(server, jobs)
    started = [(job.prompt, output) for job, output in zip(jobs, outputs, strict=True) if output]
    reference.compare(*zip(*started, strict=True)).assert_equal()
    storm.assert_all_returned(server)

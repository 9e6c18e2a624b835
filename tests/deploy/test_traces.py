"""The spans of gateway and engine, started with the chart's flags, at one collector."""

from __future__ import annotations

import os
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest
import requests
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

from tests.engine.environment import server_environment
from tests.engine.models import ensure_model
from tests.engine.server import ServerSpec, running

from .chart import engine_flags, template
from .gateway_rig import gateway
from .test_engine_metrics import FLAGS, LAZY

pytestmark = [pytest.mark.engine, pytest.mark.slow]


class Collector(trace_service_pb2_grpc.TraceServiceServicer):  # type: ignore[misc]
    """Keeps each span with the name of the service that sent it."""

    def __init__(self) -> None:
        self.spans: list[tuple[str, Any]] = []
        self._guard = threading.Lock()

    def Export(self, request: Any, _context: Any) -> Any:  # noqa: N802 - gRPC's name
        with self._guard:
            for part in request.resource_spans:
                names = {each.key: each.value.string_value for each in part.resource.attributes}
                for scope in part.scope_spans:
                    self.spans += [(names["service.name"], span) for span in scope.spans]  # smg, sglang
        return trace_service_pb2.ExportTraceServiceResponse()

    def by_trace(self) -> dict[bytes, dict[str, list[Any]]]:
        """The spans of each trace, by service."""
        found: dict[bytes, dict[str, list[Any]]] = defaultdict(lambda: defaultdict(list))
        with self._guard:
            for service, span in self.spans:
                found[span.trace_id][service].append(span)
        return found


@contextmanager
def collecting() -> Iterator[tuple[Collector, str]]:
    """A collector and its host:port."""
    collector, server = Collector(), grpc.server(ThreadPoolExecutor(4))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield collector, f"127.0.0.1:{port}"
    finally:
        server.stop(None)


def test_a_request_is_one_trace_from_gateway_to_scheduler(
    image_path: Path, gateway_path: Path, tmp_path: Path
) -> None:
    """With the exporter of the engine's image; the engine's spans name the gateway's as their parent."""
    with collecting() as (collector, endpoint):
        sets = (f"tracing.endpoint={endpoint}", "gateway.policy=round_robin")
        given = engine_flags(template(*sets))
        traced = ("--enable-trace", f"--otlp-traces-endpoint={given['--otlp-traces-endpoint']}")
        assert "--enable-trace" in given
        path = os.pathsep.join([server_environment()["PYTHONPATH"], str(image_path)])
        flags = (*FLAGS, *traced)
        spec = ServerSpec("traced", partial(ensure_model, "llama"), LAZY, flags, env={"PYTHONPATH": path})
        with running(spec, tmp_path) as engine, gateway(gateway_path, tmp_path, [engine.url], *sets) as url:
            body = {"text": "a b c", "sampling_params": {"max_new_tokens": 8, "ignore_eos": True}}
            assert requests.post(f"{url}/generate", json=body, timeout=60).status_code == 200
            deadline = time.monotonic() + 60
            while not (whole := [spans for spans in collector.by_trace().values() if complete(spans)]):
                assert time.monotonic() < deadline, {service for service, _ in collector.spans}
                time.sleep(1)
    (spans,) = whole
    known = {span.span_id for span in spans["smg"]}
    assert [span for span in spans["sglang"] if span.parent_span_id in known], "one tree, not two"


def complete(spans: dict[str, list[Any]]) -> bool:
    """Whether a trace has the gateway's span and the engine's, down to its prefill and decode."""
    names = {span.name for span in spans.get("sglang", ())}
    return "smg" in spans and {"tokenize", "prefill_forward", "decode_loop"} <= names

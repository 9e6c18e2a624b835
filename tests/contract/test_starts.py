"""The server arguments of several engines are read by SGLang itself before the first engine starts."""

from __future__ import annotations

import json

from lt_sglang.config import CONFIG_KEY
from lt_sglang.doctor import Check, check_starts
from lt_sglang.launch.cpu import has_gpu
from lt_sglang.names import BACKEND
from tests.engine.models import ensure_model


def test_each_engine_has_its_verdict() -> None:
    """In one process: importing SGLang is most of it."""
    common = ["--model-path", str(ensure_model("llama")), "--device", "cpu", "--grammar-backend", "none"]
    ours = [*common, "--attention-backend", BACKEND, "--json-model-override-args"]
    static, dynamic = (
        json.dumps({CONFIG_KEY: config})
        for config in ({"lazy_layers": "1-3"}, {"mode": "dynamic", "keep": 3})
    )
    engines = {
        "stock": ([*common, "--attention-backend", "torch_native"], ""),
        "static": ([*ours, static], ""),
        "embedding, static": ([*ours, static, "--is-embedding"], ""),
        "embedding, dynamic": (
            [*ours, dynamic, "--is-embedding"],
            "--is-embedding: dynamic mode needs a model that generates",
        ),
        "reward model": (
            [*ours, dynamic.replace("{", '{"architectures": ["LlamaForSequenceClassification"], ', 1)],
            "LlamaForSequenceClassification: dynamic mode needs a model that generates",
        ),
        "refused": (
            [*ours, static, "--enable-mixed-chunk"],
            "--enable-mixed-chunk: not supported with lazy layers",
        ),
        "unknown": ([*common, "--nonsense"], "SGLang does not accept these flags: "),
        "static again": ([*ours, static], ""),
    }
    found = check_starts({name: argv for name, (argv, _) in engines.items()}, on_gpu=has_gpu())
    assert [check.name for check in found] == list(engines)
    for check, (_, message) in zip(found, engines.values(), strict=True):
        assert check.ok == (not message), check
        assert check.message.startswith(message), check
    assert all(isinstance(check, Check) for check in found)

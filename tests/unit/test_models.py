"""lt_sglang.models: the known checkpoints."""

from __future__ import annotations

import pytest

from lt_sglang.models import find_known, known_models


def test_qwq_is_as_its_training_mask_says() -> None:
    known = find_known("cxdu/QwQ-32B-LightTransfer")
    assert known is not None
    assert known.num_layers == 64
    assert len(known.config.lazy_layers) == 32
    expected = [*range(5, 25), *range(26, 29), *range(30, 34), 35, 37, 38, 43, 51]
    assert list(known.config.lazy_layers) == expected
    # The mask is (q - k <= 1024) or (q >= 128 and k <= 128): 1025 recent tokens and 129 sinks.
    assert (known.config.sink_tokens, known.config.recent_tokens) == (129, 1025)


@pytest.mark.parametrize(
    "path", ["QwQ-32B-LightTransfer", "/models/qwq-32b-lighttransfer/", "hub/cxdu/QWQ-32B-LIGHTTRANSFER"]
)
def test_found_by_the_last_part_of_a_path(path: str) -> None:
    assert find_known(path) is not None


@pytest.mark.parametrize("path", ["Qwen/QwQ-32B", "", "/", "qwq-32b-lighttransfer/other"])
def test_others_are_not_found(path: str) -> None:
    assert find_known(path) is None


def test_every_entry_is_valid() -> None:
    models = known_models()
    assert len({model.name for model in models}) == len(models)
    for model in models:
        model.config.check_model(model.num_layers)
        assert model.config.source == f"known model {model.name}"
        assert all(name == name.lower() for name in model.match)
        # A list that nobody can say the making of is none (CONTRIBUTING.md).
        assert len(model.made.split()) > 10 and model.made.endswith(".")

"""Models whose lazy layers are known because their publishers trained them that way."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path, PurePath
from typing import Any

from lt_sglang.config import CONFIG_KEY, LightTransferConfig, format_layers
from lt_sglang.errors import LightTransferError


@dataclass(frozen=True)
class KnownModel:
    """A published checkpoint with a fixed list; ``match`` are lower-case last path components.

    origin: where list and windows are from. made: how the list was found, in sentences.
    """

    name: str
    match: tuple[str, ...]
    num_layers: int
    architecture: str
    config: LightTransferConfig
    origin: str
    made: str


def known_models() -> list[KnownModel]:
    """Every model of ``known.json``, validated."""
    text = resources.files(__name__).joinpath("known.json").read_text()
    models = []
    for entry in json.loads(text):
        config = LightTransferConfig.from_dict(entry["lighttransfer"], source=f"known model {entry['name']}")
        config.check_model(entry["num_layers"])
        models.append(
            KnownModel(
                name=entry["name"],
                match=tuple(entry["match"]),
                num_layers=entry["num_layers"],
                architecture=entry["architecture"],
                config=config,
                origin=entry["origin"],
                made=entry["made"],
            )
        )
    return models


def find_config(
    overrides: Mapping[str, Any],
    model_config: Mapping[str, Any] | None,
    model_path: str,
    overrides_source: str,
) -> LightTransferConfig | None:
    """That of the override arguments, else the model's own, else the known model's, else None.

    overrides_source: what the first is from, unless it says so itself. Raises LightTransferError.
    """
    if CONFIG_KEY in overrides:
        given = overrides[CONFIG_KEY]
        named = isinstance(given, Mapping) and "source" in given
        return LightTransferConfig.from_dict(given, source=None if named else overrides_source)
    if model_config is not None and CONFIG_KEY in model_config:
        return LightTransferConfig.from_dict(model_config[CONFIG_KEY], source="the model's config.json")
    known = find_known(model_path)
    return known.config if known is not None else None


def find_known(model_path: str) -> KnownModel | None:
    """The known model that ``model_path`` (a hub name or a folder) names, or None."""
    tail = PurePath(model_path.rstrip("/")).name.lower()
    return next((model for model in known_models() if tail in model.match), None)


def entry_of(folder: Path) -> dict[str, Any]:
    """The entry of ``known.json`` for a model whose config.json has the key ``lighttransfer``.

    Raises:
        LightTransferError: it has none, or a list that does not fit the model.
    """
    try:
        data = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LightTransferError(f"--entry {folder}: no config.json can be read ({error})") from None
    if not isinstance(data, dict) or CONFIG_KEY not in data:
        raise LightTransferError(
            f"--entry {folder}: its config.json has no key {CONFIG_KEY!r}; lt-sglang train writes it"
        )
    config = LightTransferConfig.from_dict(data[CONFIG_KEY], source=str(folder))
    if config.dynamic:
        raise LightTransferError(f"--entry {folder}: mode 'dynamic'; a known model has a fixed list")
    layers = data.get("num_hidden_layers")
    if type(layers) is not int:
        raise LightTransferError(f"--entry {folder}: num_hidden_layers of its config.json is {layers!r}")
    config.check_model(layers)
    name = folder.absolute().name
    return {
        "name": name,
        "match": [name.lower()],
        "num_layers": layers,
        "architecture": (data.get("architectures") or ["unknown"])[0],
        CONFIG_KEY: {
            "lazy_layers": format_layers(config.lazy_layers),
            "sink_tokens": config.sink_tokens,
            "recent_tokens": config.recent_tokens,
        },
        "origin": "trained with lt-sglang train",
        "made": "given to lt-sglang train or counted by it; write here by which samples and score.",
    }

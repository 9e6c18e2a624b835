"""Models whose lazy layers are known because their publishers trained them that way."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import resources
from pathlib import PurePath

from lt_sglang.config import LightTransferConfig


@dataclass(frozen=True)
class KnownModel:
    """A published checkpoint with a fixed list; ``match`` are lower-case last path components."""

    name: str
    match: tuple[str, ...]
    num_layers: int
    architecture: str
    config: LightTransferConfig
    origin: str


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
            )
        )
    return models


def find_known(model_path: str) -> KnownModel | None:
    """The known model that ``model_path`` (a hub name or a folder) names, or None."""
    tail = PurePath(model_path.rstrip("/")).name.lower()
    return next((model for model in known_models() if tail in model.match), None)

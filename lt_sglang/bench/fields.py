"""Read plain values of a YAML file into frozen dataclasses; errors name the field and what it allows."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from lt_sglang.errors import LightTransferError


class Fields:
    """The keys of one mapping of a file, taken out one by one; ``done`` refuses what is left.

    Args:
        data: the mapping.
        where: how messages name it, e.g. ``load``; empty at the top.
        target: the dataclass it becomes; its fields are the allowed keys.
    """

    def __init__(self, data: Any, where: str, target: type[Any]) -> None:
        self._allowed = [field.name for field in dataclasses.fields(target)]
        self._where = where
        if not isinstance(data, Mapping):
            raise LightTransferError(f"{where or 'scenario'}: must be a mapping with {self._list()}")
        unknown = [key for key in data if key not in self._allowed]
        if unknown:
            raise LightTransferError(f"{self.name(str(unknown[0]))}: unknown, allowed are {self._list()}")
        self._data = data

    def name(self, key: str) -> str:
        """The full name of ``key`` in messages."""
        return f"{self._where}.{key}" if self._where else key

    def raw(self, key: str) -> Any:
        """The value as it is; None if it is not given."""
        return self._data.get(key)

    def text(self, key: str, default: str | None = None, allowed: Sequence[str] = ()) -> str:
        """A string, one of ``allowed`` if there are any."""
        value = self._data.get(key, default)
        if allowed and value not in allowed:
            raise LightTransferError(f"{self.name(key)}: {value!r} is not one of {', '.join(allowed)}")
        if not isinstance(value, str) or not value:
            raise LightTransferError(f"{self.name(key)}: must be a text, not {value!r}")
        return value

    def integer(self, key: str, low: int, default: int | None = None) -> int:
        """An integer from ``low``."""
        value = self._data.get(key, default)
        if type(value) is not int or value < low:
            raise LightTransferError(f"{self.name(key)}: {value!r} is not an integer from {low}")
        return value

    def number(self, key: str, low: float, high: float = float("inf"), default: float | None = None) -> float:
        """A number from ``low`` to ``high``."""
        value = self._data.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            span = f"from {low:g}" if high == float("inf") else f"from {low:g} to {high:g}"
            raise LightTransferError(f"{self.name(key)}: {value!r} is not a number {span}")
        return float(value)

    def maybe_integer(self, key: str, low: int) -> int | None:
        """As ``integer``; None if it is not given."""
        return None if self._data.get(key) is None else self.integer(key, low)

    def maybe_number(self, key: str, low: float) -> float | None:
        """As ``number``; None if it is not given."""
        return None if self._data.get(key) is None else self.number(key, low)

    def boolean(self, key: str, default: bool) -> bool:
        """true or false."""
        value = self._data.get(key, default)
        if not isinstance(value, bool):
            raise LightTransferError(f"{self.name(key)}: {value!r} is not true or false")
        return value

    def mapping(self, key: str) -> dict[str, Any]:
        """A mapping; empty if it is not given."""
        value = self._data.get(key) or {}
        if not isinstance(value, Mapping):
            raise LightTransferError(f"{self.name(key)}: must be a mapping, not {value!r}")
        return dict(value)

    def texts(self, key: str) -> tuple[str, ...]:
        """A list of strings; numbers in it become strings."""
        value = self._data.get(key) or []
        if not isinstance(value, list):
            raise LightTransferError(f"{self.name(key)}: must be a list, not {value!r}")
        return tuple(str(item) for item in value)

    def _list(self) -> str:
        return ", ".join(self._allowed)

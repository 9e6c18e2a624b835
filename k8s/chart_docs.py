"""A chart's values.schema.json and the table of values in its README, from the comments of its values.yaml.

Usage: ``python k8s/chart_docs.py`` writes both for every chart below k8s/charts, as ``make manifests`` does.

A comment above a key or behind it says what the value is. A line ``# type: ...`` above says what it may be,
where the default does not: a name of k8s/charts/types.yaml, or JSON schema in YAML's flow form. helm-docs and
helm-schema do the same and are Go programs; this needs PyYAML alone.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

CHARTS = Path(__file__).resolve().parent / "charts"
TYPES = yaml.safe_load((CHARTS / "types.yaml").read_text(encoding="utf-8"))
TABLE = "<!-- Below: written by k8s/chart_docs.py from values.yaml. -->"
EXACT = 2**53 - 1  # the largest integer that Helm keeps as it is
KINDS = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array", dict: "object"}


class Values:
    """values.yaml with its comments."""

    def __init__(self, text: str) -> None:
        self._lines = text.splitlines()
        node = yaml.compose(text)
        assert isinstance(node, yaml.MappingNode)
        self.root = node

    def comments(self, key: yaml.Node) -> tuple[str, Any]:
        """What the comments at ``key`` say, and its declared type (None: as the default)."""
        line = key.start_mark.line
        above: list[str] = []
        while line - len(above) > 0 and re.match(r"\s*#", self._lines[line - len(above) - 1]):
            above.insert(0, self._lines[line - len(above) - 1].strip().lstrip("#").strip())
        behind = re.search(r"(?:^|\s)#\s(.*)$", self._lines[line])
        declared = [text.removeprefix("type:") for text in above if text.startswith("type:")]
        said = [text for text in above if not text.startswith("type:")] + ([behind[1]] if behind else [])
        return " ".join(said), yaml.safe_load(declared[0]) if declared else None

    def keys(self, node: yaml.MappingNode) -> Iterator[tuple[yaml.Node, str, yaml.Node, Any]]:
        """Each key of a mapping: its node, its name, and its value as node and as data."""
        for key, value in node.value:
            yield key, key.value, value, yaml.safe_load(yaml.serialize(value))


def schema(values: Values, node: yaml.MappingNode, used: set[str]) -> dict[str, Any]:
    """JSON schema of a mapping; ``used`` collects the names of types."""
    properties: dict[str, Any] = {}
    for key, name, value_node, value in values.keys(node):
        _, declared = values.comments(key)
        if isinstance(declared, str):
            used.add(declared)
            properties[name] = {"$ref": f"#/definitions/{declared}"}
        elif isinstance(value_node, yaml.MappingNode) and value_node.value:
            properties[name] = {**schema(values, value_node, used), **(declared or {})}
        else:
            own = (
                {}
                if value is None or {"enum", "anyOf"} & set(declared or {})
                else {"type": KINDS[type(value)]}
            )
            properties[name] = {**own, **(declared or {})}
            used.update(re.findall(r"#/definitions/(\w+)", json.dumps(declared)))
    return {"type": "object", "additionalProperties": False, "properties": properties}


def table(values: Values, node: yaml.MappingNode, path: str = "") -> Iterator[str]:
    """Rows of the README's table."""
    for key, name, value_node, value in values.keys(node):
        said, declared = values.comments(key)
        if isinstance(value_node, yaml.MappingNode) and value_node.value and not isinstance(declared, str):
            if said:
                yield f"| **`{path}{name}`** | | {said} |"
            yield from table(values, value_node, f"{path}{name}.")
        else:
            yield f"| `{path}{name}` | `{json.dumps(value)}` | {said.replace('|', chr(92) + '|')} |"


def bound(part: Any) -> None:
    """Give every integer of a schema a maximum."""
    for inner in part.values() if isinstance(part, dict) else part if isinstance(part, list) else ():
        bound(inner)
    if isinstance(part, dict) and "integer" in (part.get("type"), *(part.get("type") or ())):
        part.setdefault("maximum", EXACT)


def documents(chart: Path) -> dict[Path, str]:
    """The two files of a chart, as they should be."""
    values = Values((chart / "values.yaml").read_text(encoding="utf-8"))
    used: set[str] = set()
    found = schema(values, values.root, used)
    found["properties"]["global"] = {"type": "object"}
    whole = {"$schema": "http://json-schema.org/draft-07/schema#", "title": chart.name, **found}
    whole["definitions"] = {name: TYPES[name] for name in sorted(used)}
    bound(whole)
    readme = (chart / "README.md").read_text(encoding="utf-8").partition(TABLE)[0]
    rows = ["", "| value | default | meaning |", "|---|---|---|", *table(values, values.root), ""]
    return {
        chart / "values.schema.json": json.dumps(whole, indent=2) + "\n",
        chart / "README.md": readme + TABLE + "\n".join(rows),
    }


def main() -> int:
    """Write the files of every chart."""
    for chart in sorted(file.parent for file in CHARTS.glob("*/Chart.yaml")):
        for file, text in documents(chart).items():
            file.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""A real Prometheus that scrapes real engines, with this repository's configuration and rules."""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import requests
import yaml

from lt_sglang.launch.processes import free_port, kill_tree, spawn

from .test_monitoring import RULES, SCRAPE


class Prometheus:
    """One Prometheus: ``launch`` it, query it, ``stop`` it.

    Args:
        program: the executable.
        folder: for its data, configuration and log.
        targets: what the job lt-sglang scrapes, host:port.
        edit: changes the rules first, so that a test need not wait as long as a person would.
    """

    def __init__(
        self,
        program: Path,
        folder: Path,
        targets: Sequence[str],
        edit: Callable[[str], str] = lambda text: text,
    ) -> None:
        self._program, self._folder = program, folder
        self.url = f"http://127.0.0.1:{free_port()}"
        config = yaml.safe_load(SCRAPE.read_text(encoding="utf-8"))
        config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
        config["scrape_configs"] = config["scrape_configs"][:1]
        config["scrape_configs"][0]["static_configs"] = [{"targets": list(targets)}]
        (folder / "prometheus.yml").write_text(json.dumps(config), encoding="utf-8")
        for rules in RULES:
            (folder / rules.name).write_text(edit(rules.read_text(encoding="utf-8")), encoding="utf-8")
        self._process: subprocess.Popen[bytes] | None = None

    def launch(self) -> None:
        """Start it and wait until it answers."""
        command = [
            str(self._program),
            "--config.file=prometheus.yml",
            "--storage.tsdb.path=data",
            f"--web.listen-address={self.url.removeprefix('http://')}",
        ]
        self._process = spawn(command, {}, self._folder / "log")
        self.wait_for(lambda: requests.get(f"{self.url}/-/ready", timeout=2).status_code == 200)

    def stop(self) -> None:
        """End it."""
        if self._process is not None:
            kill_tree(self._process)

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The samples of an instant query; raises on one that Prometheus refuses."""
        answer = requests.get(f"{self.url}/api/v1/query", params={"query": expression}, timeout=10).json()
        assert answer["status"] == "success", (expression, answer)
        return list(answer["data"]["result"])

    def firing(self) -> dict[str, Mapping[str, str]]:
        """The labels of each alert that fires, by name."""
        alerts = requests.get(f"{self.url}/api/v1/alerts", timeout=10).json()["data"]["alerts"]
        return {item["labels"]["alertname"]: item["labels"] for item in alerts if item["state"] == "firing"}

    def wait_for(self, what: Callable[[], Any], seconds: float = 60) -> Any:
        """Ask until the answer is true; raises AssertionError."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                if found := what():
                    return found
            except requests.RequestException:
                pass
            assert time.monotonic() < deadline, "not within the time given"
            time.sleep(0.5)


def as_grafana(expression: str) -> str:
    """A dashboard expression with its variables filled in."""
    for name, value in {"$model": ".*", "$instance": ".*", "$__rate_interval": "20s"}.items():
        expression = expression.replace(name, value)
    assert not re.search(r"\$[a-z_]", expression), expression
    return expression

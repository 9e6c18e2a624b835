"""Rules and dashboard: parsed and unit-tested by Prometheus' own tool, and only of metrics that exist."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from lt_sglang.metrics.catalog import CATALOG

from .chart import CHART

ROOT = Path(__file__).resolve().parents[2]
RULES = CHART / "files" / "rules.yaml"
UNIT_TESTS = Path(__file__).with_name("rules_test.yaml")
DASHBOARD = json.loads((CHART / "files" / "dashboard.json").read_text(encoding="utf-8"))
SCRAPE = ROOT / "deploy" / "prometheus" / "prometheus.yml"

GROUPS = yaml.safe_load(RULES.read_text(encoding="utf-8"))["groups"]
ALERTS = {rule["alert"]: rule for group in GROUPS for rule in group["rules"] if "alert" in rule}
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
EXPRESSIONS = [target["expr"] for panel in PANELS for target in panel["targets"]]

# Of SGLang's; test_live.py finds each on a real engine.
SGLANG = {
    "sglang_num_running_reqs",
    "sglang_num_queue_reqs",
    "sglang_num_retracted_requests_total",
    "sglang_generation_tokens_total",
    "sglang_cache_hit_rate",
    "sglang_time_to_first_token_seconds_bucket",
    "sglang_time_to_first_token_seconds_count",
    "sglang_inter_token_latency_seconds_bucket",
    "sglang_inter_token_latency_seconds_count",
}


def promtool_test(promtool: Path, folder: Path, rules: str) -> subprocess.CompletedProcess[str]:
    folder.mkdir()
    (folder / "rules.yaml").write_text(rules, encoding="utf-8")
    shutil.copy(UNIT_TESTS, folder / "test.yaml")
    command = [str(promtool), "test", "rules", "test.yaml"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def test_rules_pass_their_unit_tests(promtool: Path, tmp_path: Path) -> None:
    done = promtool_test(promtool, tmp_path / "as-is", RULES.read_text(encoding="utf-8"))
    assert done.returncode == 0, done.stdout + done.stderr


def test_unit_tests_notice_alerts_that_never_fire(promtool: Path, tmp_path: Path) -> None:
    """Each alert is missed by a test of its own when it waits for a day."""
    data: dict[str, Any] = yaml.safe_load(RULES.read_text(encoding="utf-8"))
    for group in data["groups"]:
        for rule in group["rules"]:
            if "alert" in rule:
                rule["for"] = "24h"
    output = promtool_test(promtool, tmp_path / "late", yaml.safe_dump(data))
    missed = set(re.findall(r"alertname: ?(\w+)", output.stdout + output.stderr))
    assert missed == set(ALERTS)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('tp_rank="0"}[10m]) > 4', 'tp_rank="0"}[10m]) > -1'),
        ("ratio_rate1h > 0.3", "ratio_rate1h > 0.01"),
        ("ratio_rate6h > 0.1", "ratio_rate6h > 0.01"),
        ("> 0.95", "> 0.93"),
        ("< 0.5", "< 0.99"),
        ('event!="evicted"', 'event=~".+"'),
        ('result="different"', 'result=~".+"'),
        ('result="different"}[1h]', 'result="different"}[5m]'),
        ('unless max_over_time(up{job="lt-sglang",elastic=""}[1d]) == 1', ""),
        ('elastic=""', 'elastic=~".*"'),
        ('is_streaming="true"', 'is_streaming=~".*"'),
    ],
)
def test_unit_tests_notice_an_alert_that_fires_too_soon(
    old: str, new: str, promtool: Path, tmp_path: Path
) -> None:
    text = RULES.read_text(encoding="utf-8")
    assert old in text
    changed = re.sub(r"ratio_rate(5m|30m) > 0\.[13]", r"ratio_rate\1 > 0.01", text.replace(old, new))
    assert promtool_test(promtool, tmp_path / "changed", changed).returncode != 0


def test_every_alert_is_unit_tested_and_in_the_manual() -> None:
    tested = UNIT_TESTS.read_text(encoding="utf-8")
    manual = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    for name, rule in ALERTS.items():
        assert f"alertname: {name}\n" in tested, name
        assert f"### {name}\n" in manual, name
        assert rule["annotations"]["runbook"] == f"docs/operations.md#{name.lower()}"
        assert rule["labels"]["severity"] in ("critical", "warning")


def names(expression: str) -> set[str]:
    without_labels = re.sub(r"\b(by|on) \([^)]*\)", "", expression)
    return set(re.findall(r"\b((?:lt|sglang)_\w+)", without_labels))


def test_expressions_use_metrics_that_exist() -> None:
    known = {metric.name for metric in CATALOG} | SGLANG
    used = set().union(*(names(rule["expr"]) for group in GROUPS for rule in group["rules"]))
    used |= set().union(*map(names, EXPRESSIONS))
    assert used <= known, used - known
    shown = set().union(*map(names, EXPRESSIONS))
    assert {metric.name for metric in CATALOG} - shown <= {"lt_expected_tokens"}, "shown nowhere"


def test_panels_do_not_overlap() -> None:
    taken: dict[tuple[int, int], str] = {}
    for panel in DASHBOARD["panels"]:
        box = panel["gridPos"]
        assert box["x"] + box["w"] <= 24
        for x in range(box["x"], box["x"] + box["w"]):
            for y in range(box["y"], box["y"] + box["h"]):
                assert taken.setdefault((x, y), panel["title"]) == panel["title"]
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])


def test_scrape_configuration(promtool: Path, tmp_path: Path) -> None:
    shutil.copy(SCRAPE, tmp_path / "prometheus.yml")
    shutil.copy(RULES, tmp_path / "rules.yaml")
    command = [str(promtool), "check", "config", "prometheus.yml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    "form", ["sglang:num_queue_reqs", "sglang_num_queue_reqs", "ray_sglang_num_queue_reqs"]
)
def test_every_form_of_a_name_becomes_one(form: str) -> None:
    jobs = yaml.safe_load(SCRAPE.read_text(encoding="utf-8"))["scrape_configs"]
    (rule,) = jobs[0]["metric_relabel_configs"]
    replacement = rule["replacement"].replace("$1", r"\1")
    assert re.sub(f"^(?:{rule['regex']})$", replacement, form) == "sglang_num_queue_reqs"
    assert not re.fullmatch(rule["regex"], "lt_requests_total")

"""Rules and dashboard: parsed and unit-tested by Prometheus' own tool, and only of metrics that exist."""

from __future__ import annotations

import copy
import inspect
import json
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from lt_sglang.metrics.catalog import CATALOG

from .chart import MONITORING

ROOT = Path(__file__).resolve().parents[2]
RULES = (MONITORING / "files" / "objectives.yaml", MONITORING / "files" / "alerts.yaml")
CASES = [
    case
    for file in sorted((Path(__file__).parent / "alert_cases").glob("*.yaml"))
    for case in yaml.safe_load(file.read_text(encoding="utf-8"))
]
DASHBOARD = json.loads((MONITORING / "files" / "dashboard.json").read_text(encoding="utf-8"))
SCRAPE = ROOT / "deploy" / "prometheus" / "prometheus.yml"
RUNBOOK = "docs/operations.md"

GROUPS = [group for file in RULES for group in yaml.safe_load(file.read_text(encoding="utf-8"))["groups"]]
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
    "sglang_generation_tokens_histogram_sum",
    "sglang_generation_tokens_histogram_count",
    "sglang_uncached_prompt_tokens_histogram_bucket",
    "sglang_num_requests_total",
    "sglang_http_responses_total",
}
# And those that it measures with CUDA events, which it calls "sglang:...".
ON_A_GPU = {"sglang_load_back_duration_seconds_bucket"}


def unit_test(case: dict[str, Any], alerts: Mapping[str, str]) -> dict[str, Any]:
    """promtool's form of a case; ``alerts``: names, each with the one that it is to behave as."""
    return {
        "name": case["name"],
        "interval": "1m",
        "input_series": [{"series": key, "values": value} for key, value in case["series"].items()],
        "alert_rule_test": [
            {
                "eval_time": moment,
                "alertname": name,
                "exp_alerts": [expected(origin, **found) for found in firing.get(origin, [])],
            }
            for moment, firing in case["at"].items()
            for name, origin in alerts.items()
        ],
        "promql_expr_test": [
            {
                "eval_time": moment,
                "expr": f"round({series}, 1e-6)",
                "exp_samples": [{"labels": "{" + series.partition("{")[2], "value": value}],
            }
            for moment, known in case.get("values", {}).items()
            for series, value in known.items()
        ],
    }


def expected(name: str, labels: dict[str, str], summary: str) -> dict[str, Any]:
    """The alert as promtool shows it."""
    own = ALERTS[name]
    return {
        "exp_labels": {**labels, **own["labels"]},
        "exp_annotations": {**own["annotations"], "summary": summary},
    }


def wrong_alerts(
    promtool: Path, folder: Path, groups: list[dict[str, Any]], about: str = ""
) -> tuple[set[str], str]:
    """Names of alerts that are wrong in a case with a series ``about`` something, and promtool's report."""
    (folder / "rules.yaml").write_text(yaml.safe_dump({"groups": groups}), encoding="utf-8")
    names = [rule["alert"] for group in groups for rule in group["rules"] if "alert" in rule]
    alerts = {name: name.partition("_")[0] for name in names}
    tests = {
        "rule_files": ["rules.yaml"],
        "evaluation_interval": "1m",
        "group_eval_order": [group["name"] for group in groups],
        "tests": [unit_test(case, alerts) for case in CASES if about in str(case)],
    }
    (folder / "test.yaml").write_text(yaml.safe_dump(tests), encoding="utf-8")
    command = [str(promtool), "test", "rules", "test.yaml"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    report = done.stdout + done.stderr
    assert done.returncode == 0 or "alertname:" in report or "expr:" in report, report
    return set(re.findall(r"alertname: ?(\w+)", report)), "" if done.returncode == 0 else report


def altered(name: str, ending: str, old: str = "", new: str = "", wait: str | None = None) -> dict[str, Any]:
    """An alert under a name of its own, its condition or the time it waits another."""
    rule = copy.deepcopy(ALERTS[name])
    assert old in rule["expr"], (name, old)
    changed = {"alert": f"{name}_{ending}", "expr": rule["expr"].replace(old, new) if old else rule["expr"]}
    return {**rule, **changed, **({"for": wait} if wait else {})}


@pytest.fixture(scope="module")
def verdicts(promtool: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[set[str], str]:
    """One run of promtool over all alerts, as they are and altered."""
    rules = [
        *(altered(name, "late", wait="24h") for name in ALERTS),
        *(altered(name, "soon", *change) for name, change in TOO_SOON.items()),
        *(altered(name, "sooner", *change) for name, change in OTHERS.items()),
    ]
    groups = [*GROUPS, {"name": "altered", "rules": rules}]
    return wrong_alerts(promtool, tmp_path_factory.mktemp("rules"), groups)


def test_every_alert_fires_in_its_case_and_no_other_does(verdicts: tuple[set[str], str]) -> None:
    wrong, report = verdicts
    assert not wrong & set(ALERTS) and "expr:" not in report, report


# What keeps an alert silent, and what would be without it.
TOO_SOON = {
    "LtSglangDown": ("== 0", "<= 1"),
    "LtSglangStuckStart": ('unless max_over_time(up{job="lt-sglang",elastic=""}[1d]) == 1', ""),
    "LtSglangNoneLeft": ('unless on (namespace, app_kubernetes_io_instance) up{job="lt-sglang"} == 1', ""),
    "LtSglangNoTargets": (
        'unless on (namespace, app_kubernetes_io_instance) max_over_time(up{job="lt-sglang"}[1d])',
        "",
    ),
    "LtSglangGatewayDown": ("max by", "min by"),
    "LtSglangGatewayGone": ('and on (namespace, app_kubernetes_io_instance) up{job="lt-sglang"} == 1', ""),
    "LtSglangGatewayStale": (">= 0", ">= -1"),
    "LtSglangErrorsFast": ("(10 *", "(1 *"),
    "LtSglangErrorsSlow": ("(2 *", "(0 *"),
    "LtSglangDownloadFailed": ('job_name=~".+-models-[0-9a-f]{8}(-before)?"', 'job_name=~".+"'),
    "LtSglangCrashLoop": ("> 2", "> 0"),
    "LtSglangMetricsMissing": ("unless on (namespace, instance) lt_build_info", ""),
    "LtSglangQueue": ("> 4", "> -1"),
    "LtSglangTtftBurnFast": ("> 1", "> 0.5"),
    "LtSglangTtftBurnSlow": ("> 1", "> 0.5"),
    "LtSglangItlBurnFast": ("> 1", "> 0.5"),
    "LtSglangItlBurnSlow": ("> 1", "> 0.1"),
    "LtSglangKvFull": ("< 0.05", "< 0.07"),
    "LtSglangRetractions": ('cause="memory"', 'cause=~".+"'),
    "LtSglangSinksRefused": ('event!="evicted"', 'event=~".+"'),
    "LtSglangTableMismatch": ('result="different"', 'result=~".+"'),
    "LtSglangShortPrompts": ("> 0.5", "> 0.2"),
    "LtSglangCanaryWorse": ("> 0.02", "> -0.02"),
}
# The same a second time, and records, which several alerts use.
OTHERS = {
    "LtSglangKvFull": ("[5m]) > 0", "[5m]) >= 0"),
    "LtSglangRetractions": ("unless on (namespace, instance) lt_retractions_total", ""),
    "LtSglangTableMismatch": ("[1h]", "[5m]"),
    "LtSglangDown": ('elastic=""', 'elastic=~".*"'),
    "LtSglangStuckStart": ('elastic=""', 'elastic=~".*"'),
    "LtSglangGatewayStale": ("(namespace, app_kubernetes_io_instance, instance)", "(namespace, instance)"),
    "LtSglangCrashLoop": ('and on (namespace, pod) up{job=~"lt-sglang(-gateway)?"}', ""),
    "LtSglangTtftBurnFast": ("lt:target:minimum_requests", "(lt:target:minimum_requests * 0)"),
    "LtSglangErrorsFast": ("lt:target:minimum_requests", "(lt:target:minimum_requests * 0)"),
    "LtSglangNoneLeft": (
        'and on (namespace, app_kubernetes_io_instance) up{job=~"lt-sglang(-gateway)?"}',
        "",
    ),
}
RECORDS = (
    ("lt:ttft_late:", "time_to_first", 'is_streaming="true"', 'is_streaming=~".*"'),
    ("lt:ttft_late:", "time_to_first", "/ 1000", "* 0"),
    ("lt:errors:", "http_responses", 'status_code!="503"', 'status_code!=""'),
    ("lt:errors:", "http_responses", "ready|", ""),
)


@pytest.mark.parametrize("name", ALERTS)
def test_cases_notice_an_alert_that_never_fires(name: str, verdicts: tuple[set[str], str]) -> None:
    """Each alert is missed by a case of its own when it waits for a day."""
    assert f"{name}_late" in verdicts[0]


@pytest.mark.parametrize("name", [*(f"{n}_soon" for n in TOO_SOON), *(f"{n}_sooner" for n in OTHERS)])
def test_cases_notice_an_alert_that_fires_too_soon(name: str, verdicts: tuple[set[str], str]) -> None:
    """An alert with its condition widened fires in a case that is not its own."""
    assert name in verdicts[0]


@pytest.mark.parametrize(("record", "series", "old", "new"), RECORDS)
def test_cases_notice_a_wrong_record(
    record: str, series: str, old: str, new: str, promtool: Path, tmp_path: Path
) -> None:
    groups, changed = copy.deepcopy(GROUPS), 0
    for rule in groups[1]["rules"]:
        if rule["record"].startswith(record):
            changed += old in rule["expr"]
            rule["expr"] = rule["expr"].replace(old, new)
    assert changed
    assert wrong_alerts(promtool, tmp_path, groups, series)[1]


def test_every_alert_has_a_case_and_is_in_the_manual() -> None:
    fired = {name for case in CASES for firing in case["at"].values() for name in firing}
    assert fired == set(ALERTS) == set(TOO_SOON)
    manual = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    for name, rule in ALERTS.items():
        assert f"### {name}\n" in manual, name
        assert rule["annotations"]["runbook_url"] == f"{RUNBOOK}#{name.lower()}"
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert "{{" not in rule["annotations"]["description"], "the cases compare summaries alone"


def names(expression: str) -> set[str]:
    without_labels = re.sub(r"\b(by|on|group_left) ?\([^)]*\)|\{[^}]*\}|\"[^\"]*\"", "", expression)
    return set(re.findall(r"\b((?:lt|sglang)_\w+)", without_labels))


def test_expressions_use_metrics_that_exist() -> None:
    known = {metric.name for metric in CATALOG} | SGLANG | ON_A_GPU
    used = set().union(*(names(rule["expr"]) for group in GROUPS for rule in group["rules"]))
    used |= set().union(*map(names, EXPRESSIONS))
    assert used <= known, used - known
    shown = set().union(*map(names, EXPRESSIONS))
    assert {metric.name for metric in CATALOG} <= shown, "shown nowhere"


@pytest.mark.parametrize("name", sorted(ON_A_GPU))
def test_sglang_has_what_it_publishes_on_a_gpu_alone(name: str) -> None:
    from sglang.srt.observability import metrics_collector

    own = name.removesuffix("_bucket").replace("sglang_", "sglang:", 1)
    assert f'"{own}"' in inspect.getsource(metrics_collector)


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
    for file in RULES:
        shutil.copy(file, tmp_path)
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

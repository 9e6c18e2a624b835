""".pre-commit-config.yaml: valid, and the rule for subjects of commits."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from pre_commit.clientlib import load_config

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def hooks() -> dict[str, dict[str, Any]]:
    (repository,) = load_config(str(ROOT / ".pre-commit-config.yaml"))["repos"]
    assert repository["repo"] == "local"  # nothing is fetched
    return {hook["id"]: hook for hook in repository["hooks"]}


def test_hooks_run_targets_that_exist(hooks: dict[str, dict[str, Any]]) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    called = [
        hook["entry"].split()[2:] for hook in hooks.values() if hook["entry"].startswith("make --silent")
    ]
    assert called
    assert targets.issuperset(name for names in called for name in names)


@pytest.mark.parametrize(
    ("message", "accepted"),
    [
        ("memory: sinks are freed after their last request\n", True),
        ("cli, docs: plan prints a serve line\n\nThe reason.\n", True),
        ("lt_sglang/memory: sinks are freed", True),
        ("Merge branch 'other'\n", True),
        ("sinks are freed after their last request\n", False),
        ("Memory: sinks are freed after their last request\n", False),
        ("memory:sinks are freed\n", False),
        ("memory: \n\nonly the body tells: what changed\n", False),
        ("subject without an area\n\nmemory: in the body\n", False),
        (f"memory: {'x' * 92}\n", True),
        (f"memory: {'x' * 93}\n", False),
    ],
)
def test_subjects(hooks: dict[str, dict[str, Any]], message: str, accepted: bool) -> None:
    hook = hooks["subject"]
    assert (hook["language"], hook["args"]) == ("pygrep", ["--negate", "--multiline"])
    # As pre-commit's pygrep does with --multiline.
    found = re.search(hook["entry"].encode(), message.encode(), re.MULTILINE | re.DOTALL)
    assert bool(found) is accepted

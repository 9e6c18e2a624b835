"""tests/mutation: the faults made by hand can still be planted, and the tables name modules and tests."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
BY_HAND = json.loads((REPOSITORY / "tests/mutation/by_hand.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("fault", BY_HAND, ids=lambda fault: str(fault["what"]))
def test_a_fault_made_by_hand_has_its_place(fault: dict[str, str]) -> None:
    text = (REPOSITORY / fault["path"]).read_text(encoding="utf-8")
    assert text.count(fault["before"]) == 1
    compile(text.replace(fault["before"], fault["after"]), fault["path"], "exec")


def test_the_tables_name_modules_and_tests_that_exist() -> None:
    from tests.mutation.run import CACHES, MODULES, TESTS

    for name, tests in TESTS.items():
        assert (REPOSITORY / "lt_sglang" / name).exists(), name
        assert all((REPOSITORY / "tests" / test).exists() for test in tests), name
    assert all(list(REPOSITORY.glob(pattern)) for pattern in MODULES)
    assert all((REPOSITORY / "tests" / test).exists() for test in CACHES)

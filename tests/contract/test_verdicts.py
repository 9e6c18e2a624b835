"""verdicts.toml covers everything that SGLang lets a user set, and what it claims is there."""

from __future__ import annotations

import pytest

from lt_sglang.refusals import DYNAMIC_REFUSALS, REFUSALS
from tests.engine.specs import SERVERS

from . import verdicts
from .surface import surface, variables_of_concern
from .verdicts import REPOSITORY, Group


@pytest.fixture(scope="module")
def everything() -> dict[str, set[str]]:
    return surface()


@pytest.fixture(scope="module")
def groups() -> list[Group]:
    return verdicts.load()


def test_everything_has_one_verdict_and_every_test_exists(
    everything: dict[str, set[str]], groups: list[Group]
) -> None:
    found = verdicts.problems(everything, groups)
    assert not found, "\n".join(found)


def test_the_surface_is_seen(everything: dict[str, set[str]]) -> None:
    """What SGLang is known to have; an import that fails would leave a part of it out."""
    assert {"tp_size", "kv_canary"} <= everything["server_args"]
    assert {
        "GenerateReqInput.cache_salt",
        "SamplingParams.custom_params",
        "SessionParams.offset",
        "ChatCompletionRequest.lora_path",
        "AnthropicMessagesRequest.max_tokens",
    } <= everything["requests"]
    assert "x-override-bootstrap-host" in everything["headers"]
    read = variables_of_concern()
    assert {"SGLANG_USE_HND_KVCACHE", "SGLANG_DP_RANK"} <= read <= everything["environment"]


def test_what_is_read_where_it_matters_has_a_reason_of_its_own(
    everything: dict[str, set[str]], groups: list[Group]
) -> None:
    """No variable that is read there is in the last list."""
    given, _ = verdicts.assign("environment", everything["environment"], groups)
    (rest,) = [group for group in groups if group.says == "read in none of those folders"]
    assert not {name for name in variables_of_concern() if given[name] is rest}


def test_refusals_and_verdicts_agree(everything: dict[str, set[str]], groups: list[Group]) -> None:
    given, _ = verdicts.assign("server_args", everything["server_args"], groups)
    for refusal in REFUSALS:
        partly = refusal.field in ("kv_cache_dtype",)
        assert (given[refusal.field].kind == "refused") is not partly, refusal.field
    in_dynamic_mode = {refusal.field for refusal in DYNAMIC_REFUSALS}
    for name, group in given.items():
        if group.kind == "refused" and "test_dynamic_mode_refuses_more" in group.says:
            assert name in in_dynamic_mode


def test_what_works_is_given_in_a_test(everything: dict[str, set[str]], groups: list[Group]) -> None:
    """A server argument that an engine's test shows stands on some command line."""
    folders = ("tests/engine", "tests/deploy", "tests/gpu", "lt_sglang/launch", "lt_sglang/bench")
    text = "".join(
        file.read_text(encoding="utf-8") for name in folders for file in (REPOSITORY / name).rglob("*.py")
    )
    given, _ = verdicts.assign("server_args", everything["server_args"], groups)
    missing = {
        name
        for name, group in given.items()
        if group.kind == "works"
        and name in group.entries
        and group.says.startswith("tests/engine")
        and f'"--{name.replace("_", "-")}"' not in text
    }
    assert not missing, missing


@pytest.mark.parametrize(
    ("flag", "untested"),
    [
        # SGLang takes the flag's value "priority", and then ends: "Unknown schedule_policy".
        ("--schedule-policy", {"priority", "fcfs"}),
        ("--radix-eviction-policy", {"lru"}),
    ],
)
def test_every_policy_is_some_servers(flag: str, untested: set[str]) -> None:
    """fcfs and lru are what the servers without the flag have."""
    import argparse

    from sglang.srt.server_args import ServerArgs

    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    (action,) = [action for action in parser._actions if flag in action.option_strings]
    used = set()
    for spec in SERVERS.values():
        used |= {value for name, value in zip(spec.flags, spec.flags[1:], strict=False) if name == flag}
    assert set(action.choices or ()) - untested == used


EXAMPLE = """
[[server_args]]
works = "tests/contract/test_verdicts.py::test_the_surface_is_seen"
names = "a_* b"
[[server_args]]
no_concern = "looks only"
names = "a_2 c"
"""


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("b", "b"), []),
        (("a_2 c", "a_2"), ["server_args: no verdict for c"]),
        (("a_2 c", "a_2 c gone"), ["server_args, group 2: gone names nothing that SGLang has"]),
        (("a_2 c", "a_2 c b"), ["server_args, group 2: b has a verdict in server_args, group 1 as well"]),
        (("is_seen", "is_not"), ["server_args, group 1: there is no test "]),
        (("contract/test_v", "contract/test_w"), ["server_args, group 1: there is no test "]),
    ],
)
def test_the_check_itself(change: tuple[str, str], says: list[str]) -> None:
    found = verdicts.problems(
        {"server_args": {"a_1", "a_2", "b", "c"}}, verdicts.load(EXAMPLE.replace(*change))
    )
    assert len(found) == len(says)
    assert all(sentence.startswith(start) for sentence, start in zip(found, says, strict=True)), found


def test_the_narrowest_entry_counts() -> None:
    given, wrong = verdicts.assign("server_args", {"a_1", "a_2", "b", "c"}, verdicts.load(EXAMPLE))
    assert not wrong
    assert {name: group.kind for name, group in given.items()} == {
        "a_1": "works",
        "a_2": "no_concern",
        "b": "works",
        "c": "no_concern",
    }


@pytest.mark.parametrize(
    "text",
    [
        '[[server_args]]\nworks = "a"\nrefused = "b"\nnames = "c"',
        '[[server_args]]\nworks = "a"\nnames = ""',
        '[[server_args]]\nworks = "a"\nnames = "c"\nreason = "d"',
    ],
)
def test_a_group_of_another_form_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"^server_args, group 1: wants names and exactly one of"):
        verdicts.load(text)

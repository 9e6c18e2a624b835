"""Functions, methods and attributes of SGLang's that lt_sglang calls, overrides and reads."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import flashinfer
import pytest
import sglang

import lt_sglang
from lt_sglang.attention.flashinfer_private import PrefillPlanInfo, PrefillPlanSM90Info
from lt_sglang.config import LightTransferConfig
from lt_sglang.launch.model_config import _IGNORE_WINDOW
from lt_sglang.resolve import model_overrides
from lt_sglang.upstream import check
from lt_sglang.upstream.attributes import ATTRIBUTES, FLASHINFER
from lt_sglang.upstream.check import Override, has_attribute, signature_text
from lt_sglang.upstream.recorded import FINGERPRINTS, SIGNATURES

OURS = Path(lt_sglang.__file__).parent
THEIRS = Path(sglang.__file__).parent


def imported_names() -> list[tuple[str, str]]:
    """Every (module, name) that any file of ours imports from sglang."""
    found = set()
    for file in OURS.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "sglang":
                found |= {(str(node.module), alias.name) for alias in node.names}
            elif isinstance(node, ast.Import):
                found |= {(alias.name, "") for alias in node.names if alias.name.startswith("sglang")}
    return sorted(found)


@pytest.mark.parametrize(("module", "name"), imported_names(), ids=".".join)
def test_every_imported_name_exists(module: str, name: str) -> None:
    loaded = importlib.import_module(module)
    if name and not hasattr(loaded, name):
        importlib.import_module(f"{module}.{name}")


@pytest.mark.parametrize("target", SIGNATURES)
def test_signature_is_as_recorded(target: str) -> None:
    assert signature_text(pkgutil.resolve_name(target)) == SIGNATURES[target]


@pytest.mark.parametrize("override", check.all_overrides(), ids=lambda override: override.ours)
def test_override_is_recorded_and_fits(override: Override) -> None:
    assert check.check_overrides([override]) == []


def test_every_subclassing_module_is_looked_at() -> None:
    subclassing = set()
    for file in OURS.rglob("*.py"):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        stock = {
            alias.asname or alias.name
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sglang")
            for alias in node.names
        }
        classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
        if any(isinstance(base, ast.Name) and base.id in stock for node in classes for base in node.bases):
            parts = file.relative_to(OURS.parent).with_suffix("").parts
            subclassing.add(".".join(parts))
    assert subclassing <= set(check.SUBCLASS_MODULES), "list it in lt_sglang/upstream/check.py"
    for name in check.SUBCLASS_MODULES:
        assert list(check.subclasses(importlib.import_module(name))), f"{name} extends nothing of SGLang's"


def _stock(self: Any, one: Any, two: Any = None, *, three: Any, **more: Any) -> None: ...


def _same(self: Any, one: Any, two: Any = None, *, three: Any, **more: Any) -> None: ...


def _swallows(self: Any, *args: Any, **kwargs: Any) -> None: ...


def _begins_alike(self: Any, one: Any, *args: Any, **kwargs: Any) -> None: ...


def _renamed(self: Any, first: Any, two: Any = None, *, three: Any, **more: Any) -> None: ...


def _reordered(self: Any, two: Any, one: Any, *, three: Any, **more: Any) -> None: ...


def _lacks_keyword(self: Any, one: Any, two: Any = None) -> None: ...


def _requires_more(self: Any, one: Any, two: Any, three: Any, four: Any, **more: Any) -> None: ...


@pytest.mark.parametrize(
    ("function", "fits"),
    [
        (_same, True),
        (_swallows, True),
        (_begins_alike, True),
        (_renamed, False),
        (_reordered, False),
        (_lacks_keyword, False),
        (_requires_more, False),
    ],
)
def test_the_check_itself(function: Callable[..., None], fits: bool) -> None:
    problem = check._incompatible(Override("Ours.method", "sglang.Stock.method", function, _stock))
    assert (problem is None) == fits, problem


def test_an_unrecorded_override_says_what_to_add() -> None:
    (message,) = check.check_overrides([Override("Ours.m", "sglang.Stock.m", _same, _stock)])
    assert '"sglang.Stock.m": "self, one, two=, *, three, **more"' in message


@pytest.mark.parametrize("target", FINGERPRINTS)
def test_code_we_depend_on_line_by_line_is_unchanged(target: str) -> None:
    expected, why = FINGERPRINTS[target]
    assert check.fingerprint(pkgutil.resolve_name(target)) == expected, (
        f"{target} changed. Read it again: {why} Then record its fingerprint in upstream/recorded.py"
    )


def test_a_changed_fingerprint_asks_for_a_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    target = next(iter(FINGERPRINTS))
    monkeypatch.setitem(FINGERPRINTS, target, ("0" * 12, "look for the thing."))
    (message,) = check.check_fingerprints()
    assert target in message
    assert "Read it again: look for the thing." in message


# Who may free a streaming slot: the calls in SGLang, by file. A new one has to be read, and met in
# lt_sglang/cache/radix_static.py, before it is recorded here.
FREEING_CALLS = {
    "disaggregation/decode.py": {"release_swa": 1},
    "managers/schedule_batch.py": {"release_swa_prefix_lock": 1, "evict_sliding_windows": 1},
    "mem_cache/allocator/hisparse.py": {"free_swa": 1, "free_swa_segment": 1},
    "mem_cache/allocator/swa.py": {"free_swa": 2, "free_swa_segment": 1},
    "mem_cache/base_prefix_cache.py": {"free_swa_out_of_window_slots": 1},
    "mem_cache/rust_tree_core/adapter.py": {"dec_swa_lock_only": 1},
    "mem_cache/unified_cache/components/swa.py": {"free_swa_out_of_window_slots": 1, "free_swa_segment": 1},
    "mem_cache/unified_radix_cache.py": {
        "release_swa": 1,
        "dec_swa_lock_only": 1,
        "free_out_of_window_slots": 2,
    },
}
FREEING = sorted({name for calls in FREEING_CALLS.values() for name in calls})


def calls_of(file: Path) -> Counter[str]:
    """Calls of the functions in FREEING, by name."""
    counts: Counter[str] = Counter()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            name = getattr(node.func, "attr", None) or getattr(node.func, "id", None)
            if name in FREEING:
                counts[str(name)] += 1
    return counts


def test_nobody_else_frees_streaming_slots() -> None:
    pattern = re.compile(rf"\b({'|'.join(FREEING)})\(")
    found = {}
    for file in (THEIRS / "srt").rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        if pattern.search(text) and (counts := calls_of(file)):
            found[file.relative_to(THEIRS / "srt").as_posix()] = dict(counts)
    assert found == FREEING_CALLS, (
        "SGLang frees streaming slots in other places; read them, then record them here"
    )


@pytest.mark.parametrize(
    ("owner", "name"), [(owner, name) for owner, names in ATTRIBUTES.items() for name in names], ids=str
)
def test_attribute_exists(owner: str, name: str) -> None:
    assert has_attribute(pkgutil.resolve_name(owner), name)


def test_attributes_that_do_not_exist_are_found() -> None:
    for owner in ATTRIBUTES:
        assert not has_attribute(pkgutil.resolve_name(owner), "no_such_attribute")


def test_resolution_hooks_may_be_registered() -> None:
    from sglang.srt.arg_groups.resolution_hooks import _OVERRIDABLE_HOOKS

    source = (OURS / "plugin.py").read_text(encoding="utf-8")
    names = re.findall(r'register_resolution_hook\("(\w+)"\)', source)
    assert len(names) == 2
    assert set(names) <= _OVERRIDABLE_HOOKS


def test_the_pattern_we_declare_makes_the_layers_we_mean() -> None:
    from sglang.srt.configs.model_config import get_hybrid_layer_ids

    config = LightTransferConfig((1, 2, 5), recent_tokens=100)
    declared = SimpleNamespace(num_hidden_layers=6, **model_overrides(config, 6))
    for architecture in ("LlamaForCausalLM", "Qwen2ForCausalLM", "MistralForCausalLM", "Qwen3ForCausalLM"):
        streaming, full = get_hybrid_layer_ids([architecture], declared)
        assert (list(streaming), list(full)) == ([1, 2, 5], [0, 3, 4])


def test_our_names_are_free_in_stock_sglang() -> None:
    source = "".join(
        (THEIRS / "srt" / file).read_text(encoding="utf-8")
        for file in (
            "arg_groups/choices.py",
            "mem_cache/registry.py",
            "layers/attention/attention_registry.py",
        )
    )
    assert "lighttransfer" not in source


def sources() -> Iterator[str]:
    """All our code but what is recorded."""
    for file in OURS.rglob("*.py"):
        if file.parent.name != "upstream":
            yield file.read_text(encoding="utf-8")


def test_no_target_is_recorded_in_vain() -> None:
    """Every recorded function is still called or overridden by us."""
    text = "\n".join(sources())
    overridden = {override.target for override in check.all_overrides()}
    for target in SIGNATURES.keys() - overridden:
        owner, _, name = target.rpartition(".")
        used = owner.rpartition(".")[2] if name == "__init__" else name
        assert re.search(rf"\b{used}\b", text), f"{target} is recorded but not used"


@pytest.mark.parametrize("family", _IGNORE_WINDOW)
def test_models_whose_windows_are_ignored_read_none(family: str) -> None:
    """doctor passes them whatever config.json says of windows, as a start does."""
    source = (THEIRS / "srt" / "models" / f"{family}.py").read_text(encoding="utf-8")
    assert "sliding_window" not in source and "layer_types" not in source


@pytest.mark.parametrize("form", [PrefillPlanInfo, PrefillPlanSM90Info], ids=lambda form: form.__name__)
def test_flashinfers_plans_have_the_fields_we_name(form: Any) -> None:
    header = Path(flashinfer.__file__).parent / "data/include/flashinfer/attention/scheduler.cuh"
    _, _, struct = header.read_text(encoding="utf-8").partition(f"struct {form.__name__} {{")
    vector = re.search(r"ToVector\(\) const \{\s*return \{([^}]*)\}", struct)
    assert vector and tuple(re.findall(r"\w+", vector[1])) == form._fields


def test_sglang_merges_as_we_call_it() -> None:
    """SGLang defines the function only where it sees a GPU."""
    source = (THEIRS / "srt/layers/attention/flashinfer_backend.py").read_text(encoding="utf-8")
    (found,) = re.findall(r"def _safe_merge_state\(([^)]*)\)", source)
    assert re.findall(r"(\w+): torch.Tensor", found) == ["v_a", "s_a", "v_b", "s_b"]


def test_flashinfers_private_names_are_used_in_one_file() -> None:
    """What begins with an underscore in one of FlashInfer's wrappers."""
    private = {name for names in FLASHINFER.values() for name in names if name.startswith("_")}
    assert len(private) == 4
    for file in OURS.rglob("*.py"):
        if file.parent.name != "upstream" and file.name != "flashinfer_private.py":
            text = file.read_text(encoding="utf-8")
            assert not [name for name in private if re.search(rf"\b{name}\b", text)], file

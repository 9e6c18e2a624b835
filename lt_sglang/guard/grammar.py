"""Bounds of what may be asked as a grammar: json_schema, regex, ebnf, structural_tag.

SGLang compiles grammars in a few threads, which nothing can stop, and follows them on the scheduler's thread.
"""

from __future__ import annotations

import functools
import json
import re
from typing import Any

from lt_sglang.guard import ambiguity
from lt_sglang.guard.rules import Ambiguous, unescaped

# In characters of the request.
MOST_TEXT = 65_536
# Levels of JSON objects and lists, or of parentheses. JSON of more than 997 levels is not read at all.
MOST_DEPTH = 64
# Of the rules and parts that XGrammar makes of it.
MOST_RULES = 4096
FIELDS = ("json_schema", "regex", "ebnf", "structural_tag")
# json_schema: any JSON at all.
ANY_JSON = "$$ANY$$"


def check_grammars(params: dict[str, Any]) -> None:
    """Raise ValueError, naming the field, if a grammar of these parameters is none or costs too much."""
    for name in FIELDS:
        text = params.get(name)
        if not text or (name == "json_schema" and text == ANY_JSON):
            continue
        if len(text) > MOST_TEXT:
            raise ValueError(f"{name}: has {len(text)} characters; at most {MOST_TEXT} are allowed")
        refusal = _refusal(name, text)
        if refusal is not None:
            raise ValueError(f"{name}: {refusal}")


@functools.lru_cache(maxsize=256)
def _refusal(name: str, text: str) -> str | None:
    """What is wrong with a grammar; kept, because the same ones come again and again."""
    from sglang.srt.constrained.base_grammar_backend import _grammar_key_contains_nul

    kind = name.removesuffix("_schema")
    try:
        depth = max(_parentheses(text), _levels(json.loads(text)) if kind in _JSON else 0)
        if depth > MOST_DEPTH:
            return f"is nested {depth} levels deep; at most {MOST_DEPTH} are allowed"
        if _grammar_key_contains_nul(kind, text):
            return "NUL characters are not allowed"
        rules = str(_parsed(kind, text))
        if rules.count("::=") > MOST_RULES:
            return f"makes {rules.count('::=')} rules; at most {MOST_RULES} are allowed"
        ambiguity.check(rules)
        for pattern in _PATTERN.findall(rules):
            ambiguity.check(str(_parsed("regex", unescaped(pattern))), expanded=True)
    except RecursionError:
        return f"is nested too deep; at most {MOST_DEPTH} levels are allowed"
    except Ambiguous as error:
        return f"can take too long: {error}"
    except (RuntimeError, ValueError, TypeError, KeyError, AttributeError, AssertionError) as error:
        return f"is not one: {_readable(error)}"
    return None


_JSON = ("json", "structural_tag")
# The pattern of a string in a JSON schema, as XGrammar writes it.
_PATTERN = re.compile(r'^\w+ ::= Regex\("((?:[^"\\]|\\.)*)"', re.MULTILINE | re.DOTALL)


def _parsed(kind: str, text: str) -> Any:
    """XGrammar's reading of a grammar, as SGLang asks for it; quick, because no token is looked at."""
    from xgrammar import Grammar, StructuralTag, StructuralTagItem

    if kind == "json":
        return Grammar.from_json_schema(text)
    if kind == "regex":
        return Grammar.from_regex(text)
    if kind == "ebnf":
        return Grammar.from_ebnf(text)
    tag = json.loads(text)
    if tag.get("structures") is None:
        return Grammar.from_structural_tag(text)
    items = [
        StructuralTagItem(begin=one["begin"], schema=json.dumps(one.get("schema") or {}), end=one["end"])
        for one in tag["structures"]
    ]
    return Grammar.from_structural_tag(StructuralTag.from_legacy_structural_tag(items, tag["triggers"]))


def _levels(value: Any) -> int:
    """How deep the objects and lists of a JSON value are nested."""
    level, values = 0, [value]
    while values := [
        inner
        for one in values
        if isinstance(one, (dict, list))
        for inner in (one.values() if isinstance(one, dict) else one)
    ]:
        level += 1
    return level


def _parentheses(text: str) -> int:
    """How deep parentheses are nested, at most."""
    depth = most = 0
    for mark in re.findall(r"\\.|[()]", text, re.DOTALL):
        depth += {"(": 1, ")": -1}.get(mark, 0)
        most = max(most, depth)
    return most


def _readable(error: Exception) -> str:
    """XGrammar's sentence without the time and its source file."""
    return re.sub(r"^\[[\d:]+\] \S+: ", "", str(error)).strip()[:200] or type(error).__name__

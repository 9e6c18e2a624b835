"""Bounds of what may be asked as a grammar: json_schema, regex, ebnf, structural_tag.

SGLang compiles grammars in a few threads, which nothing can stop, and follows them on the scheduler's thread.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator
from typing import Any

from lt_sglang.guard import ambiguity
from lt_sglang.guard.rules import Ambiguous, unescaped

# In characters of the request.
MOST_TEXT = 65_536
# Levels of JSON objects and lists, or of parentheses. JSON of more than 997 levels is not read at all.
MOST_DEPTH = 64
# Of the rules and parts that XGrammar makes of it.
MOST_RULES = 4096
# XGrammar writes the repeats of a schema's patterns out, in a time that grows with the square of the length.
# So the squares of the patterns' lengths are added up, and may be that of one pattern of 1,400 characters.
MOST_WRITTEN = 1400**2
FIELDS = ("json_schema", "regex", "ebnf", "structural_tag")
# json_schema: any JSON at all.
ANY_JSON = "$$ANY$$"


def check_grammars(params: dict[str, Any]) -> None:
    """Raise ValueError, naming the field, if a grammar of these parameters is none or costs too much."""
    for name in FIELDS:
        text = params.get(name)
        if text and params.get("min_new_tokens"):
            # Where the grammar allows only the end and this forbids it, no token is left, and sampling ends
            # the scheduler.
            raise ValueError(
                f"min_new_tokens: is not allowed beside {name}; say the least length in the grammar"
            )
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
        value = json.loads(text) if kind in _JSON else None
        patterns = [text] if value is None else list(_patterns(value))
        depth = max([_levels(value), *map(_parentheses, patterns)])
        if depth > MOST_DEPTH:
            return f"is nested {depth} levels deep; at most {MOST_DEPTH} are allowed"
        if _grammar_key_contains_nul(kind, text):
            return "NUL characters are not allowed"
        written = 0 if value is None else sum(_written_out(pattern) ** 2 for pattern in patterns)
        if written > MOST_WRITTEN:
            return (
                "its patterns' repeats are too many: with them written out, the squares of the patterns' "
                f"lengths add up to {written}; at most {MOST_WRITTEN} (1,400 characters once) is allowed"
            )
        rules = str(_parsed(kind, text, value))
        if rules.count("::=") > MOST_RULES:
            return f"makes {rules.count('::=')} rules; at most {MOST_RULES} are allowed"
        ambiguity.check(rules)
        for pattern in _PATTERN.findall(rules):
            ambiguity.check(str(_parsed("regex", _as_read(unescaped(pattern)))), expanded=True)
    except RecursionError:
        return f"is nested too deep; at most {MOST_DEPTH} levels are allowed"
    except Ambiguous as error:
        return f"can take too long: {error}"
    except (RuntimeError, ValueError, TypeError, KeyError, AttributeError, AssertionError) as error:
        return f"is not one: {_readable(error)}"
    return None


_JSON = ("json", "structural_tag")
# The pattern of a string in a JSON schema, as XGrammar writes it.
_PATTERN = re.compile(r'^[\w.-]+ ::= Regex\("((?:[^"\\]|\\.)*)"', re.MULTILINE | re.DOTALL)


def _parsed(kind: str, text: str, value: Any = None) -> Any:
    """XGrammar's reading of a grammar, as SGLang asks for it; quick, because no token is looked at.

    value: the JSON in ``text`` of a structural tag; SGLang's defaults are written into it.
    """
    from sglang.srt.constrained.xgrammar_backend import XGrammarGrammarBackend
    from xgrammar import Grammar, StructuralTag, StructuralTagItem

    if kind == "json":
        return Grammar.from_json_schema(text)
    if kind == "regex":
        return Grammar.from_regex(text)
    if kind == "ebnf":
        return Grammar.from_ebnf(text)
    if value.get("structures") is None:
        XGrammarGrammarBackend._sanitize_structural_format(value.get("format"))
        return Grammar.from_structural_tag(json.dumps(value))
    items = [
        StructuralTagItem(begin=one["begin"], schema=json.dumps(one.get("schema") or {}), end=one["end"])
        for one in value["structures"]
    ]
    return Grammar.from_structural_tag(StructuralTag.from_legacy_structural_tag(items, value["triggers"]))


def _patterns(value: Any) -> Iterator[str]:
    """The patterns in a schema, wherever they stand."""
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, dict):
            waiting += one.values()
            yield from (text for name in ("pattern", "regex") if isinstance(text := one.get(name), str))
            if isinstance(keys := one.get("patternProperties"), dict):
                yield from keys
        elif isinstance(one, list):
            waiting += one


def _written_out(pattern: str) -> int:
    """How many characters a pattern has with its counted repeats written out."""
    lengths, last = [0], 0
    for found in _PIECE.finditer(pattern):
        if found["least"] is not None:
            times = max(int(found["least"]), int(found["most"] or 0), 1)
            lengths[-1] += last * (times - 1)
            last *= times
        elif found[0] == ")" and len(lengths) > 1:
            last = lengths.pop()
            lengths[-1] += last
        elif found[0][0] == "(":
            lengths.append(0)
        else:
            last = 1
            lengths[-1] += 1
    return sum(lengths)


# An escape, a set, the beginning of a group, a count (XGrammar allows spaces in it), any other character.
_PIECE = re.compile(
    r"""\\. | \[\^?\]?(?:\\.|[^\\\]])*\] | \((?:\?(?:[:=!]|<[=!]|P?<\w+>))?
    | \{\s*(?P<least>\d+)\s*(?:,\s*(?P<most>\d*)\s*)?\} | .""",
    re.DOTALL | re.VERBOSE,
)


def _as_read(pattern: str) -> str:
    """A schema's pattern as XGrammar reads it there: without lookaheads, names of groups and flags."""
    kept, skipped, depth = "", 0, 0
    for found in _PIECE.finditer(re.sub(r"\(\?[a-zA-Z]+\)", "", pattern)):
        piece = found[0]
        depth += (piece[0] == "(") - (piece == ")")
        if not skipped and piece in ("(?=", "(?!", "(?<=", "(?<!"):
            skipped = depth
        if not skipped:
            kept += "(?:" if piece.startswith(("(?P<", "(?<")) else piece
        elif piece == ")" and depth < skipped:
            skipped = 0
    return kept


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

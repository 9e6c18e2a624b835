"""lt_sglang.guard.grammar: what may be compiled, and followed on the scheduler's thread."""

from __future__ import annotations

import json
import multiprocessing
import time
from typing import Any

import pytest
import xgrammar

from lt_sglang.guard import ambiguity, grammar
from lt_sglang.guard.grammar import check_grammars


def schema(value: Any) -> dict[str, str]:
    return {"json_schema": json.dumps(value)}


def tag(form: Any) -> dict[str, str]:
    return {"structural_tag": json.dumps({"type": "structural_tag", "format": form})}


PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 100},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "mail": {"type": "string", "pattern": r"^[^@\s]+@[^@\s]+\.[^@\s]+$"},
        "phone": {"type": "string", "pattern": r"^\+?[0-9 ()-]{7,15}$"},
        "born": {"type": "string", "format": "date-time"},
        "tags": {"type": "array", "items": {"anyOf": [{"type": "string"}, {"type": "number"}]}},
        "kind": {"enum": ["a", "b", 1, None]},
        "friends": {"type": "array", "items": {"$ref": "#"}, "maxItems": 5},
    },
    "required": ["name", "age"],
    "additionalProperties": {"type": ["string", "null"]},
}
JSON_GRAMMAR = r"""root ::= object
object ::= "{" ws (pair ("," ws pair)*)? "}" ws
pair ::= string ":" ws value
value ::= object | array | string | number | "true" | "false" | "null"
array ::= "[" ws (value ("," ws value)*)? "]" ws
string ::= "\"" ([^"\\] | "\\" [^\n])* "\"" ws
number ::= "-"? [0-9]+ ("." [0-9]+)? ws
ws ::= [ \t\n]*"""
# A tool without parameters, as clients write it.
NO_PARAMETERS = {
    "type": "tag",
    "begin": "<a>",
    "end": "</a>",
    "content": {"type": "json_schema", "json_schema": None},
}
FINE: list[dict[str, Any]] = [
    {},
    {"regex": None},
    {"json_schema": "$$ANY$$"},
    {"json_schema": "{}"},
    {"json_schema": "true"},
    {"json_schema": '{"type": "object"}'},
    schema(PERSON),
    schema(
        {"type": "array", "items": {"anyOf": [{"type": "string"}, {"type": "string", "pattern": "^a*$"}]}}
    ),
    schema({"type": "object", "properties": {f"k{i}": {"type": "string"} for i in range(300)}}),
    schema(
        {"type": "object", "properties": {f"k{i}": {"type": "string", "maxLength": 99} for i in range(50)}}
    ),
    {"ebnf": JSON_GRAMMAR},
    {"ebnf": 'root ::= root "+" root | [0-9]+ | "(" root ")"'},
    {"ebnf": "root ::= root [a-z] | [a-z]"},
    tag({"type": "sequence", "elements": [{"type": "const_string", "value": "a"}, {"type": "any_text"}]}),
    {
        "structural_tag": json.dumps(
            {"structures": [{"begin": "<f>", "schema": PERSON, "end": "</f>"}], "triggers": ["<f"]}
        )
    },
    *(
        {"regex": pattern}
        for pattern in (
            "(yes|no)",
            r"\d{4}-\d{2}-\d{2}",
            r"(\+?\d{1,2})? ?\d{3}-\d{4}",
            r"-?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?",
            r"https?://[\w.-]+(/[\w./-]*)?",
            r"[A-Z][a-z]+( [A-Z][a-z]+)*",
            r"(\d{1,3}\.){3}\d{1,3}",
            "#[0-9a-f]{6}",
            r"[a-z0-9._%+-]+@[a-z0-9.-]+\.[a-z]{2,}",
            r"(\w+ )*\w+",
            r"([^,\n]*,){3}",
            r"(.*\n)*",
            ".{1,200}",
            "^abc$",
        )
    ),
    {"ebnf": "root ::= jp-char+ a.b\njp-char ::= [a-z]\na.b ::= [0-9]"},
    *(
        schema({"$defs": {name: {"type": "object", "properties": {"a": {}}}}, "$ref": f"#/$defs/{name}"})
        for name in ("Item-Input", "app.models.User")
    ),
    *(
        schema({"type": "string", "pattern": pattern})
        for pattern in (
            r"^(?!^[-+.]*$)[+-]?0*\d*\.?\d*$",
            r"^(?=.*[A-Z])[A-Za-z]{8,16}$",
            r"^(?P<year>\d{4})-\d{2}$",
            r"^[a-z]{1,63}(\.[a-z]{1,63}){0,4}$",
        )
    ),
    schema({"type": "object", "properties": {f"p{i}": {"description": "sad :("} for i in range(80)}}),
    {"structural_tag": json.dumps({"type": "structural_tag", "format": NO_PARAMETERS})},
]
MANY = [f"[^{chr(97 + i)}]" for i in range(20)]
REFUSED: list[tuple[str, str, dict[str, Any]]] = [
    ("ebnf", "can take too long: a part of it matches no text", {"ebnf": "root ::= root"}),
    ("ebnf", "can take too long: a part of it matches no text", {"ebnf": 'root ::= "a" b\nb ::= b'}),
    ("json_schema", "its patterns' repeats", schema({"type": "string", "pattern": r"^[\s\S]{10,60000}$"})),
    ("json_schema", "its patterns' repeats", schema({"type": "string", "pattern": r"[\s\S]{ 10 , 4000 }"})),
    ("json_schema", "its patterns' repeats", schema({"type": "string", "pattern": "a{1,20000000}"})),
    (
        "json_schema",
        "its patterns' repeats",
        schema({"items": {"type": "string", "pattern": "((a{99}){99}){9}"}}),
    ),
    *(
        ("regex", "can take too long: one round", {"regex": pattern})
        for pattern in (
            "((.*)*)*",
            "(.*)*b",
            "((-+)+)+x",
            r"((\s*)*)*x",
            r"(\w+\s?)+",
            "(.?.?.?.?)*",
            "(.{1,10}){1,10}",
            "(.{0,5}){5}",
            "(.+){100}",
            "(.{3}|.{5})*",
            "x{1000}((.*)*)*",
            "(a+)+b",
        )
    ),
    ("regex", "can take too long: it divides", {"regex": ".{1,99}.{1,99}.{1,99}"}),
    ("regex", "can take too long: it divides", {"regex": ".?" * 30}),
    ("regex", "can take too long: it divides", {"regex": "a?" * 1000}),
    ("ebnf", "can take too long: one round", {"ebnf": "root ::= root root | [a-z]"}),
    ("ebnf", "can take too long: one round", {"ebnf": 'root ::= "" | root root | [^x]'}),
    (
        "ebnf",
        "can take too long: one round",
        {"ebnf": 'root ::= w b\nb ::= s root | ""\nw ::= [a-z]+\ns ::= " "?'},
    ),
    ("ebnf", "can take too long: one round", {"ebnf": "root ::= (a)*\na ::= (b)*\nb ::= [^x]*"}),
    ("structural_tag", "can take too long: one round", tag({"type": "regex", "pattern": "((.*)*)*"})),
    ("json_schema", "can take too long: one round", schema({"type": "string", "pattern": "^(.{1,10})+$"})),
    (
        "json_schema",
        "can take too long: the repeats",
        schema({"type": "string", "pattern": "^(.{1,50}a){20}$"}),
    ),
    (
        "json_schema",
        "can take too long: one round",
        schema({"type": "object", "patternProperties": {"^((.*)*)*$": {"type": "string"}}}),
    ),
    (
        "json_schema",
        "can take too long: its counted repeats .* add up to 2560; at most 2048",
        schema(
            {
                "type": "object",
                "properties": {f"k{i}": {"type": "string", "maxLength": 200 + i} for i in range(20)},
            }
        ),
    ),
    ("regex", "can take too long: its counted repeats", {"regex": "|".join(f"{one}{{200}}" for one in MANY)}),
    ("regex", "has 65537 characters; at most 65536", {"regex": "a" * 65_537}),
    ("regex", "is nested 65 levels deep; at most 64", {"regex": "(" * 65 + "a" + ")" * 65}),
    ("ebnf", "is nested 500 levels deep; at most 64", {"ebnf": "root ::= " + "(" * 500 + '"a"' + ")" * 500}),
    ("ebnf", "makes 4201 rules; at most 4096", {"ebnf": "root ::= " + '"b"? ' * 4200}),
    (
        "json_schema",
        "is nested 140 levels deep; at most 64",
        {"json_schema": '{"properties":{"a":' * 70 + "{}" + "}}" * 70},
    ),
    (
        "json_schema",
        "is nested too deep; at most 64",
        {"json_schema": '{"items":' * 5000 + "{}" + "}" * 5000},
    ),
    ("json_schema", "is not one: ", {"json_schema": "nonsense"}),
    ("regex", "is not one: ", {"regex": "("}),
    ("regex", "is not one: .*Lookahead", {"regex": "(?=a)b"}),
    ("ebnf", "is not one: ", {"ebnf": "root := a"}),
    ("structural_tag", "is not one: ", {"structural_tag": "[]"}),
    ("structural_tag", "is not one: ", {"structural_tag": "{}"}),
    ("regex", "NUL", {"regex": "a\0b"}),
    ("json_schema", "NUL", schema({"type": "string", "pattern": "a\0"})),
]


@pytest.mark.parametrize("params", FINE, ids=lambda params: str(params)[:40])
def test_ordinary_grammars_pass(params: dict[str, Any]) -> None:
    check_grammars(params)


@pytest.mark.parametrize(("name", "sentence", "params"), REFUSED, ids=lambda given: str(given)[:40])
def test_what_may_take_for_ever_is_refused_by_name(name: str, sentence: str, params: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{name}: {sentence}") as caught:
        check_grammars(params)
    assert "/project/" not in str(caught.value) and "\n" not in str(caught.value)


def test_a_grammar_and_tokens_it_must_not_end_before_are_refused_together() -> None:
    check_grammars({"regex": "a", "min_new_tokens": 0})
    check_grammars({"min_new_tokens": 4})
    with pytest.raises(ValueError, match=r"^min_new_tokens: is not allowed beside regex"):
        check_grammars({"regex": "a", "min_new_tokens": 4})


def test_the_guard_asks_of_every_request() -> None:
    from lt_sglang.guard.requests import check_sampling_params

    check_sampling_params({"regex": "a+"})
    with pytest.raises(ValueError, match=r"^regex: can take too long"):
        check_sampling_params({"regex": "((.*)*)*"})


@pytest.mark.parametrize(
    "params",
    [
        {"regex": "a" * 60_000},
        {"regex": "|".join(f"w{i}" for i in range(9000))},
        {
            "ebnf": "\n".join(f'r{i} ::= "x"? r{i - 1} [a-z]*' for i in range(1, 2000))
            + '\nr0 ::= "a"\nroot ::= r1999'
        },
        schema({"enum": ["x" * 29_000 + "a", "x" * 29_000 + "b"]}),
        schema({"type": "string", "pattern": r"[\s\S]{10,1400}"}),
        schema({"type": "object", "properties": {f"key{i}": {"type": "string"} for i in range(1000)}}),
    ],
    ids=lambda params: str(params)[:30],
)
def test_the_check_itself_is_quick(params: dict[str, Any]) -> None:
    """It runs where all requests are taken; 2 s on a busy core when this was written."""
    check_grammars({"regex": "warm"})
    begun = time.process_time()
    try:
        check_grammars(params)
    except ValueError as error:
        assert "too long" in str(error) or "rules" in str(error)
    assert time.process_time() - begun < 10


def test_a_grammar_is_judged_once(monkeypatch: pytest.MonkeyPatch) -> None:
    judged: list[str] = []
    monkeypatch.setattr(ambiguity, "check", lambda rules, expanded=False: judged.append(rules))
    grammar._refusal.cache_clear()
    for _ in range(3):
        check_grammars({"regex": "abc"})
    assert len(judged) == 1
    grammar._refusal.cache_clear()


PIECES = [*(chr(code) for code in range(32, 127)), "\n", "\t"]
# Rows of one character, which grammars with many readings stumble over, and an end.
VOCABULARY = [
    *(piece * length for piece in PIECES for length in (1, 2, 4, 8, 16, 32)),
    *("the ", "12", "Ab c", "a,b", "</s>"),
]


def follow(params: dict[str, str], steps: int) -> None:
    """Compile a grammar and take the longest token allowed, step by step, as a scheduler does."""
    end = len(VOCABULARY) - 1
    info = xgrammar.TokenizerInfo(VOCABULARY, xgrammar.VocabType.RAW, stop_token_ids=[end])
    compiler = xgrammar.GrammarCompiler(info, max_threads=1)
    ((name, text),) = params.items()
    compiled = {
        "json_schema": compiler.compile_json_schema,
        "regex": compiler.compile_regex,
        "ebnf": compiler.compile_grammar,
    }[name](text)
    matcher = xgrammar.GrammarMatcher(compiled)
    mask = xgrammar.allocate_token_bitmask(1, len(VOCABULARY))
    for _ in range(steps):
        matcher.fill_next_token_bitmask(mask)
        words = [int(word) for word in mask[0]]
        allowed = [token for token in range(end) if words[token // 32] >> (token % 32) & 1]
        if not allowed:
            return
        assert matcher.accept_token(max(allowed, key=lambda token: (len(VOCABULARY[token]), -token)))


def done(params: dict[str, str], steps: int, seconds: float) -> bool:
    """Whether ``follow`` ends in time; in a process that can be killed."""
    process = multiprocessing.get_context("fork").Process(target=follow, args=(params, steps))
    process.start()
    process.join(seconds)
    if process.is_alive():
        process.kill()
        process.join()
        return False
    assert process.exitcode == 0
    return True


FOLLOWED = [
    params for params in FINE if {"regex", "ebnf", "json_schema"} & set(params) and "$$" not in str(params)
]


@pytest.mark.parametrize("params", FOLLOWED[1:], ids=lambda params: str(params)[:40])
def test_what_passes_is_quick(params: dict[str, Any]) -> None:
    """100 steps in XGrammar itself; each case takes less than 2 s."""
    assert done(params, 100, 30)


@pytest.mark.parametrize(
    "params",
    [{"regex": "((.*)*)*"}, {"regex": "((-+)+)+x"}, {"ebnf": "root ::= root root root | root root | [^x]"}],
    ids=str,
)
def test_what_is_refused_hangs_xgrammar(params: dict[str, Any]) -> None:
    """One that no longer does need not be refused any more."""
    with pytest.raises(ValueError, match="too long"):
        check_grammars(params)
    assert not done(params, 100, 4)

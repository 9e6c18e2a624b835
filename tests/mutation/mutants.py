"""Every small fault that can be made in a module: mutmut's operators, and two of our own.

mutmut itself leaves decorated functions alone, and with them every property; here they count. Not mutated:
texts (of errors, logs and docstrings, and what stands in them), annotations, and what runs at import
(decorators, default values, class bodies).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import sha1
from pathlib import Path
from random import Random

import libcst as cst
from libcst.metadata import MetadataWrapper, ParentNodeProvider, PositionProvider
from mutmut.mutation.mutators import mutation_operators, operator_string


@dataclass(frozen=True)
class Mutant:
    """One fault. path: of the module, from the root. before, after: the statement. source: all of it."""

    path: str
    line: int
    function: str
    operator: str
    before: str
    after: str
    source: str

    @property
    def name(self) -> str:
        """What results and the list of equivalent mutants call it; the same as long as the statement is."""
        text = f"{self.path} {self.function} {self.before} {self.after}"
        return sha1(text.encode()).hexdigest()[:10]


def delete_statement(node: cst.SimpleStatementLine) -> Iterable[cst.CSTNode]:
    """Leave out a call whose result nobody takes."""
    if len(node.body) == 1 and isinstance(node.body[0], cst.Expr):
        value = node.body[0].value
        if isinstance(value, cst.Call) and not _speaks(value):
            yield node.with_changes(body=[cst.Pass()])


def negate_condition(node: cst.If) -> Iterable[cst.CSTNode]:
    """Take the other branch."""
    test = node.test.with_changes(lpar=[cst.LeftParen()], rpar=[cst.RightParen()])
    yield node.with_changes(
        test=cst.UnaryOperation(cst.Not(), test), whitespace_before_test=cst.SimpleWhitespace(" ")
    )


OPERATORS = [
    *((kind, operator) for kind, operator in mutation_operators if operator is not operator_string),
    (cst.SimpleStatementLine, delete_statement),
    (cst.If, negate_condition),
]


class Module:
    """One module, and the changes that could be made to it; nothing is written out before it is asked for."""

    def __init__(self, root: Path, path: str) -> None:
        self.path = path
        self.source = (root / path).read_text(encoding="utf-8")
        self._wrapper = MetadataWrapper(cst.parse_module(self.source))
        self.changes = [
            (node, changed, function, operator.__name__)
            for node, function in _nodes(self._wrapper.module, "")
            for kind, operator in OPERATORS
            if isinstance(node, kind)
            for changed in operator(node)
        ]

    def mutant(self, number: int) -> Mutant | None:
        """The change of that number; None if it makes no difference, or no Python."""
        node, changed, function, operator = self.changes[number]
        module = self._wrapper.module
        mutated = module.deep_replace(node, changed).code
        if mutated == self.source or not _compiles(mutated, self.path):
            return None
        place = self._wrapper.resolve(PositionProvider)[node]
        shown = _shown(node, self._wrapper.resolve(ParentNodeProvider))
        before = module.code_for_node(shown).strip()
        after = module.code_for_node(shown.deep_replace(node, changed)).strip()
        return Mutant(self.path, place.start.line, function, operator, before, after, mutated)


def sample(root: Path, paths: list[str], count: int, seed: int) -> tuple[list[Mutant], int]:
    """``count`` mutants drawn with ``seed`` from all of all modules, each once; and how many there are."""
    modules = [Module(root, path) for path in paths]
    every = [(module, number) for module in modules for number in range(len(module.changes))]
    Random(seed).shuffle(every)
    drawn: dict[str, Mutant] = {}
    for module, number in every:
        if len(drawn) == count:
            break
        mutant = module.mutant(number)
        if mutant is not None:
            drawn.setdefault(mutant.name, mutant)
    return list(drawn.values()), len(every)


def _nodes(node: cst.CSTNode, function: str) -> Iterator[tuple[cst.CSTNode, str]]:
    """What may be mutated below ``node``, with the name of the function it is in."""
    if isinstance(node, cst.Annotation | cst.Decorator | cst.FormattedString | cst.Raise):
        return
    if isinstance(node, cst.Call) and _speaks(node):
        return
    if isinstance(node, cst.FunctionDef) and not function:
        yield from _nodes(node.body, node.name.value)
        return
    if function:
        yield node, function
    for child in node.children:
        yield from _nodes(child, function)


def _speaks(call: cst.Call) -> bool:
    """Whether a call only writes a log line, or helps the type checker."""
    function = call.func
    if isinstance(function, cst.Attribute) and isinstance(function.value, cst.Name):
        return function.value.value == "logger"
    return isinstance(function, cst.Name) and function.value == "cast"


def _shown(node: cst.CSTNode, parents: object) -> cst.CSTNode:
    """The statement of a node, or the node itself if that is a block."""
    at = node
    while not isinstance(at, cst.SimpleStatementLine | cst.BaseCompoundStatement | cst.Module):
        at = parents[at]  # type: ignore[index]
    return at if isinstance(at, cst.SimpleStatementLine) else node


def _compiles(source: str, path: str) -> bool:
    try:
        compile(source, path, "exec")
    except (SyntaxError, ValueError):
        return False
    return True

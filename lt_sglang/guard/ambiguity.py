"""Whether a grammar can be read in too many ways, judged by its rules alone.

XGrammar tries every token that may follow on the scheduler's thread, and keeps an entry for each way to
read the answer so far. ``((-+)+)+`` reads a row of dashes in 2 ** n ways, and one step takes for ever.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

from lt_sglang.guard.rules import OTHER, Ambiguous, Part, Rule, parse

# Most bits of ways to divide a text among neighbours with ends of their own: .{1,8}.{1,8} has six.
MOST_BITS = 6.0
# Most neighbours of that kind, whatever they match.
MOST_NEIGHBOURS = 64
# Counts are added up, once for each kind of character and repeat; XGrammar compiles none beyond LONG_COUNT.
MOST_COUNTED = 2048
LONG_COUNT = 128
MOST_EXPANDED = 512
# Most sets of characters for which every rule is looked at.
MOST_SETS = 64


def check(text: str, expanded: bool = False) -> None:
    """Raise Ambiguous for a grammar, as XGrammar writes it, that may take too long.

    expanded: whether it is the pattern of a JSON string, whose counted repeats XGrammar writes out.
    """
    grammar = Grammar(parse(text))
    grammar.check_ends()
    grammar.check_counts()
    if expanded:
        grammar.check_expansion()
    for name, rule in grammar.rules.items():
        for parts in rule.alternatives:
            grammar.check_loops(name, parts)
            grammar.check_neighbours(parts)


class Grammar:
    """Rules, and the questions ``check`` asks of them."""

    def __init__(self, rules: dict[str, Rule]) -> None:
        self.rules = rules
        self._users: dict[str, set[str]] = {name: set() for name in rules}
        for name, rule in rules.items():
            for parts in rule.alternatives:
                for part in parts:
                    if part.rule:
                        self._users[part.rule].add(name)
        groups = self._groups()
        self._group = {name: number for number, names in enumerate(groups) for name in names}
        self._order = [name for names in groups for name in names]
        self._ways_of: dict[str, float] = {}
        self._matched: dict[int, dict[str, bool]] = {}
        for names in groups:
            self._spread(names, self._learn)

    def nullable(self, part: Part) -> bool:
        """Whether ``part`` may match nothing."""
        return part.star or bool(part.rule and (part.least == 0 or self.rules[part.rule].nullable))

    def first(self, part: Part) -> int:
        """The characters that ``part`` may begin with."""
        return self.rules[part.rule].first if part.rule else part.chars

    def alphabet(self, part: Part) -> int:
        """All characters of ``part``."""
        return self.rules[part.rule].alphabet if part.rule else part.chars

    def reach(self, part: Part) -> int:
        """The characters that may follow a match of ``part`` within a longer one."""
        if not part.rule:
            return part.chars if part.star else 0
        rule = self.rules[part.rule]
        return rule.reach | (rule.first if part.varies else 0)

    def first_of(self, parts: Sequence[Part]) -> int:
        """The characters that a sequence may begin with."""
        found = 0
        for part in parts:
            found |= self.first(part)
            if not self.nullable(part):
                break
        return found

    def _overlaps(self, parts: Sequence[Part]) -> list[int]:
        """After each part: the characters that may belong to it, or to those before it, or to the next."""
        following = [first for first, _ in self._rests(parts)[1:]]
        before = 0
        for index, part in enumerate(parts):
            before = self._reach_on(before, part)
            following[index] &= before
        return following

    def _reach_on(self, before: int, part: Part) -> int:
        """The reach of a sequence that goes on with ``part``, ``before`` being its reach so far."""
        return self.reach(part) | (before | self.first(part) if self.nullable(part) else 0)

    def check_ends(self) -> None:
        """Raise Ambiguous where a text may come to a place at which no character is allowed.

        SGLang samples from nothing there, and the scheduler ends.
        """
        for rule in self.rules.values():
            for part in (part for parts in rule.alternatives for part in parts):
                if not self.nullable(part) and not self.first(part):
                    raise Ambiguous(
                        "a part of it matches no text at all, such as a rule that only names itself"
                    )

    def check_counts(self) -> None:
        """Raise Ambiguous where counted repeats of many characters would take minutes to compile."""
        counted = {
            (self.alphabet(part), part.least, part.most)
            for rule in self.rules.values()
            for parts in rule.alternatives
            for part in parts
            if max(part.least, part.most) > 1 and self.alphabet(part) >> OTHER
        }
        total = sum(min(max(least, most), LONG_COUNT) for _, least, most in counted)
        if total > MOST_COUNTED:
            raise Ambiguous(
                f"its counted repeats (maxLength, {{m,n}}) add up to {total}; at most {MOST_COUNTED} are "
                f"allowed, each different one counted once and as at most {LONG_COUNT}"
            )

    def check_expansion(self) -> None:
        """Raise Ambiguous where counted repeats within each other make a pattern too long."""
        total = self._length("root", frozenset())
        if total > MOST_EXPANDED:
            raise Ambiguous(
                f"the repeats of a pattern multiply to {total} characters; {MOST_EXPANDED} are allowed"
            )

    def _length(self, name: str, within: frozenset[str]) -> int:
        if name in within:
            return 0
        within = within | {name}
        return max(
            sum(
                min(max(part.least, part.most, 1), LONG_COUNT) * self._length(part.rule, within)
                if part.rule
                else part.chars >> OTHER
                for part in parts
            )
            for parts in self.rules[name].alternatives
        )

    def check_loops(self, name: str, parts: Sequence[Part]) -> None:
        """Raise Ambiguous where one round of a loop may end, and the next begin, anywhere."""
        for part in parts:
            if not part.rule or part.most in (0, 1):
                continue
            rule = self.rules[part.rule]
            overlap = rule.reach & rule.first
            if rule.nullable or (overlap and self._made_of([Part(rule=part.rule)], overlap)):
                raise Ambiguous(_LOOP)
        own = [
            index
            for index, part in enumerate(parts)
            if part.rule and self._group[part.rule] == self._group[name]
        ]
        if not own or not self._recursive(name):
            return
        rest = [*parts[: own[-1]], *parts[own[-1] + 1 :]]
        if rest and all(self.nullable(part) for part in rest):
            raise Ambiguous(_LOOP)
        overlaps = self._overlaps(parts)
        for index in own:
            # What stands before a round, and may take a part of it.
            if index and overlaps[index - 1] and self._made_of(rest, overlaps[index - 1]):
                raise Ambiguous(_LOOP)

    def check_neighbours(self, parts: Sequence[Part]) -> None:
        """Raise Ambiguous where a text may be divided among neighbours in many ways."""
        bits, count = 0.0, 0
        overlaps = self._overlaps(parts)
        for index, part in enumerate(parts[:-1]):
            overlap = overlaps[index]
            if not overlap:
                bits, count = 0.0, 0
            if not part.rule or not overlap:
                continue
            count += 1
            wide = overlap >> OTHER
            bits += self._ways(part) if wide else 0.0
            last = self._ways(parts[index + 1]) if wide else 0.0
            if bits + last > MOST_BITS or count > MOST_NEIGHBOURS:
                raise Ambiguous(
                    "it divides one text among several repeats or options in too many ways; write one repeat "
                    "for neighbours that match the same characters"
                )

    def _ways(self, part: Part) -> float:
        """Binary logarithm of the lengths that counted repeats and options allow ``part``."""
        if not part.rule:
            return 0.0
        rule = self.rules[part.rule]
        if part.rule not in self._ways_of:
            self._ways_of[part.rule] = 0.0  # what it takes of itself counts once
            ways = (sum(self._ways(one) for one in parts) for parts in rule.alternatives)
            self._ways_of[part.rule] = max(ways, default=0.0) + float(rule.nullable)
        most = LONG_COUNT if part.most < 0 else min(part.most, LONG_COUNT)
        return self._ways_of[part.rule] + math.log2(max(1, most - min(part.least, most) + 1))

    def _recursive(self, name: str) -> bool:
        return any(
            part.rule and self._group[part.rule] == self._group[name]
            for parts in self.rules[name].alternatives
            for part in parts
        )

    def _made_of(self, parts: Sequence[Part], chars: int) -> bool:
        """Whether ``parts`` match a text of ``chars`` alone, or nothing."""
        known = self._matched.get(chars)
        if known is None:
            if len(self._matched) == MOST_SETS:
                raise Ambiguous("it has too many repeats of different characters that follow each other")
            known = self._matched[chars] = dict.fromkeys(self.rules, False)

            def learn(name: str) -> bool:
                if known[name] or not any(all(map(matches, one)) for one in self.rules[name].alternatives):
                    return False
                known[name] = True
                return True

        def matches(part: Part) -> bool:
            if part.star or (part.rule and part.least == 0):
                return True
            return known[part.rule] if part.rule else bool(part.chars & chars)

        if not any(known.values()):
            self._spread(self._order, learn)
        return all(map(matches, parts))

    def _spread(self, names: Iterable[str], learn: Callable[[str], bool]) -> None:
        """Call ``learn`` for each rule, and again for those that use one of which something was learnt."""
        those = dict.fromkeys(names)
        waiting = dict(those)
        while waiting:
            name = next(iter(waiting))
            del waiting[name]
            if learn(name):
                waiting |= {user: None for user in self._users[name] if user in those}

    def _learn(self, name: str) -> bool:
        """Take what is known of the parts of a rule into account; whether that is news."""
        rule = self.rules[name]
        before = (rule.nullable, rule.first, rule.reach, rule.alphabet)
        for parts in rule.alternatives:
            rule.nullable |= all(self.nullable(part) for part in parts)
            rule.first |= self.first_of(parts)
            reach = 0
            for part in parts:
                rule.alphabet |= self.alphabet(part)
                reach = self._reach_on(reach, part)
            rule.reach |= reach
        if len(rule.alternatives) > 1:
            rule.reach |= self._longer(rule.alternatives)
        return before != (rule.nullable, rule.first, rule.reach, rule.alphabet)

    def _longer(self, alternatives: Sequence[tuple[Part, ...]]) -> int:
        """The characters with which a match of one alternative may become one of another."""
        found = 0
        waiting = [([(parts, self._rests(parts)) for parts in alternatives], 0)]
        while waiting:
            those, index = waiting.pop()
            if len(those) < 2:
                continue
            heads: dict[Part, list[tuple[tuple[Part, ...], list[tuple[int, bool]]]]] = {}
            ended = False
            for parts, rests in those:
                if index < len(parts):
                    heads.setdefault(parts[index], []).append((parts, rests))
                ended |= rests[index][1]
            seen = clash = 0
            for same in heads.values():
                begins = 0
                for _, rests in same:
                    begins |= rests[index][0]
                clash |= seen & begins
                seen |= begins
            if ended:
                found |= seen
            for head, same in heads.items():
                waiting.append((same, index + 1))
                if not any(clash & rests[index][0] for _, rests in same):
                    continue
                if head.rule:
                    found |= self.alphabet(head)
                for parts, _ in same:
                    for part in parts[index + 1 :]:
                        found |= self.alphabet(part)
        return found

    def _rests(self, parts: Sequence[Part]) -> list[tuple[int, bool]]:
        """For each part and the end: the characters that may begin the rest, and whether it may be empty."""
        found = [(0, True)]
        for part in reversed(parts):
            first, nullable = found[-1]
            empty = self.nullable(part)
            found.append((self.first(part) | (first if empty else 0), nullable and empty))
        return found[::-1]

    def _groups(self) -> list[set[str]]:
        """Rules that contain each other, a set each; those that others contain come first."""
        import networkx  # type: ignore[import-untyped]

        graph = networkx.DiGraph()
        graph.add_nodes_from(self.rules)
        graph.add_edges_from((user, name) for name, users in self._users.items() for user in users)
        return list(networkx.strongly_connected_components(graph))


_LOOP = (
    "one round of a repeat can end, and the next begin, at any character, as in (a+)+ or (a*b?)*; give the "
    "rounds a separator, as in a+(,a+)*, or write one repeat, as in [ab]*"
)

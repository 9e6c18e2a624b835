"""A tokenizer for tests: every word, run of spaces and sign is a token. Exactly reversible."""

from __future__ import annotations

import re


class Words:
    """Implements lt_sglang.eval.items.Tokenizer; begins every text with one token of its own."""

    def __init__(self) -> None:
        self._ids: dict[str, int] = {"<s>": 0}
        self._words = ["<s>"]
        self.prefix = [0]

    def encode(self, text: str) -> list[int]:
        """Token ids; new words get new ones."""
        ids = []
        for word in re.findall(r"\s+|\d|\w+|[^\w\s]", text):
            if word not in self._ids:
                self._ids[word] = len(self._words)
                self._words.append(word)
            ids.append(self._ids[word])
        return ids

    def decode(self, ids: list[int]) -> str:
        """The text."""
        return "".join(self._words[token] for token in ids if token)

    def chat(self, text: str) -> list[int]:
        """A turn between marks."""
        return [0, *self.encode(f"[USER] {text} [ANSWER]")]

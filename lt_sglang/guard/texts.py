"""Whether a text can fit the context at all, known before all of it is tokenized.

SGLang tokenizes a prompt of any length on its event loop, a second for a million characters, and compares it
with the context length then.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

# A text of so many characters a token of the context is tokenized at once, as SGLang would.
CHARACTERS_A_TOKEN = 8
PIECE = 1 << 16
# Tokens that a piece may have more than its share of the whole: its first and last ones, and special ones.
SLACK = 64


@dataclass(frozen=True)
class Reader:
    """A tokenizer, None where prompts are token ids only, and the most tokens that a prompt may have.

    truncates: whether the server cuts what is too long.
    """

    tokenizer: Any
    most: int
    truncates: bool = False

    def check(self, name: str, text: str) -> None:
        """Raise ValueError if ``text`` has more tokens than fit; ``name`` is for the message."""
        if self.tokenizer is None or self.truncates or len(text) <= CHARACTERS_A_TOKEN * self.most:
            return
        tokens = 0
        for start in range(0, len(text), PIECE):
            tokens += max(0, len(self.tokenizer.encode(text[start : start + PIECE])) - SLACK)
            if tokens > self.most:
                raise ValueError(
                    f"{name}: {len(text)} characters are more than {self.most} tokens, the context length"
                )

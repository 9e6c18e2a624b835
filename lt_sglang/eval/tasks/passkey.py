"""Pass keys stated somewhere in a long text, and asked for at its end.

``passkey``: one key (arXiv 2305.16300). ``keys``: several, each of a place with a name, one of which is asked
for. Keys are always stated where no window of a lazy layer reaches when they are asked for.
"""

from __future__ import annotations

from dataclasses import dataclass

from lt_sglang.errors import LightTransferError
from lt_sglang.eval.items import Item, Tokenizer, rng_of
from lt_sglang.eval.tasks.haystack import sentences

DIGITS = 5
NEW_TOKENS = 8
# Beyond the window: the question, the statement and some room.
MARGIN_TOKENS = 100
PLACES = (
    *("garden", "library", "station", "castle", "bakery"),
    *("hospital", "museum", "theatre", "market", "school"),
)


@dataclass(frozen=True)
class PasskeyTask:
    """``keys`` keys stated in prompts of ``tokens`` tokens.

    trials: prompts; the asked key's depth runs evenly from 0 (the beginning) to 1 (``window`` tokens and a
        margin before the end).
    window: recent tokens of a lazy layer.
    """

    tokens: int
    trials: int
    keys: int = 1
    window: int = 1020
    seed: int = 0

    @property
    def name(self) -> str:
        """The task's name in a report, such as passkey or 3-key."""
        return "passkey" if self.keys == 1 else f"{self.keys}-key"

    def items(self, tokenizer: Tokenizer) -> list[Item]:
        """The prompts; raises LightTransferError if they are too short to hold a key outside the window."""
        if not 1 <= self.keys <= len(PLACES):
            raise LightTransferError(f"keys: {self.keys} is not a number from 1 to {len(PLACES)}")
        return [self._item(tokenizer, number) for number in range(self.trials)]

    def _item(self, tokenizer: Tokenizer, number: int) -> Item:
        rng = rng_of(self.seed, self.name, self.tokens, number)
        depth = number / max(self.trials - 1, 1)
        places = rng.sample(PLACES, self.keys)
        keys = ["".join(rng.choice("0123456789") for _ in range(DIGITS)) for _ in places]
        whose = [f" of the {place}" for place in places] if self.keys > 1 else [""]
        stated = [
            tokenizer.encode(f" The pass key{of} is {key}. Remember it. {key} is the pass key{of}. ")
            for of, key in zip(whose, keys, strict=True)
        ]
        question = tokenizer.encode(f" What is the pass key{whose[0]}? The pass key{whose[0]} is")
        prefix = tokenizer.prefix
        room = self.tokens - len(prefix) - len(question) - sum(map(len, stated))
        deepest = room - self.window - MARGIN_TOKENS
        if deepest < 0:
            raise LightTransferError(
                f"tokens: {self.tokens} is too short for {self.keys} keys outside a window of {self.window}; "
                f"from {self.tokens - deepest} on"
            )
        filler = sentences(tokenizer, room, rng)
        cuts = [round(depth * deepest), *(rng.randint(0, deepest) for _ in places[1:])]
        body: list[int] = []
        last = 0
        for cut, statement in sorted(zip(cuts, stated, strict=True)):
            body += filler[last:cut] + statement
            last = cut
        prompt = [*prefix, *body, *filler[last:], *question]
        return Item(
            task=self.name,
            prompt=tuple(prompt),
            answers=(keys[0],),
            new_tokens=NEW_TOKENS,
            metric="begins",
            cell={"tokens": self.tokens, "depth": round(depth, 3)},
        )

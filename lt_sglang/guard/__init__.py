"""Refuse requests that would end SGLang 0.5.23, before they reach the scheduler.

SGLang's scheduler checks little of what it is sent: a token outside the vocabulary, a string where a number
belongs or an empty prompt raises in its loop, and the server ends for everybody. The tokenizer's process
knows enough to say no. ``requests.py`` looks at a request as it came, ``tokenized.py`` at what would be sent;
``hooks.py`` puts them in place (lt_sglang/hooks/table.py). A refusal is a ValueError, which SGLang's routes
turn into a 400.
"""

from __future__ import annotations

import os

# "off" leaves the guard out; anything else, or nothing, keeps it.
SWITCH = "LT_SGLANG_GUARD"


def is_on() -> bool:
    """Whether requests are checked in this process."""
    return os.environ.get(SWITCH, "on").strip().lower() not in ("off", "0", "false", "no")

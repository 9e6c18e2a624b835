"""``python -m lt_sglang``: the same as the command ``lt-sglang``."""

from __future__ import annotations

import sys

from lt_sglang.cli import main

if __name__ == "__main__":
    sys.exit(main())

"""``make touch-prefix`` measures what it says: the right set for every waiting request, and some time."""

from __future__ import annotations

from .touch_prefix import measure


def test_it_measures() -> None:
    best, median, stock = measure(4)
    assert 0 < best <= median and stock > 0

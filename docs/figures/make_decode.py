"""Draw docs/figures/decode.svg from loadtest/results: python docs/figures/make_decode.py.

The numbers are read from the result files; tests/unit/test_docs.py draws it again and compares.
"""

from __future__ import annotations

import json
from pathlib import Path

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parents[1] / "loadtest" / "results"
FILE = HERE / "decode.svg"
# Prompt tokens; result files of static and dynamic mode, and the bound of the KV bytes alone.
ROWS = (
    (4096, "2026-11-22-h100-lt-half-4k-decode-4096-vs-fa3", None),
    (8192, "2026-11-22-h100-lt-half-8k-decode-8192-vs-fa3", "2026-11-22-h100-dynamic-8k-decode-8192-vs-fa3"),
    (
        16384,
        "2026-11-22-h100-lt-half-16k-decode-16384-vs-fa3",
        "2026-11-22-h100-dynamic-16k-decode-16384-vs-fa3",
    ),
    (
        32768,
        "2026-11-22-h100-lt-half-32k-decode-32768-vs-fa3",
        "2026-11-22-h100-dynamic-32k-decode-32768-vs-fa3",
    ),
    (131072, "2026-11-22-h100-table5-128k", None),
)
WINDOW, SHARE = 1024, 0.5
STATIC, DYNAMIC, BOUND = "#4878a8", "#e08a2e", "#222222"
LEFT, WIDE, TOP, HIGH = 190, 240, 70, 62  # WIDE: of 1.0x


def ratio(name: str) -> float:
    """Ours over stock SGLang's decode tokens a second."""
    found: float = json.loads((RESULTS / f"{name}.json").read_text())["ratio"]["decode_tokens_per_second"]
    return found


def bound(tokens: int) -> float:
    """What half of the KV bytes of ``tokens`` leaves, at most."""
    return tokens / ((1 - SHARE) * tokens + SHARE * min(tokens, WINDOW))


def _bar(y: int, value: float, colour: str) -> str:
    width = value * WIDE
    return (
        f'<rect x="{LEFT}" y="{y}" width="{width:.0f}" height="20" fill="{colour}"/>'
        f'<text x="{LEFT + 8}" y="{y + 15}" fill="#ffffff">{value:.2f}x</text>'
    )


def svg() -> str:
    """The whole picture."""
    height = TOP + HIGH * len(ROWS) + 64
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 {height}" font-family="sans-serif" font-size="13">',
        "<title>Decode tokens a second over stock SGLang, by prompt length</title>",
        f'<rect width="760" height="{height}" fill="#ffffff"/>',
        '<text x="20" y="26" font-size="15" font-weight="bold" fill="#222">Decode tokens a second, over stock '
        "SGLang (fa3), KV memory full</text>",
        f'<rect x="{LEFT}" y="40" width="14" height="14" fill="{STATIC}"/><text x="{LEFT + 20}" y="52">static mode</text>',
        f'<rect x="{LEFT + 120}" y="40" width="14" height="14" fill="{DYNAMIC}"/>'
        f'<text x="{LEFT + 140}" y="52">dynamic mode</text>',
        f'<path d="M{LEFT + 262} 38v18" stroke="{BOUND}" stroke-width="3"/>'
        f'<text x="{LEFT + 272}" y="52">bound of the KV bytes</text>',
    ]
    for row, (tokens, static, dynamic) in enumerate(ROWS):
        y = TOP + row * HIGH
        end = LEFT + bound(tokens) * WIDE
        parts.append(f'<text x="20" y="{y + 26}" fill="#222">{tokens // 1024}K prompt tokens</text>')
        parts.append(_bar(y, ratio(static), STATIC))
        if dynamic is not None:
            parts.append(_bar(y + 22, ratio(dynamic), DYNAMIC))
        else:
            parts.append(f'<text x="{LEFT + 6}" y="{y + 37}" fill="#888">dynamic: not measured</text>')
        parts.append(f'<path d="M{end:.0f} {y - 3}v48" stroke="{BOUND}" stroke-width="3"/>')
    bottom = TOP + HIGH * len(ROWS)
    parts.append(f'<path d="M{LEFT + WIDE} {TOP - 6}V{bottom - 8}" stroke="#bbbbbb" stroke-dasharray="4 4"/>')
    parts.append(
        f'<text x="{LEFT + WIDE}" y="{bottom + 8}" text-anchor="middle" fill="#555">stock: 1.00x</text>'
    )
    parts.append(
        f'<text x="20" y="{bottom + 32}" fill="#555">One H100, Mistral-7B shape with dummy weights, 16 of 32 layers '
        "lazy, 4 + 1020.</text>"
    )
    parts.append(
        f'<text x="20" y="{bottom + 50}" fill="#555">At 8K stock SGLang is 4 % faster with flashinfer than with '
        "fa3.</text>"
    )
    return "\n".join([*parts, "</svg>", ""])


if __name__ == "__main__":
    FILE.write_text(svg())

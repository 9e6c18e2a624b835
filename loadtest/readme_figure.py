"""README's plot, docs/figures/decode.svg, from loadtest/results.

    python -m loadtest.make_results

The numbers are read from the result files; tests/unit/test_docs.py draws it again and compares.
"""

from __future__ import annotations

import json
from pathlib import Path

from lt_sglang.planner.roofline import decode_bound

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
FILE = HERE.parent / "docs" / "figures" / "decode.svg"
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


def _text(x: float, y: float, text: str, style: str = 'fill="#222"') -> str:
    return f'<text x="{x}" y="{y}" {style}>{text}</text>'


def _rect(x: float, y: float, width: float, height: float, colour: str) -> str:
    return f'<rect x="{x}" y="{y}" width="{width:.0f}" height="{height}" fill="{colour}"/>'


def _bar(y: int, value: float, colour: str) -> str:
    return _rect(LEFT, y, value * WIDE, 20, colour) + _text(LEFT + 8, y + 15, f"{value:.2f}x", 'fill="#fff"')


def svg() -> str:
    """The whole picture."""
    bottom = TOP + HIGH * len(ROWS)
    title = "Decode tokens a second, over stock SGLang (fa3), KV memory full"
    view = f'viewBox="0 0 760 {bottom + 64}"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {view} font-family="sans-serif" font-size="13">',
        f"<title>{title}</title>",
        _rect(0, 0, 760, bottom + 64, "#ffffff"),
        _text(20, 26, title, 'font-size="15" font-weight="bold" fill="#222"'),
        _rect(LEFT, 40, 14, 14, STATIC) + _text(LEFT + 20, 52, "static mode"),
        _rect(LEFT + 120, 40, 14, 14, DYNAMIC) + _text(LEFT + 140, 52, "dynamic mode"),
        f'<path d="M{LEFT + 262} 38v18" stroke="{BOUND}" stroke-width="3"/>',
        _text(LEFT + 272, 52, "bound of the KV bytes"),
    ]
    for row, (tokens, static, dynamic) in enumerate(ROWS):
        y = TOP + row * HIGH
        end = LEFT + decode_bound(tokens, SHARE, WINDOW) * WIDE
        parts.append(_text(20, y + 26, f"{tokens // 1024}K prompt tokens"))
        parts.append(_bar(y, ratio(static), STATIC))
        if dynamic is None:
            parts.append(_text(LEFT + 6, y + 37, "dynamic: not measured", 'fill="#888"'))
        else:
            parts.append(_bar(y + 22, ratio(dynamic), DYNAMIC))
        parts.append(f'<path d="M{end:.0f} {y - 3}v48" stroke="{BOUND}" stroke-width="3"/>')
    small = 'fill="#555"'
    parts += [
        f'<path d="M{LEFT + WIDE} {TOP - 6}V{bottom - 8}" stroke="#bbb" stroke-dasharray="4 4"/>',
        _text(LEFT + WIDE, bottom + 8, "stock: 1.00x", f'{small} text-anchor="middle"'),
        _text(
            20,
            bottom + 32,
            "One H100, Mistral-7B shape, dummy weights, 16 of 32 layers lazy, 4 + 1020.",
            small,
        ),
        _text(20, bottom + 50, "At 8K stock SGLang is 4 % faster with flashinfer than with fa3.", small),
        "</svg>",
    ]
    return "\n".join([*parts, ""])

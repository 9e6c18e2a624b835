"""Names shared by processes."""

from __future__ import annotations

from typing import Any

BACKEND = "lighttransfer"
ACTIVE_VARIABLE = "LT_SGLANG_ACTIVE"
# Server arguments of SGLang's that no client and no log may see, and what they see instead.
KEYS = ("api_key", "admin_api_key", "ssl_keyfile_password")
HIDDEN = "<redacted>"


def is_requested(args: Any) -> bool:
    """Whether any of SGLang's three backend flags names us."""
    names = (args.attention_backend, args.prefill_attention_backend, args.decode_attention_backend)
    return BACKEND in names

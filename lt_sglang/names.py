"""Names shared by processes."""

BACKEND = "lighttransfer"
ACTIVE_VARIABLE = "LT_SGLANG_ACTIVE"

"""Names shared by processes."""

BACKEND = "lighttransfer"
ACTIVE_VARIABLE = "LT_SGLANG_ACTIVE"
# Server arguments of SGLang's that no client and no log may see, and what they see instead.
KEYS = ("api_key", "admin_api_key", "ssl_keyfile_password")
HIDDEN = "<redacted>"

"""Errors an operator is meant to read."""

from __future__ import annotations


class LightTransferError(ValueError):
    """A configuration, model or engine that cannot be served as asked.

    The message is one sentence that names the field and the allowed values. The server never falls
    back to full KV: whoever catches this must stop.
    """

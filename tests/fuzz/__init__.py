"""Hostile requests against real servers: a corpus, and bodies that schemathesis makes of the OpenAPI."""

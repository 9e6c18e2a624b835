"""The tasks: seeded generators of questions, and readers of published files."""

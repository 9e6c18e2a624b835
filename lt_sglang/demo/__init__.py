"""A small real model, for demonstrations and tests on a machine without a GPU."""

"""Tests against real SGLang servers on a CPU, each one process tree with tiny models."""

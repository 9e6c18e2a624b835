"""Attention of hybrid models: which keys a lazy layer reads, and the CPU and GPU backends."""

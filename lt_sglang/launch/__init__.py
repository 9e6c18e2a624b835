"""Everything between a command line and a running server. Nothing here imports torch or sglang."""

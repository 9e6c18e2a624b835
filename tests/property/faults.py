"""Faults of the caches that other changes repair: what the machines leave out until those are there."""

from importlib.util import find_spec

from lt_sglang.hooks import wrappers

# Sinks are shared by token ids that do not determine K and V, and outlive an update of the weights.
SINK_KEYS = find_spec("lt_sglang.memory.kv_keys") is not None
# The window of a prompt that is barred from the tree, or refused a sink set, does not slide.
SLIDE = hasattr(wrappers, "slide_after_chunk")

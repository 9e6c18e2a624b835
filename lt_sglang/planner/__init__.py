"""How many requests fit and what lazy layers gain: arithmetic only, no torch, no sglang."""

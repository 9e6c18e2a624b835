"""KV memory of hybrid models: units that full and lazy layers share, admission and sinks."""

"""SGLang's prefix cache, taught about sinks and layer sets."""

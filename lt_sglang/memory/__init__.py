"""KV memory of hybrid models: the pool split, the sink rows and the prefix cache that keeps them."""

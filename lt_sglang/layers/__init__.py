"""Which layers of which request are lazy: layer sets, how they are found again, what a prefill does."""

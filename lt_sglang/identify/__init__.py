"""Which layers are lazy: the queue, the observation window and the scores."""

"""Dynamic mode: each request's lazy layers are found while its prompt is prefilled."""

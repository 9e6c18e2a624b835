"""The scores by which a request's lazy layers are found while its prompt is prefilled. Imports no sglang."""

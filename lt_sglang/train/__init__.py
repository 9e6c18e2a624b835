"""LightTransfer-Train: supervised fine-tuning of a model under the mask it will be served with.

masks: who sees whom, from one function. attention: that mask inside a transformers model. data, template:
samples and where their loss is. trainer: TRL's loop with our checks. run: one run from options to a
checkpoint that ``lt-sglang serve`` serves without a flag. plan: memory and time of a run before it is
started.

Nothing in the serving runtime imports this package, and it imports nothing of that runtime.
"""

"""LightTransfer for SGLang: per-layer hybrid KV caches for pretrained models (arXiv 2410.13846).

Importing this package costs nothing: it imports neither torch nor sglang. SGLang finds
``lt_sglang.plugin:register`` through the entry-point group ``sglang.srt.plugins``.
"""

__version__ = "0.1.0"

"""The entry point SGLang calls in every process it starts (group ``sglang.srt.plugins``).

SGLang only logs what a plug-in raises. So the order matters: the backend's name becomes known last, and a
process in which anything before it failed ends with SGLang's own error about an unknown backend.
"""

from __future__ import annotations

import os

from lt_sglang.names import ACTIVE_VARIABLE, BACKEND


def register() -> None:
    """Offer ``--attention-backend lighttransfer``; where it is in use, install all that serves it.

    Changes nothing in a server that does not ask for it: the launcher gets one more choice and two
    wrapped argument checks, and the scheduler processes nothing at all.
    """
    from sglang.srt.arg_groups.choices import ATTENTION_BACKEND_CHOICES, add_attention_backend_choices
    from sglang.srt.arg_groups.resolution_hooks import register_resolution_hook

    from lt_sglang.launch.lifeline import end_if_orphaned
    from lt_sglang.resolve import apply_config, settle_runtime

    if BACKEND not in ATTENTION_BACKEND_CHOICES:
        register_resolution_hook("handle_model_source_paths")(apply_config)
        register_resolution_hook("handle_attention_backend_compatibility")(settle_runtime)
    if os.environ.get(ACTIVE_VARIABLE) == "1":
        end_if_orphaned()
        _install()
    if BACKEND not in ATTENTION_BACKEND_CHOICES:
        add_attention_backend_choices([BACKEND])


def _install() -> None:
    from sglang.srt.layers.attention.attention_registry import register_attention_backend
    from sglang.srt.mem_cache.registry import register_radix_cache_backend, registered_radix_cache_backends

    from lt_sglang.attention import factory as attention
    from lt_sglang.cache import factory as cache
    from lt_sglang.hooks import table
    from lt_sglang.launch import warmup

    table.install()
    warmup.register()
    if BACKEND not in registered_radix_cache_backends():
        register_radix_cache_backend(BACKEND, cache.create)
    register_attention_backend(BACKEND)(attention.create)

"""Turn ``--attention-backend lighttransfer`` into settings that stock SGLang understands.

Runs inside SGLang's own argument resolution (register_resolution_hook), once, before any model config
is built; what it declares reaches every rank with the server arguments. Nothing here runs unless the
backend is asked for.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable, Sequence
from typing import Any

from lt_sglang.config import CONFIG_KEY, LightTransferConfig
from lt_sglang.errors import LightTransferError
from lt_sglang.launch import warmup
from lt_sglang.models import find_config, find_known
from lt_sglang.names import ACTIVE_VARIABLE, BACKEND, HIDDEN, KEYS, is_requested
from lt_sglang.refusals import check_dynamic_args, check_server_args

logger = logging.getLogger(__name__)

_SOURCE = "lt_sglang.resolve"


def load_config(
    overrides: dict[str, Any], model_config: dict[str, Any], model_path: str
) -> LightTransferConfig:
    """The configuration to serve: overrides, else the model's own, else the known model's.

    Raises:
        LightTransferError: when there is none.
    """
    found = find_config(overrides, model_config, model_path, "model override args")
    if found is not None:
        return found
    override = json.dumps({CONFIG_KEY: {"mode": "dynamic"}})
    raise LightTransferError(
        f"lazy layers: none are known for {model_path}. With --json-model-override-args '{override}' they "
        "are found in each request's prompt; lt-sglang calibrate writes a list by samples of your traffic, "
        f"for the key '{CONFIG_KEY}' of the model's config.json"
    )


def model_overrides(config: LightTransferConfig, num_layers: int) -> dict[str, Any]:
    """Entries for ``--json-model-override-args`` that make stock SGLang build hybrid pools.

    hybrid_layer_pattern: 1 for a streaming layer (sglang/srt/configs/model_config.py,
    get_hybrid_layer_ids). sliding_window_size: earlier tokens kept, so w_recent - 1.
    """
    overrides: dict[str, Any] = {CONFIG_KEY: config.to_dict()}
    if config.lazy_layers:
        lazy = set(config.lazy_layers)
        overrides["is_hybrid_swa"] = True
        overrides["hybrid_layer_pattern"] = [int(layer in lazy) for layer in range(num_layers)]
        overrides["sliding_window_size"] = config.retained_tokens - 1
    return overrides


def apply_config(server_args: Any, previous: Callable[[Any], None]) -> None:
    """Wraps SGLang's step handle_model_source_paths: the model path is final, nothing was read yet."""
    previous(server_args)
    from sglang.srt.arg_groups.overrides import declare_resolution, resolving_view

    args = resolving_view(server_args)
    if not is_requested(args):
        # A stock engine in a process that has started one of ours: its children are stock, too.
        os.environ.pop(ACTIVE_VARIABLE, None)
        return
    check_server_args(args)
    from lt_sglang.hooks import table

    overrides = json.loads(args.json_model_override_args or "{}")
    model = _read_model(args, overrides)
    config = load_config(overrides, model.to_dict(), args.model_path)
    num_layers = model.get_text_config().num_hidden_layers
    config = config.settle(num_layers)
    if config.dynamic:
        check_dynamic_args(args)
        _check_generates(model.architectures or (), args.is_embedding)
    overrides.update(model_overrides(config, num_layers))
    declare_resolution(
        server_args, _SOURCE, json_model_override_args=json.dumps(overrides), radix_cache_backend=BACKEND
    )

    # Children inherit it; see plugin.register.
    os.environ[ACTIVE_VARIABLE] = "1"
    warmup.register()
    table.install_in_launcher()
    _guard_keys(server_args, args)
    logger.info("LightTransfer: %s", config)


def _read_model(args: Any, overrides: dict[str, Any]) -> Any:
    """The model's config as SGLang reads it.

    Raises:
        LightTransferError: it needs code of its own that may not run, or that SGLang has no model for.
    """
    from sglang.srt.utils.hf_transformers_utils import get_config

    path = args.model_path
    try:
        model = get_config(
            path, args.trust_remote_code, revision=args.revision, model_override_args=overrides
        )
    except ValueError as error:
        if args.trust_remote_code or "trust_remote_code" not in str(error):
            raise
        raise LightTransferError(
            f"--trust-remote-code: {path} cannot be read without it, as Python code beside its config.json "
            "says what that means; look at the code before you let it run"
        ) from None
    if getattr(model, "auto_map", None):
        _check_architecture(tuple(model.architectures or ()), path)
    return model


def _check_architecture(names: Sequence[str], path: str) -> None:
    """SGLang would run the model's own code, whose attention knows no lazy layers (--model-impl)."""
    from sglang.srt.models.registry import ModelRegistry

    if any(map(ModelRegistry.is_arch_supported, names)):
        return
    known = find_known(path)
    named = known.architecture if known is not None else "Qwen2ForCausalLM"
    override = f"--json-model-override-args '{json.dumps({'architectures': [named]})}'"
    which = (
        "whose weights it has" if known is not None else "or as that of SGLang's models whose weights it has"
    )
    what = (
        f"its architecture {' '.join(names)} is code of its own, which knows no lazy layers"
        if names
        else "its config.json names no architecture"
    )
    raise LightTransferError(f"{path}: {what}; serve it as {named}, {which}: {override}")


def _check_generates(architectures: Sequence[str], is_embedding: bool) -> None:
    from sglang.srt.configs.model_config import is_generation_model

    if not is_generation_model(list(architectures), is_embedding):
        what = "--is-embedding" if is_embedding else f"{architectures[0]}"
        raise LightTransferError(
            f"{what}: dynamic mode needs a model that generates; embedding and reward models run with static "
            "lists"
        )


def _guard_keys(server_args: Any, args: Any) -> None:
    """Show the server's keys to nobody; say so if its admin routes have none."""
    command = server_args.launch_command
    if command is not None:
        for value in filter(None, (getattr(args, name) for name in KEYS)):
            command = re.sub(rf"(?<=[ =]){re.escape(value)}(?= |$)", HIDDEN, command)
        server_args._launch_command = command
    # Other nodes have no routes.
    if args.node_rank == 0 and args.admin_api_key is None:
        logger.warning(
            "LightTransfer: SGLang's HTTP server leaves its admin routes (/flush_cache, /abort_request, "
            "/update_weights_from_disk and others) open to every client; --admin-api-key closes them"
        )


def settle_runtime(server_args: Any, previous: Callable[[Any], None]) -> None:
    """Wraps handle_attention_backend_compatibility, once the device is known.

    What cannot be captured runs eagerly; on a GPU the kernels of lazy layers are compiled before the server
    is ready.
    """
    previous(server_args)
    from sglang.srt.arg_groups.overrides import declare_resolution, resolving_view

    args = resolving_view(server_args)
    if not is_requested(args):
        return
    from sglang.srt.model_executor.cuda_graph_config import Backend, Phase, with_phase

    if args.device != "cpu":
        if not args.skip_server_warmup:
            declare_resolution(server_args, _SOURCE, warmups=warmup.with_warm_up(args.warmups))
        if args.cuda_graph_config.prefill.backend == Backend.FULL:
            raise LightTransferError(
                "--cuda-graph-backend-prefill full: not supported with lazy layers; use breakable or disabled"
            )
        given = json.loads(args.json_model_override_args)[CONFIG_KEY]
        if not LightTransferConfig.from_dict(given).dynamic:
            return
    # Dynamic mode decides in Python between the layers of a prefill, which a captured one would not run.
    for phase in (Phase.PREFILL,) if args.device != "cpu" else (Phase.DECODE, Phase.PREFILL):
        config = with_phase(args.cuda_graph_config, phase, backend=Backend.DISABLED)
        declare_resolution(server_args, _SOURCE, cuda_graph_config=config)

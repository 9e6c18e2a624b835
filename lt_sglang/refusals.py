"""SGLang features that lazy layers do not work with, refused by name before anything is loaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lt_sglang.errors import LightTransferError
from lt_sglang.names import BACKEND


@dataclass(frozen=True)
class Refusal:
    """flag: SGLang's flag. field: its ServerArgs field. refused: a value's test. why: half a sentence."""

    flag: str
    field: str
    refused: Callable[[Any], bool]
    why: str


def _set(value: Any) -> bool:
    return value not in (None, False, "", 0, [], {})


def _given(value: Any) -> bool:
    return value is not None


def _above_one(value: Any) -> bool:
    return value is not None and value > 1


REFUSALS: tuple[Refusal, ...] = (
    Refusal(
        "--speculative-algorithm", "speculative_algorithm", _set, "draft tokens are verified with full KV"
    ),
    Refusal(
        "--disaggregation-mode",
        "disaggregation_mode",
        lambda value: value not in (None, "null"),
        "the KV transfer does not carry sink rows",
    ),
    Refusal("--pp-size", "pp_size", _above_one, "pipeline stages do not agree on sink rows"),
    Refusal("--dcp-size", "dcp_size", _above_one, "context-parallel KV is not cut into windows"),
    Refusal("--attn-cp-size", "attn_cp_size", _above_one, "context-parallel KV is not cut into windows"),
    Refusal("--hicache-storage-backend", "hicache_storage_backend", _set, "pages in storage have no sinks"),
    Refusal(
        "--hicache-io-backend",
        "hicache_io_backend",
        lambda value: value != "kernel",
        "rows are copied by kernels",
    ),
    Refusal(
        "--hicache-mem-layout",
        "hicache_mem_layout",
        lambda value: value not in ("layer_first", "page_first"),
        "host memory is laid out as the device's; leave the flag out",
    ),
    # Of --enable-dp-attention, too, which SGLang has turned into this one by now.
    Refusal("--attn-dp-size", "attn_dp_size", _above_one, "DP attention was not tested with hybrid caches"),
    Refusal("--enable-mixed-chunk", "enable_mixed_chunk", _set, "lazy layers plan prefill and decode apart"),
    Refusal(
        "--enable-unified-memory",
        "enable_unified_memory",
        _set,
        "full and lazy layers share memory as it is",
    ),
    Refusal(
        "--enable-two-batch-overlap", "enable_two_batch_overlap", _set, "sink rows are filled once a forward"
    ),
    Refusal("--enable-pdmux", "enable_pdmux", _set, "sink rows are filled on one stream"),
    Refusal(
        "--enable-streaming-session", "enable_streaming_session", _set, "a session keeps slots, not sinks"
    ),
    Refusal(
        "--enable-session-radix-cache", "enable_session_radix_cache", _set, "a session keeps slots, not sinks"
    ),
    Refusal("--enable-lmcache", "enable_lmcache", _set, "external caches do not store sink rows"),
    Refusal("--enable-flexkv", "enable_flexkv", _set, "external caches do not store sink rows"),
    Refusal("--enable-hisparse", "enable_hisparse", _set, "it replaces the KV pools"),
    Refusal("--enable-kv-cache-sharding", "enable_kv_cache_sharding", _set, "it replaces the KV pools"),
    Refusal(
        "--disable-hybrid-swa-memory", "disable_hybrid_swa_memory", _set, "lazy layers live in that memory"
    ),
    Refusal(
        "--enable-deterministic-inference",
        "enable_deterministic_inference",
        _set,
        "lazy layers split the KV of a request by its length",
    ),
    Refusal("--kv-canary", "kv_canary", lambda value: value not in (None, "none"), "it knows no sink rows"),
    Refusal(
        "--enable-memory-saver",
        "enable_memory_saver",
        _set,
        "memory that is given back and taken again was not tested with sink rows; it needs a GPU",
    ),
    Refusal(
        "--enable-torch-compile",
        "enable_torch_compile",
        _set,
        "compiled decode steps were not tested; they need a GPU",
    ),
    Refusal(
        "--model-impl",
        "model_impl",
        lambda value: value not in (None, "auto", "sglang"),
        "only SGLang's own models were tested",
    ),
    Refusal("--radix-cache-backend", "radix_cache_backend", _set, "lazy layers bring their own"),
    Refusal(
        "--use-ray", "use_ray", _set, "its scheduler actors load no plug-ins; deploy/ray serves under Ray"
    ),
    Refusal(
        "--kv-cache-dtype",
        "kv_cache_dtype",
        lambda value: value not in (None, "auto", "bf16", "bfloat16", "fp8_e4m3", "fp8_e5m2"),
        "supported are auto, bfloat16, fp8_e4m3 and fp8_e5m2",
    ),
    Refusal("--dllm-algorithm", "dllm_algorithm", _set, "diffusion models attend both ways"),
    Refusal(
        "--enable-nvidia-megakernel", "enable_nvidia_megakernel", _set, "it replaces the attention of decode"
    ),
    Refusal("--enable-amd-monokernel", "enable_amd_monokernel", _set, "it replaces the attention of decode"),
    Refusal(
        "--swa-full-tokens-ratio",
        "swa_full_tokens_ratio",
        _given,
        "full and lazy layers share one memory; nothing is split",
    ),
    Refusal(
        "--swa-prefix-tails",
        "swa_prefix_tails",
        _given,
        "full and lazy layers share one memory; nothing is split",
    ),
    Refusal(
        "--enable-unified-cache-external-linker",
        "enable_unified_cache_external_linker",
        _set,
        "external caches do not store sink rows",
    ),
    Refusal(
        "--prefill-only-disable-kv-cache", "prefill_only_disable_kv_cache", _set, "it replaces the KV pools"
    ),
    Refusal(
        "--enable-page-major-kv-layout", "enable_page_major_kv_layout", _set, "sinks and windows are rows"
    ),
    Refusal("--enable-mis", "enable_mis", _set, "lazy layers do not mask the other items of a request"),
    Refusal("--enable-prefill-cp", "enable_prefill_cp", _set, "context-parallel KV is not cut into windows"),
    # SGLang turns it into --enable-deterministic-inference after it has asked us.
    Refusal(
        "--rl-on-policy-target",
        "rl_on_policy_target",
        _given,
        "it needs deterministic inference, and lazy layers split the KV of a request by its length",
    ),
    # Front ends that load no plug-ins: requests would not be checked, aborts would miss copies, keys show.
    Refusal(
        "--tokenizer-worker-num",
        "tokenizer_worker_num",
        _above_one,
        "those processes load no plug-ins and check no keys",
    ),
    Refusal("--smg-grpc-mode", "smg_grpc_mode", _set, "it has a front end of its own"),
)


DYNAMIC_REFUSALS: tuple[Refusal, ...] = (
    Refusal(
        "--enable-layernorm-sp",
        "enable_layernorm_sp",
        _set,
        "scores read the residual stream whole, on each rank",
    ),
    Refusal(
        "--enable-attn-tp-input-scattered",
        "enable_attn_tp_input_scattered",
        _set,
        "scores read the residual stream whole, on each rank",
    ),
    Refusal("--enable-lora", "enable_lora", _set, "adapters were not tested with it"),
    Refusal("--lora-paths", "lora_paths", _set, "adapters were not tested with it"),
)


def check_dynamic_args(args: Any) -> None:
    """Raise LightTransferError for the first flag of ``args`` that dynamic mode does not work with."""
    _refuse(args, DYNAMIC_REFUSALS, "in dynamic mode")


def check_server_args(args: Any) -> None:
    """Raise LightTransferError for the first flag of ``args`` that cannot be served with lazy layers."""
    for role in ("prefill_attention_backend", "decode_attention_backend"):
        name = getattr(args, role)
        if name not in (None, BACKEND):
            flag = "--" + role.replace("_", "-")
            raise LightTransferError(f"{flag} {name}: with lazy layers it must be {BACKEND} or not be given")
    if args.attention_backend not in (None, BACKEND):
        raise LightTransferError(
            f"--attention-backend {args.attention_backend}: must be {BACKEND} for both phases"
        )
    roles = {args.prefill_attention_backend, args.decode_attention_backend}
    if args.attention_backend is None and None in roles and BACKEND in roles:
        given = "prefill" if args.prefill_attention_backend else "decode"
        raise LightTransferError(
            f"--{given}-attention-backend {BACKEND}: must be given for both phases; use --attention-backend "
            f"{BACKEND}"
        )
    _check_windows()
    _refuse(args, REFUSALS, "with lazy layers")
    _check_environment()


# Variables of SGLang's that are switches, and why they cannot be on.
VARIABLES: dict[str, str] = {
    # Stock SGLang's FlashInfer backend would decode with stale plans, too, and nothing would say so.
    "SGLANG_ENABLE_METADATA_GLUE_GRAPH": (
        "decode steps are planned on the host, and a captured plan would not follow the requests"
    ),
    # It gives the pools their memory after the graphs are captured, for the allocator's tokens alone.
    "SGLANG_ENABLE_POST_CAPTURE_KV_SIZING": "the rows of sinks would have no memory",
    "SGLANG_USE_HND_KVCACHE": "sinks and windows are rows of the NHD layout",
    "SGLANG_RUST_SERVER": "it neither warms lazy layers up nor runs the guards of SGLang's Python server",
}


def _check_environment() -> None:
    from sglang.srt.environ import envs

    for name, why in VARIABLES.items():
        if getattr(envs, name).get():
            raise LightTransferError(f"{name}=1: not supported with lazy layers: {why}")


def _refuse(args: Any, refusals: tuple[Refusal, ...], where: str) -> None:
    for refusal in refusals:
        value = getattr(args, refusal.field)
        if refusal.refused(value):
            shown = "" if value is True else f" {value}"
            raise LightTransferError(f"{refusal.flag}{shown}: not supported {where}: {refusal.why}")


def _check_windows() -> None:
    from sglang.srt.environ import envs

    if not envs.SGLANG_OPT_UNIFIED_CACHE_FREE_OUT_OF_WINDOW_SLOTS.get():
        raise LightTransferError(
            "SGLANG_OPT_UNIFIED_CACHE_FREE_OUT_OF_WINDOW_SLOTS=0: not supported with lazy layers: "
            "streaming slots would be kept that have left the window"
        )

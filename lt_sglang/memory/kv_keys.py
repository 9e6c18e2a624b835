"""What K and V of a request's first tokens depend on: its token ids, extra_key, cache_salt, or more.

Sink sets are shared by what ``shared_key`` contains. A request whose K and V depend on anything else has a
set of its own (``private_key``), which nobody can find and which is dropped as the request ends. This is the
only place that decides it. A field of SGLang's Req that no table here knows counts against sharing once it is
set; tests/contract/test_kv_keys.py fails until somebody has read what it does and entered it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lt_sglang.memory.sinks import SinkKey

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req

# In the key. SGLang appends lora_id to extra_key, in the tree's keys as in ours.
IN_KEY = frozenset({"origin_input_ids", "output_ids", "extra_key", "cache_salt", "lora_id"})

# They change K and V and are not in the key, or SGLang itself keeps the request out of its prefix cache.
OWN_KV = frozenset(
    {
        "input_embeds",  # vectors instead of tokens; the ids are all 1
        "positional_embed_overrides",  # and query_, item_, embed_overrides of /v1/score and /v1/embeddings
        "multimodal_inputs",  # images; positions that do not count tokens
        "token_type_ids",
        "multi_item_delimiter_indices",  # items that do not see each other
        "token_indices_to_pool",
        "decision_layout",
        "dllm_config",  # attends both ways
        "skip_radix_cache_insert",  # SGLang: "KV that the token ids alone do not determine"
        "beam_group",
        "encoder_cached",
    }
)

# They change what is sampled, reported, stored or when, and no K or V of a given token at a given position.
NO_MATTER = frozenset(
    """
    rid origin_input_ids_unpadded session session_id session_generation stream priority routing_key tokenizer
    sampling_params custom_logit_processor eos_token_ids vocab_size require_reasoning http_worker_ipc
    return_logprob return_hidden_states return_hidden_states_mode return_routed_experts return_indexer_topk
    return_sampling_mask return_flat_raw_top_logprobs return_pooled_hidden_states sampling_logprobs_mode
    routed_experts_start_len logprob_start_len dimensions kv_hints routed_dp_rank disagg_prefill_dp_rank
    bootstrap_host bootstrap_port bootstrap_room metrics_collector time_stats has_log_time_stats
    full_untruncated_fill_ids extend_end prefix_len kv lock last_node last_host_node best_match_node
    host_hit_length swa_host_hit_length mamba_host_hit_length mamba_branching_seqlen swa_branching_seqlen
    num_matched_prefix_tokens storage_hit_length storage_hit_start host_loaded_length host_hit_is_storage
    storage_prefetch_retry_attempts storage_prefetch_last_match_len staged_prefetch_plan kv_rotation_base
    cache_request_handle extend_batch_idx decode_batch_idx inflight_middle_chunks is_retracted retracted_stain
    retraction_count retraction_mb_id weight_version_events cached_tokens cached_tokens_device
    cached_tokens_host cached_tokens_storage already_computed arrival_processed_tokens prefill_attempt_count
    finished_reason finished_len finished_output to_finish discard_output_reason surr_offset read_offset
    decoded_text cur_decode_ids_len surr_and_decode_ids send_token_offset send_decode_id_offset
    send_output_token_logprobs_offset reasoning_tokens logprob temp_scaled_logprobs top_p_normalized_logprobs
    input_logprob_sent input_token_logprobs temp_input_top_logprobs_val temp_input_top_logprobs_idx
    temp_input_token_ids_logprobs_val temp_input_token_ids_logprobs_idx sampling_mask_rows hidden_states
    hidden_states_tensor output_topk_p output_topk_index output_dsa_topk_indices routed_experts indexer_topk
    customized_info embedding pooled_hidden_state grammar grammar_key grammar_wait_ct
    mm_image_tokens mm_audio_tokens mm_video_tokens mm_token_counts_ready
    spec_verify_ct spec_num_correct_drafts spec_num_block_accept_tokens spec_num_cap_tokens
    spec_correct_drafts_histogram spec_cap_lens_histogram mamba_lazy_checkpoint hisparse_staging
    dllm_phase dllm_initialized dllm_incomplete_ids dllm_algo_state dllm_block_offset dllm_has_literal_mask
    pd_rebootstrap_forced_output_id disagg_kv_sender disagg_decode_prefix_len start_send_idx tmp_end_idx
    early_send_prefix_end metadata_buffer_index expected_kv_checksum pending_bootstrap
    _cache_breakdown_computed _is_reasoning_over _session_mm_items _think_end_matcher _think_end_match_len
    _think_start_match_len
    lighttransfer_hit lighttransfer_memory lighttransfer_sinks lighttransfer_weights lighttransfer_digest
    lighttransfer_branching_seqlen lighttransfer_prefix
    """.split()  # noqa: SIM905
)

KNOWN = IN_KEY | OWN_KV | NO_MATTER


def determined_by_key(req: Req) -> bool:
    """Whether K and V of the request's tokens are a function of what ``shared_key`` contains."""
    fields = vars(req)
    return not any(_is_set(fields.get(name)) for name in OWN_KV) and not any(
        _is_set(fields[name]) for name in fields.keys() - KNOWN
    )


def shared_key(tokens: Any, extra_key: str | None, cache_salt: str | None) -> SinkKey:
    """The key under which everybody with these first tokens finds one set."""
    return (*tokens, extra_key, cache_salt)


def private_key(key: SinkKey, request: str) -> SinkKey:
    """``key``, for ``request`` alone."""
    return (*key, "private", request)


def of_weights(key: SinkKey, version: int) -> SinkKey:
    """``key``, for the weights of a version; used where no prefix cache ties the sets to old weights."""
    return (*key, "weights", version)


def _is_set(value: Any) -> bool:
    if value is None or value is False:
        return False
    try:
        return len(value) > 0
    except TypeError:
        return bool(value != 0)


def request_id(req: Req) -> str:
    """What the stores file ``req`` under."""
    # A retracted request comes back as the same object; a re-used rid does not.
    return f"{req.rid}@{id(req):x}"

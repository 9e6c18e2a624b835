"""Recorded from SGLang 0.5.23. Change an entry only after reading what changed upstream."""

from __future__ import annotations

# The release everything below was read and recorded in.
SGLANG_VERSION = "0.5.23"

_UPDATER = "sglang.srt.model_executor.model_runner_components.weight_updater.WeightUpdater"

# Functions we call, and methods we override: their parameters (upstream/check.py, signature_text).
SIGNATURES: dict[str, str] = {
    "sglang.launch_server.run_server": "server_args",
    "sglang.srt.arg_groups.choices.add_attention_backend_choices": "iterable",
    "sglang.srt.arg_groups.overrides.declare_resolution": "server_args, source, **fields",
    "sglang.srt.arg_groups.overrides.resolving_view": "server_args",
    "sglang.srt.arg_groups.resolution_hooks.register_resolution_hook": "name",
    "sglang.srt.configs.model_config.ModelConfig.get_num_kv_heads": "self, tensor_parallel_size, dcp_size=",
    "sglang.srt.configs.model_config.is_generation_model": "model_architectures, is_embedding=",
    "sglang.srt.configs.model_config.get_hybrid_layer_ids": "model_architectures, hf_text_config",
    "sglang.srt.constrained.base_grammar_backend._grammar_key_contains_nul": "key_type, key_string",
    "sglang.srt.constrained.xgrammar_backend.XGrammarGrammarBackend._sanitize_structural_format": (
        "structural_format"
    ),
    "sglang.srt.entrypoints.http_server.launch_server": (
        "server_args, init_tokenizer_manager_func=, run_scheduler_process_func=, "
        "run_detokenizer_process_func=, execute_warmup_func=, launch_callback="
    ),
    "sglang.srt.entrypoints.http_server._execute_server_warmup": "server_args",
    "sglang.srt.entrypoints.warmup.warmup": "name",
    "sglang.srt.layers.attention.attention_registry.register_attention_backend": "name",
    "sglang.srt.layers.attention.flashinfer_backend.FlashInferAttnBackend.__init__": (
        "self, model_runner, skip_prefill=, kv_indptr_buf=, kv_last_page_len_buf=, init_new_workspace="
    ),
    "sglang.srt.layers.attention.flashinfer_backend.FlashInferAttnBackend._create_decode_wrappers": (
        "self, bs, num_tokens"
    ),
    "sglang.srt.layers.attention.flashinfer_backend.FlashInferAttnBackend._get_wrapper_idx": "self, layer",
    "sglang.srt.layers.attention.flashinfer_backend.FlashInferAttnBackend.forward_decode": (
        "self, q, k, v, layer, forward_batch, save_kv_cache="
    ),
    "sglang.srt.layers.attention.flashinfer_backend.FlashInferAttnBackend.forward_extend": (
        "self, q, k, v, layer, forward_batch, save_kv_cache="
    ),
    "sglang.srt.layers.attention.flashinfer_backend.FlashInferAttnBackend.init_cuda_graph_state": (
        "self, max_bs, max_num_tokens, kv_indices_buf="
    ),
    "sglang.srt.layers.attention.flashinfer_backend.FlashInferAttnBackend.init_forward_metadata": (
        "self, forward_batch"
    ),
    "sglang.srt.layers.attention.flashinfer_backend.FlashInferAttnBackend.init_forward_metadata_out_graph": (
        "self, forward_batch, in_capture="
    ),
    "sglang.srt.layers.attention.flashinfer_backend.FlashInferIndicesUpdaterDecode.__init__": (
        "self, model_runner, attn_backend"
    ),
    "sglang.srt.layers.attention.flashinfer_backend.FlashInferIndicesUpdaterDecode.update_sliding_window": (
        "self, seq_lens, seq_lens_cpu, seq_lens_sum, decode_wrappers, encoder_lens, spec_info, "
        "fixed_split_size=, disable_split_kv=, *, plan, req_pool_indices"
    ),
    "sglang.srt.layers.attention.flashinfer_backend.FlashInferIndicesUpdaterPrefill.__init__": (
        "self, model_runner, attn_backend"
    ),
    "sglang.srt.layers.attention.flashinfer_backend.FlashInferIndicesUpdaterPrefill.update_sliding_window": (
        "self, req_pool_indices, seq_lens, seq_lens_cpu, seq_lens_sum, prefix_lens, prefill_wrappers, "
        "use_ragged, encoder_lens, spec_info, fixed_split_size=, multi_item_params=, "
        "cross_attention_custom_mask=, extend_prefix_lens_cpu=, custom_kv_indices=, *, plan"
    ),
    "sglang.srt.layers.attention.torch_native_backend.TorchNativeAttnBackend.__init__": "self, model_runner",
    "sglang.srt.layers.attention.torch_native_backend.TorchNativeAttnBackend.forward_decode": (
        "self, q, k, v, layer, forward_batch, save_kv_cache="
    ),
    "sglang.srt.layers.attention.torch_native_backend.TorchNativeAttnBackend.forward_extend": (
        "self, q, k, v, layer, forward_batch, save_kv_cache="
    ),
    "sglang.srt.layers.attention.torch_native_backend.TorchNativeAttnBackend.init_forward_metadata": (
        "self, forward_batch"
    ),
    "sglang.srt.managers.io_struct.msgpack_decode": "data",
    "sglang.srt.managers.io_struct.msgpack_encode": "obj",
    "sglang.srt.managers.schedule_batch.FINISH_ABORT.__init__": "self, message=, status_code=, err_type=",
    "sglang.srt.managers.schedule_batch.ReqKvInfo.get_evicted_seqlen": "self, component_type",
    "sglang.srt.managers.tokenizer_control_mixin.TokenizerControlMixin.flush_cache": "self, timeout_s=",
    "sglang.srt.managers.tokenizer_manager.TokenizerManager.generate_request": "self, obj, request=",
    "sglang.srt.managers.utils.is_health_check_generate_req": "recv_req",
    "sglang.srt.mem_cache.allocator.base.BaseTokenToKVPoolAllocator.__init__": (
        "self, size, page_size, dtype, device, kvcache, need_sort"
    ),
    "sglang.srt.mem_cache.allocator.base.BaseTokenToKVPoolAllocator.alloc": "self, need_size",
    "sglang.srt.mem_cache.allocator.base.BaseTokenToKVPoolAllocator.alloc_decode": "self, *args, **kwargs",
    "sglang.srt.mem_cache.allocator.base.BaseTokenToKVPoolAllocator.alloc_extend": "self, *args, **kwargs",
    "sglang.srt.mem_cache.allocator.base.BaseTokenToKVPoolAllocator.available_size": "self",
    "sglang.srt.mem_cache.allocator.base.BaseTokenToKVPoolAllocator.check_decode_capacity": (
        "self, *, num_tokens, tree_cache, requests=, spec_algorithm="
    ),
    "sglang.srt.mem_cache.allocator.base.BaseTokenToKVPoolAllocator.clear": "self",
    "sglang.srt.mem_cache.allocator.base.BaseTokenToKVPoolAllocator.free": "self, free_index",
    "sglang.srt.mem_cache.allocator.base.BaseTokenToKVPoolAllocator.free_group_end": "self",
    "sglang.srt.mem_cache.allocator.base.BaseTokenToKVPoolAllocator.free_segment": (
        "self, free_index, *, start_pos"
    ),
    "sglang.srt.mem_cache.allocator.base.BaseTokenToKVPoolAllocator.get_cpu_copy": (
        "self, indices, mamba_indices=, req_pool_index="
    ),
    "sglang.srt.mem_cache.allocator.base.BaseTokenToKVPoolAllocator.load_cpu_copy": (
        "self, kv_cache_cpu, indices, mamba_indices=, req_pool_index="
    ),
    "sglang.srt.mem_cache.allocator.base.BaseTokenToKVPoolAllocator.max_new_tokens_for_memory": (
        "self, input_tokens, max_new_tokens, *, token_capacity, sliding_window_size, chunk_size"
    ),
    "sglang.srt.mem_cache.allocator.paged.PagedTokenToKVPoolAllocator.__init__": (
        "self, size, page_size, dtype, device, kvcache, need_sort"
    ),
    "sglang.srt.mem_cache.allocator.paged.PagedTokenToKVPoolAllocator.alloc_decode": (
        "self, seq_lens, seq_lens_cpu, last_loc"
    ),
    "sglang.srt.mem_cache.allocator.paged.PagedTokenToKVPoolAllocator.alloc_extend": (
        "self, prefix_lens, prefix_lens_cpu, seq_lens, seq_lens_cpu, last_loc, "
        "extend_num_tokens, num_new_pages="
    ),
    "sglang.srt.mem_cache.allocator.paged.PagedTokenToKVPoolAllocator.free_page_ids": "self, page_ids",
    "sglang.srt.mem_cache.allocator.paged.alloc_decode_naive": (
        "seq_lens, last_loc, free_pages, out_indices, page_size, num_new_pages"
    ),
    "sglang.srt.mem_cache.allocator.paged.alloc_extend_naive": (
        "prefix_lens, seq_lens, last_loc, free_pages, out_indices, page_size, device"
    ),
    "sglang.srt.mem_cache.allocator.swa.SWATokenToKVPoolAllocator.__init__": (
        "self, size, size_swa, page_size, dtype, device, kvcache, need_sort, req_to_token_pool="
    ),
    "sglang.srt.mem_cache.allocator.swa.SWATokenToKVPoolAllocator.free_swa_segment": (
        "self, free_index, *, start_pos"
    ),
    "sglang.srt.mem_cache.allocator.swa.SWATokenToKVPoolAllocator.alloc": "self, need_size",
    "sglang.srt.mem_cache.allocator.swa.SWATokenToKVPoolAllocator.alloc_decode": (
        "self, seq_lens, seq_lens_cpu, last_loc"
    ),
    "sglang.srt.mem_cache.allocator.swa.SWATokenToKVPoolAllocator.alloc_extend": (
        "self, prefix_lens, prefix_lens_cpu, seq_lens, seq_lens_cpu, last_loc, extend_num_tokens"
    ),
    "sglang.srt.mem_cache.allocator.swa.SWATokenToKVPoolAllocator.available_size": "self",
    "sglang.srt.mem_cache.allocator.swa.SWATokenToKVPoolAllocator.clear": "self",
    "sglang.srt.mem_cache.allocator.swa.SWATokenToKVPoolAllocator.create_prefill_budget": (
        "self, tree_cache, *, num_mixed_decode_tokens="
    ),
    "sglang.srt.mem_cache.allocator.swa.SWATokenToKVPoolAllocator.evict_to_free_tokens": (
        "self, tree_cache, num_tokens"
    ),
    "sglang.srt.mem_cache.allocator.swa.SWATokenToKVPoolAllocator.new_pages_available": (
        "self, num_full_pages, num_swa_pages"
    ),
    "sglang.srt.mem_cache.allocator.swa.SWATokenToKVPoolAllocator.resize": "self, config",
    "sglang.srt.mem_cache.allocator.swa.SWATokenToKVPoolAllocator.swa_capacity_and_available": (
        "self, *, full_capacity, swa_capacity"
    ),
    "sglang.srt.mem_cache.allocator.token.TokenToKVPoolAllocator.__init__": (
        "self, size, dtype, device, kvcache, need_sort"
    ),
    "sglang.srt.mem_cache.base_prefix_cache.BasePrefixCache.evict_sliding_windows": (
        "self, req, pre_len, *, eviction_interval="
    ),
    "sglang.srt.mem_cache.base_prefix_cache.zero_match_result": "tree_cache, match_result, extra_key=",
    "sglang.srt.mem_cache.kv_cache_configurator.KVCacheConfigurator._build_hybrid_swa_kv_pool": (
        "self, *, full_max_total_num_tokens, swa_max_total_num_tokens, mha_pool_class"
    ),
    "sglang.srt.mem_cache.kv_cache_configurator.KVCacheConfigurator._build_token_to_kv_pool_allocator": (
        "self, *, sizes, token_to_kv_pool, is_dsv4_model, req_to_token_pool, token_to_kv_pool_allocator"
    ),
    "sglang.srt.mem_cache.kv_cache_configurator.KVCacheConfigurator.config_from_budget": (
        "self, budget_bytes, *, cap_tokens="
    ),
    "sglang.srt.mem_cache.memory_pool.MHATokenToKVPool._create_buffers_normal": "self",
    "sglang.srt.mem_cache.memory_pool.MHATokenToKVPool._kv_buffer_shapes": "self",
    "sglang.srt.mem_cache.memory_pool.MHATokenToKVPool.get_kv_size_bytes": "self",
    "sglang.srt.mem_cache.memory_pool.MHATokenToKVPool.set_kv_buffer": (
        "self, layer, loc_info, cache_k, cache_v, k_scale=, v_scale=, layer_id_override=, dcp_kv_mask="
    ),
    "sglang.srt.mem_cache.prefill_budget.PrefillBudget.__init__": (
        "self, allocator, tree_cache, *, num_mixed_decode_tokens="
    ),
    "sglang.srt.mem_cache.prefill_budget.PrefillBudget.available_chunk_tokens": "self, chunk_limit",
    "sglang.srt.mem_cache.prefill_budget.PrefillBudget.can_allocate_prefill": (
        "self, *, paged_input, extend_input_len, max_new_tokens, chunk_limit"
    ),
    "sglang.srt.mem_cache.prefill_budget.PrefillBudget.check_prefill": (
        "self, *, extend_input_len, total_tokens, max_new_tokens, input_tokens, "
        "swa_host_hit_length, chunk_limit, auxiliary_swa_host_hit_length="
    ),
    "sglang.srt.mem_cache.prefill_budget.PrefillBudget.fit_chunk": (
        "self, *, extend_input_len, max_new_tokens, chunk_limit"
    ),
    "sglang.srt.mem_cache.prefill_budget.PrefillBudget.has_capacity": "self",
    "sglang.srt.mem_cache.prefill_budget.PrefillBudget.reserve": (
        "self, extend_input_len, max_new_tokens, *, extra_tokens=, chunk_limit=, is_chunked_continuation="
    ),
    "sglang.srt.mem_cache.registry.create_unified_radix_cache": "ctx, *, cache_class=",
    "sglang.srt.mem_cache.registry.register_radix_cache_backend": "name, factory",
    "sglang.srt.mem_cache.registry.registered_radix_cache_backends": "",
    "sglang.srt.mem_cache.unified_radix_cache.UnifiedRadixCache.__init__": "self, params",
    "sglang.srt.mem_cache.unified_radix_cache.UnifiedRadixCache.checkpoint": "self, req, *, up_to, **kwargs",
    "sglang.srt.mem_cache.unified_radix_cache.UnifiedRadixCache.evict_for_alloc": (
        "self, params, *, allocation_reclaim_satisfied="
    ),
    "sglang.srt.mem_cache.unified_radix_cache.UnifiedRadixCache.match_prefix": "self, params",
    "sglang.srt.mem_cache.unified_radix_cache.UnifiedRadixCache.on_release": "self, req, *, checkpointed",
    "sglang.srt.mem_cache.unified_radix_cache.UnifiedRadixCache.prefix_device_indices": "self, req",
    "sglang.srt.mem_cache.unified_radix_cache.UnifiedRadixCache.release_swa": "self, lock",
    "sglang.srt.mem_cache.unified_radix_cache.UnifiedRadixCache.release_swa_prefix_lock": "self, req",
    "sglang.srt.mem_cache.unified_radix_cache.UnifiedRadixCache.reset": "self",
    "sglang.srt.mem_cache.unified_radix_cache.UnifiedRadixCache.sanity_check": "self",
    "sglang.srt.mem_cache.unified_radix_cache.UnifiedRadixCache.touch_prefix": "self, key",
    "sglang.srt.model_executor.cuda_graph_config.with_phase": "config, phase, **changes",
    "sglang.srt.model_executor.model_runner.ModelRunner.__init__": (
        "self, model_config, mem_fraction_static, gpu_id, nccl_port, server_args, is_draft_worker=, "
        "req_to_token_pool=, token_to_kv_pool_allocator=, memory_pool_config=, draft_model_idx=, "
        "draft_attention_backend=, load_group="
    ),
    "sglang.srt.model_executor.model_runner.ModelRunner.alloc_memory_pool": (
        "self, memory_pool_config=, *, draft_parallel_layout="
    ),
    "sglang.srt.model_executor.model_runner.ModelRunner.forward": (
        "self, forward_batch, skip_attn_backend_init=, pp_proxy_tensors=, reinit_attn_backend=, "
        "split_forward_count="
    ),
    "sglang.srt.model_executor.model_runner.ModelRunner.init_attention_backends": "self",
    "sglang.srt.model_executor.model_runner.ModelRunner.init_kv_cache_configurator": (
        "self, draft_parallel_layout="
    ),
    "sglang.srt.model_executor.model_runner.ModelRunner.init_weight_updater": "self",
    "sglang.srt.model_executor.model_runner.ModelRunner.load_lora_adapter": "self, lora_ref",
    "sglang.srt.model_executor.model_runner.ModelRunner.load_lora_adapter_from_tensors": (
        "self, lora_ref, tensors, config_dict, added_tokens_config="
    ),
    "sglang.srt.model_executor.model_runner.ModelRunner.load_model": "self",
    "sglang.srt.model_executor.model_runner.ModelRunner.unload_lora_adapter": "self, lora_ref",
    "sglang.srt.plugins.hook_registry.HookRegistry.apply_hooks": "",
    f"{_UPDATER}.begin_weight_update": "self",
    f"{_UPDATER}.end_weight_update": "self, *, run_post_load",
    f"{_UPDATER}.load_weights_from_distributed": "self, named_tensors",
    f"{_UPDATER}.update_weights_from_disk": (
        "self, model_path, load_format, weight_name_filter=, recapture_cuda_graph="
    ),
    f"{_UPDATER}.update_weights_from_ipc": "self, recv_req",
    f"{_UPDATER}.update_weights_from_tensor": "self, named_tensors, load_format=",
    "sglang.srt.models.registry._ModelRegistry.is_arch_supported": "self, architecture",
    "sglang.srt.plugins.hook_registry.HookRegistry.register": "target, hook, hook_type=, *, source=",
    "sglang.srt.plugins.load_plugins": "",
    "sglang.srt.runtime_context.get_exec": "",
    "sglang.srt.runtime_context.get_memory": "",
    "sglang.srt.runtime_context.get_observability": "",
    "sglang.srt.runtime_context.get_parallel": "",
    "sglang.srt.runtime_context.get_schedule": "",
    "sglang.srt.runtime_context.get_serving": "",
    "sglang.srt.server_args.ServerArgs.url": "self, port=",
    "sglang.srt.server_args.prepare_server_args": "argv",
    "sglang.srt.session.streaming_session.StreamingSession.borrowed_slot": "self, req",
    "sglang.srt.utils.get_num_new_pages": "seq_lens, page_size, prefix_lens=, decode=",
    "sglang.srt.utils.hf_transformers_utils.get_config": (
        "model, trust_remote_code, revision=, model_override_args=, model_config_parser=, **kwargs"
    ),
    "sglang.srt.utils.msgpack_utils.enc_hook": "obj",
    "sglang.srt.utils.kill_process_tree": "parent_pid, include_parent=, skip_pid=, wait_timeout=",
    "sglang.kernels.ops.kvcache.hicache.can_use_hicache_jit_kernel": (
        "*, element_size, unroll=, block_quota=, page_size="
    ),
    "sglang.kernels.ops.kvcache.hicache.transfer_hicache_all_layer": (
        "k_ptr_dst, v_ptr_dst, indices_dst, k_ptr_src, v_ptr_src, indices_src, *, "
        "kv_cache_src_stride_bytes, kv_cache_dst_stride_bytes, element_size=, unroll=, block_quota=, "
        "page_size="
    ),
    "sglang.kernels.ops.kvcache.hicache.transfer_hicache_one_layer": (
        "k_cache_dst, v_cache_dst, indices_dst, k_cache_src, v_cache_src, indices_src, *, element_dim=, "
        "unroll=, block_quota=, page_size="
    ),
    "sglang.srt.managers.cache_controller.LayerDoneCounter.wait_until": "self, threshold",
    "sglang.srt.managers.schedule_policy.PrefillAdder._lock_node": "self, last_node, *, lock_host=",
    (
        "sglang.srt.mem_cache.unified_cache.unified_tree_core_interface."
        "UnifiedTreeCoreInterface.build_hicache_transfers"
    ): (
        "self, component_type, node_id, phase, *, host_indices=, token_ids=, prefetch_tokens=, "
        "staging_tokens=, last_hash="
    ),
    "sglang.srt.mem_cache.hybrid_cache.hybrid_cache_controller.HybridCacheController.__init__": (
        "self, token_to_kv_pool_allocator, mem_pool_host, page_size, tp_group, load_cache_event, "
        "attn_cp_group=, attn_tp_group=, pp_group=, write_policy=, io_backend=, storage_backend=, "
        "prefetch_threshold=, model_name=, storage_backend_extra_config=, transfer_layer_id_max=, "
        "enable_storage_metrics=, host_memory_mode="
    ),
    "sglang.srt.mem_cache.hybrid_cache.hybrid_cache_controller.HybridCacheController._move_pool_indices": (
        "self, host_pool, host_indices, device_indices, *, write_back_jit"
    ),
    "sglang.srt.mem_cache.hybrid_cache.hybrid_pool_assembler.StackStrategy.build": (
        "self, *, cache, kvcache, params, server_args, load_cache_event, storage_backend=, "
        "storage_backend_extra_config=, prefetch_threshold=, model_name=, enable_storage_metrics="
    ),
    "sglang.srt.mem_cache.hybrid_cache.hybrid_pool_assembler.StackStrategy.matches": (
        "self, kvcache, components"
    ),
    "sglang.srt.mem_cache.hybrid_cache.hybrid_pool_assembler.build_pool_entry": (
        "*, name, host_pool, device_pool, layer_mapping, transfer_layer_id_max, is_anchor=, "
        "host_evict_fn=, device_evict_fn=, device_alloc_fn=, device_free_fn=, packed_draft_device_pools="
    ),
    "sglang.srt.mem_cache.hybrid_cache.hybrid_pool_assembler.register_stack_strategy": "strategy",
    "sglang.srt.mem_cache.pool_host.base.HostKVCache.__init__": (
        "self, *, dtype, device_capacity_tokens, size_per_token, start_layer, end_layer, "
        "host_to_device_ratio, host_size, page_size, layout, pin_memory, device, allocator_type=, "
        "dcp_size=, dcp_rank=, pool_label=, is_dummy=, host_token_capacity="
    ),
    "sglang.srt.mem_cache.pool_host.base.HostKVCache._allocate_host_buffer": "self",
    "sglang.srt.mem_cache.pool_host.base.HostKVCache.alloc": "self, need_size",
    "sglang.srt.mem_cache.pool_host.base.HostKVCache.available_size": "self",
    "sglang.srt.mem_cache.pool_host.base.HostKVCache.backup_from_device_all_layer": (
        "self, device_pool, host_indices, device_indices, io_backend"
    ),
    "sglang.srt.mem_cache.pool_host.base.HostKVCache.clear": "self",
    "sglang.srt.mem_cache.pool_host.base.HostKVCache.free": "self, indices",
    "sglang.srt.mem_cache.pool_host.base.HostKVCache.get_data_page": "self, index, flat=",
    "sglang.srt.mem_cache.pool_host.base.HostKVCache.get_dummy_flat_data_page": "self",
    "sglang.srt.mem_cache.pool_host.base.HostKVCache.get_size_per_token": "self",
    "sglang.srt.mem_cache.pool_host.base.HostKVCache.init_kv_buffer": "self",
    "sglang.srt.mem_cache.pool_host.base.HostKVCache.load_to_device_per_layer": (
        "self, device_pool, host_indices, device_indices, layer_id, io_backend, *, is_draft="
    ),
    "sglang.srt.mem_cache.pool_host.base.HostKVCache.prepare_transfer_indices": (
        "self, host_indices, device_indices, io_backend"
    ),
    "sglang.srt.mem_cache.pool_host.base.HostKVCache.set_from_flat_data_page": "self, index, data_page",
    "sglang.srt.mem_cache.pool_host.base.host_memory_budget_bytes": "requested_bytes=, *, auto_size=",
    "sglang.srt.mem_cache.pool_host.common.make_kernel_ptr_table": (
        "tensors, target_device, *, host_memory_registered"
    ),
    "sglang.srt.mem_cache.pool_host.group.HostPoolGroup.__init__": "self, entries",
    "sglang.srt.mem_cache.prefill_budget.PrefillBudget.prepare_load_back": (
        "self, *, full_tokens, extend_input_len, max_new_tokens, swa_host_hit_length, chunk_limit"
    ),
    "sglang.srt.mem_cache.unified_radix_cache.UnifiedRadixCache.attach_storage_backend": (
        "self, storage_backend, storage_backend_extra_config_json=, served_model_name=, "
        "hicache_storage_prefetch_policy=, hicache_write_policy="
    ),
    "sglang.srt.mem_cache.unified_radix_cache.UnifiedRadixCache.evict_host": (
        "self, num_tokens, component_type="
    ),
    "sglang.srt.mem_cache.unified_radix_cache.UnifiedRadixCache.init_hicache": "self, server_args, params",
    "sglang.srt.mem_cache.unified_radix_cache.UnifiedRadixCache.init_load_back": "self, params",
    "sglang.srt.mem_cache.unified_radix_cache.UnifiedRadixCache.loading_check": "self, finish_count=",
    "sglang.srt.mem_cache.unified_radix_cache.UnifiedRadixCache.ready_to_load_host_cache": "self",
    "sglang.srt.mem_cache.unified_radix_cache.UnifiedRadixCache.writing_check": (
        "self, write_back=, finish_count="
    ),
}

# Read line by line: fingerprint, and what to look for when it changes. The first four are the only ways
# stock SGLang frees a streaming slot of a running request (lt_sglang/cache/radix_static.py).
FINGERPRINTS: dict[str, tuple[str, str]] = {
    "sglang.srt.mem_cache.common.free_swa_out_of_window_slots": (
        "a919c6279eaa",
        "it frees a request's own streaming slots; evict_sliding_windows must see every call first.",
    ),
    "sglang.srt.mem_cache.common.checkpoint_kv_cache": (
        "f1c3aa916cab",
        "it runs after every chunk of a prefill; slide_window must, too, with extend_end at the chunk's end.",
    ),
    "sglang.srt.managers.scheduler.Scheduler._apply_war_barrier": (
        "cb3bed8682e8",
        "the scheduler frees slots while the prefill that reads them runs; its writes must wait for that.",
    ),
    "sglang.srt.layers.attention.base_attn_backend.AttentionBackend.shared_read_ends": (
        "73ebcb61b24e",
        "our prefills read slots and layer tables to their end: no event before it may be offered for them.",
    ),
    "sglang.srt.layers.attention.base_attn_backend.AttentionBackend.resolve_prefill_shared_read_ends": (
        "db46be437a48",
        "it says where the reads of one prefill end; see shared_read_ends.",
    ),
    "sglang.srt.managers.schedule_batch.ReqKvInfo.swa_dead_lo": (
        "0f212ea6457b",
        "a request without a sink set keeps the slots below swa_evict_floor, and whoever frees asks here.",
    ),
    "sglang.srt.mem_cache.unified_cache.components.swa.SWAComponent._maybe_split_leaf_for_swa_lock": (
        "f20e7a495178",
        "no node with streaming slots is longer than a window; memory/demand.py counts on it.",
    ),
    "sglang.srt.mem_cache.unified_cache.components.swa.SWAComponent.acquire_component_lock": (
        "928265957ca4",
        "a lock ends with the first node that covers the window; memory/demand.py counts on it.",
    ),
    "sglang.srt.managers.scheduler.Scheduler.ingest_requests": (
        "ebd93fa1e567",
        "what _poll_timeout_aborts ends on one rank must reach all ranks in the same round.",
    ),
    "sglang.srt.managers.scheduler.Scheduler.process_pending_chunked_abort": (
        "038f8c1009f8",
        "it tells the client discard_output_reason; hooks/queue_watch.py sets it.",
    ),
    "sglang.srt.entrypoints.http_server._execute_server_warmup": (
        "100abf96f0a7",
        "its paths, and ServerArgs.url in front of them, are what lt_sglang/launch/gate.py lets through.",
    ),
    "sglang.srt.mem_cache.unified_radix_cache.UnifiedRadixCache.checkpoint_into_tree": (
        "7aa223fdc9dd",
        "it frees slots behind the window and moves the tree lock; only checkpoint may call it.",
    ),
    "sglang.srt.managers.schedule_batch.ScheduleBatch.maybe_evict_swa": (
        "c4109be13929",
        "it slides windows in decode and releases prefix locks early; both must go through the tree cache.",
    ),
    "sglang.srt.managers.scheduler_components.output_streamer._GenerationStreamAccumulator.accept": (
        "36902b9dc543",
        "a request-level key of customized_info goes out at the end, or with a stream's first chunk.",
    ),
    "sglang.srt.managers.tokenizer_manager.TokenizerManager._handle_batch_request": (
        "a9202493777b",
        "n > 1 is one request ahead with no new tokens, then n copies whose sampling_params.n is n.",
    ),
    "sglang.srt.managers.schedule_policy.PrefillAdder._select_prefill_admission": (
        "3b487d815952",
        "a request longer than rem_chunk_tokens is cut there and becomes the chunked one.",
    ),
    "sglang.srt.managers.schedule_policy.PrefillAdder.add_one_req": (
        "92afd8d470c6",
        "HiCache loads after a request is selected, before memory is reserved; prefix_len has grown by then.",
    ),
    "sglang.srt.managers.cache_controller.HiCacheController.start_loading": (
        "69a13ccd4be3",
        "loads wait for what is on load_fence_stream; ready_to_load_host_cache has put the sinks on it.",
    ),
    "sglang.srt.managers.cache_controller.HiCacheController.start_writing": (
        "2fe3b7469fd7",
        "copies to the host wait for the forwards that write their rows.",
    ),
    "sglang.srt.mem_cache.l2_transfer.L2TransferEngine._submission": (
        "a28603f7ba2e",
        "prepare_transfer_indices runs on the copying stream, behind what made the slots.",
    ),
    "sglang.srt.mem_cache.hybrid_cache.hybrid_cache_controller.HybridCacheController.move_hybrid_indices": (
        "d627a00267c5",
        "_move_pool_indices makes rows of the host slots of every pool.",
    ),
    "sglang.srt.mem_cache.common.release_kv_cache": (
        "7e5e27eeb8a5",
        "it ends a request; on_release must come before its row is given to another.",
    ),
    "sglang.srt.mem_cache.allocation._prefix_kv_indices": (
        "d8b0338c9256",
        "a request takes over the layer set of its cached prefix in prefix_device_indices, so it must be "
        "called once, as the request is admitted.",
    ),
    "sglang.srt.managers.schedule_batch.Req.init_next_round_input": (
        "7be9a8b0ab22",
        "dynamic mode finds a layer set by the first tokens of the key it matches, so the key must hold the "
        "whole prompt, and only its limit be shorter.",
    ),
    "sglang.srt.managers.schedule_policy.PrefillAdder.__init__": (
        "e60f867c6cef",
        "it adds _get_running_request_total_token_offset to total_offset before it asks the budget.",
    ),
    "sglang.srt.managers.schedule_policy.PrefillAdder.add_chunked_req": (
        "d528940d72c4",
        "it asks available_chunk_tokens, then fit_chunk, and reserves; None from either parks the request.",
    ),
    "sglang.srt.managers.schedule_policy.PrefillAdder.add_one_req_ignore_eos": (
        "5e3df470acfb",
        "it asks can_allocate_prefill and reserves; its token rule is skipped where is_hybrid_swa.",
    ),
    "sglang.srt.managers.schedule_policy.PrefillAdder._update_prefill_budget": (
        "8c546f9408f5",
        "it reserves once for each request it admits, which hooks/wrappers.py has named before.",
    ),
    "sglang.srt.mem_cache.allocator.base.BaseTokenToKVPoolAllocator.check_decode_capacity": (
        "d4692942b5ec",
        "every step that may retract asks here; its verdict is why a retraction is counted.",
    ),
    "sglang.srt.mem_cache.allocator.swa.SWATokenToKVPoolAllocator.alloc": (
        "63bb6c156ea7",
        "it takes both kinds after the sizes were checked; ElasticAllocator.alloc checks them together.",
    ),
    "sglang.srt.mem_cache.allocator.swa.SWATokenToKVPoolAllocator.alloc_extend": (
        "ddc9698aaa38",
        "it asks new_pages_available for both kinds, then allocates each from the sub-allocators.",
    ),
    "sglang.srt.mem_cache.allocator.swa.SWATokenToKVPoolAllocator.alloc_decode": (
        "04d0c678f1ed",
        "it allocates from both sub-allocators, and loses slots if only one of them has room.",
    ),
    "sglang.srt.mem_cache.allocator.swa.SWATokenToKVPoolAllocator.clear": (
        "0939238b83c7",
        "it clears the sub-allocators and the mapping; sink sets and units are ElasticAllocator's to clear.",
    ),
    "sglang.srt.mem_cache.allocator.swa.SWATokenToKVPoolAllocator.free_group_end": (
        "e744f8c2e33e",
        "frees of a group reach the sub-allocators as pages; SlotAllocator gives their units back once.",
    ),
    "sglang.srt.mem_cache.allocator.swa.SWATokenToKVPoolAllocator._free_swa_pages": (
        "d9d4ca20a434",
        "its assertions read available_size and size of the streaming sub-allocator.",
    ),
    "sglang.srt.mem_cache.memory_pool.MHATokenToKVPool.set_kv_buffer": (
        "b4e7966d68d0",
        "loc_info is a tensor of slots, whose rows flat_pool.py finds, or an object with one.",
    ),
    "sglang.srt.mem_cache.unified_radix_cache.UnifiedRadixCache.evict_for_alloc": (
        "2dc5ebf7f324",
        "with allocation_reclaim_satisfied, its numbers are quotas, not availability to reach.",
    ),
    "sglang.srt.mem_cache.allocation.alloc_for_extend": (
        "bc5a0e7dffef",
        "it allocates what admission promised a batch; nothing but sink sets may be taken in between.",
    ),
    "sglang.cli.serve._run_llm": (
        "88dfe52fc8a9",
        "lt_sglang/cli/server.py starts a server as it does.",
    ),
}

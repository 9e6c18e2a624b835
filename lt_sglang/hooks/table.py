"""Every SGLang function we wrap: its name, the parameters we rely on, why, and when the hook can go.

Subclassing, registries and resolution hooks need no entry; they are checked by tests/contract.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lt_sglang.errors import LightTransferError
from lt_sglang.guard import hooks as guard
from lt_sglang.hooks import answers, wrappers
from lt_sglang.upstream.hook import Hook, applied, check_applied, check_target


def init_model_runner(original: Callable[[Any], None], worker: Any) -> None:
    """``wrappers.init_model_runner``, which looks first whether every hook is in place in this process."""
    wrappers.init_model_runner(original, worker, lambda: check_applied(SCHEDULER_HOOKS))


LAUNCHER_ONLY: dict[str, bool] = {"in_scheduler": False, "in_launcher": True}


# Left out by LT_SGLANG_GUARD=off, but for the aborts. tests/fuzz/corpus/bodies.json has what each is for.
GUARD: tuple[Hook, ...] = (
    Hook(
        target="sglang.srt.managers.tokenizer_manager.TokenizerManager.generate_request",
        parameters=("self", "obj", "request"),
        wrapper=guard.generate_request,
        why="a request does not know its engine, of which a process may have several",
        delete_when="normalize_batch_and_arguments needs no hook",
        **LAUNCHER_ONLY,
    ),
    *(
        Hook(
            target=f"sglang.srt.managers.io_struct.{kind}.normalize_batch_and_arguments",
            parameters=("self",),
            wrapper=guard.normalize_request,
            why="values of the wrong type end the scheduler, a huge n the tokenizer's process",
            delete_when="SGLang checks the types of every field, and that lists have one entry a prompt",
            **LAUNCHER_ONLY,
        )
        for kind in ("GenerateReqInput", "EmbeddingReqInput")
    ),
    Hook(
        target="sglang.srt.managers.tokenizer_manager.TokenizerManager._create_tokenized_object",
        parameters=(
            "self",
            "obj",
            "input_text",
            "input_ids",
            "input_embeds",
            "mm_inputs",
            "token_type_ids",
        ),
        wrapper=guard.create_tokenized,
        why="token ids, logprob and embedding fields that do not fit the model end the scheduler",
        delete_when="SGLang refuses the bodies of tests/fuzz/corpus/bodies.json by itself",
        **LAUNCHER_ONLY,
    ),
    *(
        Hook(
            target="sglang.srt.managers.tokenizer_control_mixin.TokenizerControlMixin."
            f"{action}_expert_distribution_record",
            parameters=("self",),
            wrapper=guard.refuse_expert_recording,
            why="a scheduler without a recorder of experts ends",
            delete_when="SGLang answers 400 where no recorder is configured",
            **LAUNCHER_ONLY,
        )
        for action in ("start", "stop", "dump")
    ),
    *(
        Hook(
            target="sglang.srt.managers.tokenizer_control_mixin.TokenizerControlMixin."
            f"{action}_memory_occupation",
            parameters=("self", "obj", "request"),
            wrapper=guard.refuse_memory_release,
            why="a scheduler without the memory saver, or with requests running, ends",
            delete_when="SGLang answers 400 there",
            **LAUNCHER_ONLY,
        )
        for action in ("release", "resume")
    ),
    Hook(
        target="fastapi.exceptions.ValidationException._format_endpoint_context",
        parameters=("self",),
        wrapper=guard.hide_source,
        why="SGLang sends the text of validation errors to clients; FastAPI puts paths of the server into it",
        delete_when="SGLang sends errors() alone",
        **LAUNCHER_ONLY,
    ),
    Hook(
        target="sglang.srt.utils.auth._get_auth_level_from_app_and_scope",
        parameters=("app", "scope"),
        wrapper=guard.auth_level,
        why="with this FastAPI, SGLang does not see the level of routes that come from a router",
        delete_when="/scale_elastic_ep answers 401 without the admin key",
        **LAUNCHER_ONLY,
    ),
    Hook(
        target="sglang.srt.constrained.base_grammar_backend.BaseGrammarBackend.set_cache",
        parameters=("self", "key", "value"),
        wrapper=guard.set_grammar,
        why="SGLang keeps every grammar that was ever asked for; a client fills the memory with them",
        delete_when="SGLang's cache of grammars has a bound",
    ),
    Hook(
        target="sglang.srt.session.session_controller.SessionReqNode.clear",
        parameters=("self", "req_dict"),
        wrapper=guard.clear_session_node,
        why="replacing a request of a session ends the scheduler: where hundreds of turns followed it, or a "
        "name was used twice",
        delete_when="SGLang walks the turns without recursion, and refuses a name that the session has",
    ),
    Hook(
        target="sglang.srt.managers.tokenizer_manager.TokenizerManager.abort_request",
        parameters=("self", "rid", "abort_all"),
        wrapper=guard.abort_family,
        why="SGLang gives the answers of a batch and of n names of its own; the client's name ends none",
        delete_when="abort_request ends what SGLang made of the name",
        **LAUNCHER_ONLY,
    ),
    Hook(
        target="sglang.srt.managers.tokenizer_manager.TokenizerManager._mark_state_dispatched",
        parameters=("self", "rid"),
        wrapper=guard.note_dispatched,
        why="an abort that comes before a request is sent to the scheduler is lost",
        delete_when="SGLang remembers it",
        **LAUNCHER_ONLY,
    ),
    Hook(
        target="sglang.srt.managers.schedule_policy.PrefillAdder.add_one_req",
        parameters=("self", "req", "has_chunked_req", "truncation_align_size"),
        wrapper=guard.admit_alike,
        why="a prefill of input_embeds and of tokens together has vectors for some only, and ends",
        delete_when="ScheduleBatch embeds the tokens of such a batch, or keeps it apart",
    ),
    Hook(
        target="sglang.srt.managers.scheduler.Scheduler.abort_request",
        parameters=("self", "recv_req"),
        wrapper=guard.abort_exactly,
        why="the scheduler ends every request whose name begins with the aborted one",
        delete_when="the scheduler compares whole names",
    ),
)

# In every process that runs a scheduler, but for those marked otherwise.
HOOKS: tuple[Hook, ...] = (
    Hook(
        target="sglang.srt.managers.tp_worker.TpModelWorker._init_model_runner",
        parameters=("self",),
        wrapper=init_model_runner,
        why="SGLang has no registry of model runners",
        delete_when="the worker asks a registry which runner to build",
    ),
    Hook(
        target="sglang.srt.managers.tp_worker.TpModelWorker.forward_batch_generation",
        parameters=(
            "self",
            "batch",
            "forward_batch",
            "pp_proxy_tensors",
            "is_verify",
            "skip_attn_backend_init",
            "capture_hidden_mode",
            "return_kv_loc_plan",
        ),
        wrapper=wrappers.forward_batch,
        why="dynamic mode plans the layers of a prefill by its requests, which ForwardBatch does not name",
        delete_when="ForwardBatch carries the requests' prompts",
    ),
    Hook(
        target="sglang.srt.mem_cache.common.checkpoint_kv_cache",
        parameters=("req", "tree_cache"),
        wrapper=wrappers.slide_after_chunk,
        why="SGLang frees what left a window only where it publishes a chunk; a prompt that it bars from the "
        "tree fills the streaming pool",
        delete_when="SGLang lets windows slide after every chunk of a prefill",
    ),
    Hook(
        target="sglang.srt.managers.scheduler.Scheduler._poll_timeout_aborts",
        parameters=("self",),
        wrapper=wrappers.abort_stuck,
        why="a request that can never be admitted, or go on, holds up all others without a word",
        delete_when="SGLang ends a request that keeps an idle scheduler waiting",
    ),
    Hook(
        target="sglang.srt.managers.scheduler_components.internal_state."
        "SchedulerInternalStateController._add_topology",
        parameters=("self", "state"),
        wrapper=wrappers.add_state,
        why="/server_info has no contributors from plug-ins",
        delete_when="get_internal_state takes contributors",
    ),
    Hook(
        target="sglang.srt.managers.scheduler_components.invariant_checker."
        "SchedulerInvariantChecker._check_all_pools",
        parameters=("self", "ps", "uncached"),
        wrapper=wrappers.check_pools,
        why="the idle leak check does not know sink rows",
        delete_when="the checker asks the tree cache for pools of its own",
    ),
    Hook(
        target="sglang.srt.managers.scheduler_components.metrics_reporter."
        "SchedulerMetricsReporter._record_scheduler_time",
        parameters=("self", "is_idle", "event_ns"),
        wrapper=wrappers.publish_metrics,
        why="a scheduler tells plug-ins neither that time passes nor that it falls idle",
        delete_when="the reporter asks plug-ins for metrics of their own",
    ),
    Hook(
        target="sglang.srt.managers.scheduler.Scheduler.get_output_streamer_class",
        parameters=("self",),
        wrapper=answers.output_streamer_class,
        why="customized_info goes out by token unless the streamer's class says it is the request's",
        delete_when="plug-ins can register an output streamer",
    ),
    Hook(
        target="sglang.srt.managers.schedule_policy.PrefillAdder._select_prefill_admission",
        parameters=(
            "self",
            "req",
            "total_tokens",
            "host_hit_length",
            "swa_host_hit_length",
            "truncation_align_size",
            "has_chunked_req",
        ),
        wrapper=wrappers.select_admission,
        why="a retracted request computes its prompt as at first, its output in a chunk of its own",
        delete_when="the tree cache may say where a request's chunk ends",
    ),
    Hook(
        target="sglang.srt.managers.schedule_policy.PrefillAdder.add_one_req_ignore_eos",
        parameters=("self", "req"),
        wrapper=wrappers.add_ignore_eos,
        why="as above, where there is no prefix cache",
        delete_when="the tree cache may say where a request's chunk ends",
    ),
    Hook(
        target="sglang.srt.managers.schedule_policy.PrefillAdder.add_chunked_req",
        parameters=("self", "req"),
        wrapper=wrappers.add_chunk,
        why="as above, for its later chunks",
        delete_when="the tree cache may say where a request's chunk ends",
    ),
    Hook(
        target="sglang.srt.managers.schedule_policy.PrefillAdder._get_running_request_total_token_offset",
        parameters=("self", "req"),
        wrapper=wrappers.running_offset,
        why="SGLang reckons what running requests will take in full layers alone, and clips long outputs",
        delete_when="an allocator's prefill budget is told which requests run",
    ),
    Hook(
        target="sglang.srt.entrypoints.openai.serving_completions.OpenAIServingCompletion."
        "_build_completion_response",
        parameters=("self", "request", "ret", "created"),
        wrapper=answers.build_response,
        why="the OpenAI routes drop a request's customized_info",
        delete_when="they return it",
        **LAUNCHER_ONLY,
    ),
    Hook(
        target="sglang.srt.entrypoints.openai.serving_completions.OpenAIServingCompletion."
        "_generate_completion_stream",
        parameters=("self", "adapted_request", "request", "raw_request"),
        wrapper=answers.stream_completion,
        why="as above, in streams",
        delete_when="they return it",
        **LAUNCHER_ONLY,
    ),
    Hook(
        target="sglang.srt.entrypoints.openai.serving_chat.OpenAIServingChat._build_chat_response",
        parameters=("self", "request", "ret", "created"),
        wrapper=answers.build_response,
        why="as above, in chats",
        delete_when="they return it",
        **LAUNCHER_ONLY,
    ),
    Hook(
        target="sglang.srt.entrypoints.openai.serving_chat.OpenAIServingChat._generate_chat_stream",
        parameters=("self", "adapted_request", "request", "raw_request"),
        wrapper=answers.stream_chat,
        why="as above, in streams of chats",
        delete_when="they return it",
        **LAUNCHER_ONLY,
    ),
    Hook(
        target="sglang.srt.distributed.device_communicators.pynccl.PyNcclCommunicator.__init__",
        parameters=("self", "group", "device", "library_path", "is_symmetric_memory_enabled", "cta_policy"),
        wrapper=wrappers.skip_pynccl_on_cpu,
        why="tensor parallelism on a CPU builds NCCL communicators and fails",
        delete_when="SGLang builds none for CPU groups",
    ),
    Hook(
        target="sglang.srt.server_args.ServerArgs.resolved_dict",
        parameters=("self",),
        wrapper=wrappers.hide_keys,
        why="/server_info, which asks for no key, and the log show the server's keys",
        delete_when="SGLang leaves api_key and admin_api_key out of them",
        in_launcher=True,
    ),
    Hook(
        target="sglang.srt.entrypoints.http_server._setup_and_run_http_server",
        parameters=(
            "server_args",
            "tokenizer_manager",
            "template_manager",
            "port_args",
            "scheduler_infos",
            "subprocess_watchdog",
            "execute_warmup_func",
            "launch_callback",
        ),
        wrapper=wrappers.run_http_server,
        why="SGLang takes requests before it is ready, and kills itself when they starve its warm-up",
        delete_when="SGLang refuses requests before /ready, or its warm-up cannot fail because of them",
        **LAUNCHER_ONLY,
    ),
    *GUARD,
)

SCHEDULER_HOOKS = tuple(hook for hook in HOOKS if hook.in_scheduler)


def install(hooks: tuple[Hook, ...] = SCHEDULER_HOOKS) -> None:
    """Register ``hooks``; raises LightTransferError if a target is gone or changed its parameters."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    problems = [problem for hook in hooks if (problem := check_target(hook))]
    if problems:
        raise LightTransferError("hooks: " + "; ".join(problems))
    for hook in hooks:
        HookRegistry.register(hook.target, hook.wrapper, HookType.AROUND)


def install_in_launcher() -> None:
    """Put the launcher's hooks in place, now that lazy layers are asked for; raises LightTransferError."""
    from sglang.srt.plugins.hook_registry import HookRegistry

    hooks = tuple(hook for hook in HOOKS if hook.in_launcher)
    install(tuple(hook for hook in hooks if not applied(hook)))
    HookRegistry.apply_hooks()
    check_applied(hooks)

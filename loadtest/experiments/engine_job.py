"""One SGLang engine in one process: start it, run tasks, write what came out.

    python -m loadtest.experiments.engine_job SPEC.json OUT.json

It takes the GPU once the file named by LT_SGLANG_HOLD exists (scheduler.py); at once without that variable.

SPEC: {"engine": {keyword arguments of sglang.Engine}, "tasks": [...]}. Tasks:

    {"kind": "score", "prompts": [[ids]], "new_tokens": n}   greedy tokens and their log-probabilities
    {"kind": "copies", "prompts": [[ids]], "new_tokens": n, "copies": c}   each alone, then as c copies
    {"kind": "answers", "prompts": [[ids]], "new_tokens": n}   greedy tokens
    {"kind": "continuations", "prompts": [[ids]], "continuations": [[ids]], "top": k}   see there; k >= 0

In dynamic mode each answer has the layers of its request under ``decision``.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

Outs = list[dict[str, Any]]


def _generate(
    engine: Any, prompts: list[list[int]], new_tokens: int, copies: int = 1, **options: Any
) -> Outs:
    """Greedy outputs; with lazy layers each is told the layers of its request."""
    sampling: dict[str, Any] = {
        "temperature": 0,
        "max_new_tokens": new_tokens,
        "ignore_eos": True,
        "n": copies,
    }
    if engine.server_args.attention_backend == "lighttransfer":
        sampling["custom_params"] = {"lighttransfer": True}
    if not prompts:
        return []
    outs = engine.generate(input_ids=prompts, sampling_params=sampling, **options)
    return outs if isinstance(outs, list) else [outs]


def _told(out: dict[str, Any]) -> dict[str, Any]:
    """What every task keeps of an output."""
    meta = out["meta_info"]
    return {
        "output_ids": out["output_ids"],
        "cached_tokens": meta["cached_tokens"],
        "decision": (meta.get("lighttransfer") or [None])[0],
        "output_logprobs": [item[0] for item in meta.get("output_token_logprobs") or []],
    }


def _score(engine: Any, task: dict[str, Any]) -> Outs:
    outs = _generate(engine, task["prompts"], task["new_tokens"], return_logprob=True, logprob_start_len=0)
    return [
        {**_told(out), "input_logprobs": [item[0] for item in out["meta_info"]["input_token_logprobs"][1:]]}
        for out in outs
    ]


def _copies(engine: Any, task: dict[str, Any]) -> Outs:
    """Each prompt's answer alone, and those of its copies; the cache is emptied between."""
    scored = []
    for prompt in task["prompts"]:
        answers: Outs = []
        for count in (1, task["copies"]):
            answers += _generate(engine, [prompt], task["new_tokens"], count, return_logprob=True)
            engine.flush_cache()
        scored.append({"copies": [_told(out) for out in answers]})
    return scored


def _answers(engine: Any, task: dict[str, Any]) -> Outs:
    outs = _generate(engine, task["prompts"], task["new_tokens"])
    engine.flush_cache()
    return [_told(out) for out in outs]


def _continuations(engine: Any, task: dict[str, Any]) -> Outs:
    """The next-token distributions along given continuations, as decoding would have them.

    The prompt alone comes first: it is cached and, in dynamic mode, decided. Prompt and continuation then hit
    the cache with the whole prompt, so the continuation's queries see lazy layers as decoded tokens do.
    """
    prompts, continuations = task["prompts"], task["continuations"]
    first = _generate(engine, prompts, 1)
    outs = _generate(
        engine,
        [p + c for p, c in zip(prompts, continuations, strict=True)],
        1,
        return_logprob=True,
        logprob_start_len=[len(prompt) for prompt in prompts],
        top_logprobs_num=task["top"],
    )
    engine.flush_cache()
    return [
        {
            "cached_tokens": out["meta_info"]["cached_tokens"],
            "decision": _told(before)["decision"],
            # Of the continuation's tokens but the first, whose distribution was computed with the prompt.
            "logprobs": [item[0] for item in out["meta_info"]["input_token_logprobs"][1:]],
            "tops": [
                [[item[1], item[0]] for item in position]
                for position in out["meta_info"].get("input_top_logprobs") or []
                if position
            ],
        }
        for before, out in zip(first, outs, strict=True)
    ]


TASKS = {"score": _score, "copies": _copies, "answers": _answers, "continuations": _continuations}


def main(spec: dict[str, Any], out: Path) -> None:
    """Run the tasks of ``spec``; what each gave is written at once, for a job that is cut off."""
    from sglang.srt.entrypoints.engine import Engine

    from loadtest.experiments.scheduler import scheduler

    class HeldEngine(Engine):
        run_scheduler_process_func = staticmethod(scheduler)

    start = time.time()
    engine = HeldEngine(**spec["engine"])
    result: dict[str, Any] = {"start_seconds": time.time() - start, "tasks": []}
    for task in spec["tasks"]:
        result["tasks"].append(TASKS[task["kind"]](engine, task))
        out.write_text(json.dumps(result))
    state = engine.get_server_info()["internal_states"][0]
    result["lighttransfer"] = state.get("lighttransfer")
    result["memory_usage"] = state.get("memory_usage")
    out.write_text(json.dumps(result))
    engine.shutdown()


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))

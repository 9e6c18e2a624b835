"""One SGLang engine in one process: start it, run tasks, write what came out.

    python engine_job.py SPEC.json OUT.json

It touches the GPU once the file named by LT_GATE exists (gate.py); at once without that variable.

SPEC: {"engine": {keyword arguments of sglang.Engine}, "tasks": [...]}. Tasks:

    {"kind": "score", "prompts": [[ids]], "new_tokens": n}   greedy tokens and their log-probabilities
    {"kind": "steady", "prompt_tokens": s, "requests": n, "new_tokens": m}   fill the memory, then decode
    {"kind": "prefill", "prompt_tokens": s, "repeats": r}    seconds of single prompts, one new token
    {"kind": "copies", "prompts": [[ids]], "new_tokens": n, "copies": c}   each alone, then as c copies
    {"kind": "answers", "prompts": [[ids]], "new_tokens": n}   greedy tokens
    {"kind": "continuations", "prompts": [[ids]], "continuations": [[ids]], "top": k}   see there; k >= 0
    {"kind": "profile", "prompt_tokens": s, "requests": n, "new_tokens": m}   GPU time by kernel (trace.py)

Prompts that are not given are random and new, so the radix cache, which stays on, never hits.
"""

from __future__ import annotations

import json
import os
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


def _prompts(rng: random.Random, count: int, tokens: int, vocab: int) -> list[list[int]]:
    return [[rng.randrange(10, vocab) for _ in range(tokens)] for _ in range(count)]


def _greedy(new_tokens: int) -> dict[str, Any]:
    return {"temperature": 0, "max_new_tokens": new_tokens, "ignore_eos": True}


def _score(engine: Any, task: dict[str, Any]) -> list[dict[str, Any]]:
    asked = {"custom_params": {"lighttransfer": True}} if task.get("decisions") else {}
    outs = engine.generate(
        input_ids=task["prompts"],
        sampling_params=_greedy(task["new_tokens"]) | asked,
        return_logprob=True,
        logprob_start_len=0,
    )
    scored = []
    for out in outs:
        meta = out["meta_info"]
        scored.append(
            {
                "output_ids": out["output_ids"],
                "input_logprobs": [item[0] for item in meta["input_token_logprobs"][1:]],
                "output_logprobs": [item[0] for item in meta["output_token_logprobs"]],
                "cached_tokens": meta["cached_tokens"],
                "decision": (meta.get("lighttransfer") or [None])[0],
            }
        )
    return scored


def _copies(engine: Any, task: dict[str, Any]) -> list[dict[str, Any]]:
    """Each prompt's answer alone, and those of its copies; the cache is emptied between."""
    scored = []
    for prompt in task["prompts"]:
        answers = []
        for count in (1, task["copies"]):
            outs = engine.generate(
                input_ids=[prompt],
                sampling_params=_greedy(task["new_tokens"]) | _asking(engine) | {"n": count},
                return_logprob=True,
            )
            engine.flush_cache()
            answers += outs if isinstance(outs, list) else [outs]
        scored.append(
            {
                "copies": [
                    {
                        "output_ids": out["output_ids"],
                        "output_logprobs": [item[0] for item in out["meta_info"]["output_token_logprobs"]],
                        "decision": (out["meta_info"].get("lighttransfer") or [None])[0],
                    }
                    for out in answers
                ]
            }
        )
    return scored


def _asking(engine: Any) -> dict[str, Any]:
    """What a sampling parameter must say to be told of a request's lazy layers; other engines ignore it."""
    on = engine.server_args.attention_backend == "lighttransfer"
    return {"custom_params": {"lighttransfer": True}} if on else {}


def _answers(engine: Any, task: dict[str, Any]) -> list[dict[str, Any]]:
    if not task["prompts"]:
        return []
    outs = engine.generate(
        input_ids=task["prompts"], sampling_params=_greedy(task["new_tokens"]) | _asking(engine)
    )
    engine.flush_cache()
    return [
        {
            "output_ids": out["output_ids"],
            "cached_tokens": out["meta_info"]["cached_tokens"],
            "decision": (out["meta_info"].get("lighttransfer") or [None])[0],
        }
        for out in outs
    ]


def _continuations(engine: Any, task: dict[str, Any]) -> list[dict[str, Any]]:
    """The next-token distributions along given continuations, as decoding would have them.

    The prompt alone comes first: it is cached and, in dynamic mode, decided. Prompt and continuation then hit
    the cache with the whole prompt, so the continuation's queries see lazy layers as decoded tokens do.
    """
    prompts, continuations = task["prompts"], task["continuations"]
    asking = _asking(engine)
    first = engine.generate(input_ids=prompts, sampling_params=_greedy(1) | asking)
    outs = engine.generate(
        input_ids=[p + c for p, c in zip(prompts, continuations, strict=True)],
        sampling_params=_greedy(1) | asking,
        return_logprob=True,
        logprob_start_len=[len(prompt) for prompt in prompts],
        top_logprobs_num=task["top"],
    )
    engine.flush_cache()
    return [
        {
            "cached_tokens": out["meta_info"]["cached_tokens"],
            "decision": (before["meta_info"].get("lighttransfer") or [None])[0],
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


def _steady(engine: Any, task: dict[str, Any], rng: random.Random, vocab: int) -> dict[str, Any]:
    prompts = _prompts(rng, task["requests"], task["prompt_tokens"], vocab)
    start = time.perf_counter()
    outs = engine.generate(input_ids=prompts, sampling_params=_greedy(task["new_tokens"]))
    seconds = time.perf_counter() - start
    tokens = sum(len(out["output_ids"]) for out in outs)
    engine.flush_cache()
    return {"seconds": seconds, "output_tokens": tokens, "requests": len(outs)}


def _prefill(engine: Any, task: dict[str, Any], rng: random.Random, vocab: int) -> list[float]:
    seconds = []
    for prompt in _prompts(rng, task["repeats"] + 1, task["prompt_tokens"], vocab):
        start = time.perf_counter()
        engine.generate(input_ids=[prompt], sampling_params=_greedy(1))
        seconds.append(time.perf_counter() - start)
    engine.flush_cache()
    return seconds[1:]


def _profile(engine: Any, task: dict[str, Any], rng: random.Random, vocab: int) -> dict[str, Any]:
    from tests.gpu import trace

    asked = _greedy(task["new_tokens"])
    warm, timed = (_prompts(rng, task["requests"], task["prompt_tokens"], vocab) for _ in range(2))
    engine.generate(input_ids=warm, sampling_params=asked)
    with tempfile.TemporaryDirectory() as folder:
        engine.start_profile(output_dir=folder, activities=["GPU"])
        engine.generate(input_ids=timed, sampling_params=asked)
        engine.stop_profile()
        found = trace.summary(next(Path(folder).rglob("*.trace.json.gz")))
    engine.flush_cache()
    return found


def main() -> None:
    spec = json.loads(Path(sys.argv[1]).read_text())
    out = Path(sys.argv[2])
    from sglang.srt.entrypoints.engine import Engine

    from tests.gpu.gate import scheduler

    class GatedEngine(Engine):
        run_scheduler_process_func = staticmethod(scheduler)

    start = time.time()
    engine = GatedEngine(**spec["engine"])
    gate = os.environ.get("LT_GATE")
    start = max(start, Path(gate).stat().st_mtime) if gate else start
    result: dict[str, Any] = {"start_seconds": time.time() - start, "tasks": []}
    rng = random.Random(spec.get("seed", 0))
    vocab = spec.get("vocab", 512)
    for task in spec["tasks"]:
        print(
            f"TASK {json.dumps({k: v for k, v in task.items() if k not in ('prompts', 'continuations')})}",
            flush=True,
        )
        value: Any
        if task["kind"] == "score":
            value = _score(engine, task)
        elif task["kind"] == "steady":
            value = _steady(engine, task, rng, vocab)
        elif task["kind"] == "answers":
            value = _answers(engine, task)
        elif task["kind"] == "copies":
            value = _copies(engine, task)
        elif task["kind"] == "continuations":
            value = _continuations(engine, task)
        elif task["kind"] == "profile":
            value = _profile(engine, task, rng, vocab)
        else:
            value = _prefill(engine, task, rng, vocab)
        print("TASK END", flush=True)
        result["tasks"].append(value)
        # A step that is cut off keeps what it measured.
        out.write_text(json.dumps(result))
    state = engine.get_server_info()["internal_states"][0]
    result["lighttransfer"] = state.get("lighttransfer")
    result["memory_usage"] = state.get("memory_usage")
    out.write_text(json.dumps(result))
    engine.shutdown()


if __name__ == "__main__":
    main()

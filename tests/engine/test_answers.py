"""What an answer holds, on the server of test_features.py: numbers, texts, other dialects, grammars."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from . import storm
from .prompts import random_prompt
from .reference import Reference
from .server import Server
from .server_flags import CHUNK
from .specs import FEATURES, LAZY_SERVERS
from .together import greedy

pytestmark = [pytest.mark.engine, pytest.mark.served_by(FEATURES)]

LAZY = LAZY_SERVERS[FEATURES]
VOCABULARY = 512
# Logits and hidden states of two float32 engines.
TOLERANCE = 2e-3
ENDS = " \t\n\r\f\v\ufffd"


@pytest.fixture(scope="module")
def reference() -> Reference:
    """The base model's."""
    return Reference(LAZY.model(), LAZY.layers, LAZY.sinks, LAZY.recent)


def test_grammar(server: Server, reference: Reference) -> None:
    """Of the tokens that a grammar allows, the reference's favourite."""
    prompt = random_prompt(400, random.Random(7))
    body = {"input_ids": prompt, "sampling_params": {**greedy(40), "regex": "[a-m]{40}", "ignore_eos": False}}
    answer = server.post("/generate", body).json()
    assert re.fullmatch("[a-m]{40}", answer["text"]), answer["text"]
    output = answer["output_ids"][:40]
    letters = sorted(set(tokens_of(server, "abcdefghijklm")))
    logits = reference.run([*prompt, *output]).logits[0, len(prompt) - 1 : -1]
    best = [letters[int(row[letters].argmax())] for row in logits]
    assert output == best[: len(output)]
    assert len(set(output)) > 3


def test_hidden_states(server: Server, reference: Reference) -> None:
    """Of every position of a prompt's last chunk, and of every new token, the normed last layer."""
    prompt = random_prompt(CHUNK + 90, random.Random(8))
    server.flush_cache()
    body = {"input_ids": prompt, "sampling_params": greedy(8), "return_hidden_states": True}
    answer = server.post("/generate", body).json()
    shown = [torch.tensor(rows) for rows in answer["meta_info"]["hidden_states"]]
    rows = torch.cat([part.reshape(-1, part.shape[-1]) for part in shown])
    tokens = [*prompt, *answer["output_ids"]]
    states = reference.run(tokens, output_hidden_states=True).hidden_states[-1][0, :-1]
    assert len(rows) == 90 + 7
    torch.testing.assert_close(rows, states[-len(rows) :], **near())


def test_log_probabilities(server: Server, reference: Reference) -> None:
    """Of a whole prompt that is cached, of named tokens, of the most likely ones, and of the output."""
    prompt = random_prompt(320, random.Random(9))
    named = [3, 200, VOCABULARY - 1]
    body = {
        "input_ids": prompt,
        "sampling_params": greedy(8),
        "return_logprob": True,
        "logprob_start_len": 0,
        "top_logprobs_num": 3,
        "token_ids_logprob": named,
    }
    server.generate(prompt, 8)
    answer = server.post("/generate", body).json()
    meta, output = answer["meta_info"], answer["output_ids"]
    expected = reference.run([*prompt, *output]).logits[0].log_softmax(-1)
    told = torch.tensor([value for value, _, _ in meta["input_token_logprobs"][1:]])
    torch.testing.assert_close(
        told, expected[:-1].gather(1, ids(prompt[1:] + output))[: len(told), 0], **near()
    )
    told = torch.tensor([value for value, _, _ in meta["output_token_logprobs"]])
    torch.testing.assert_close(told, expected[len(prompt) - 1 : -1].gather(1, ids(output))[:, 0], **near())
    told = torch.tensor([[value for value, _, _ in row] for row in meta["output_top_logprobs"]])
    torch.testing.assert_close(told, expected[len(prompt) - 1 : -1].topk(3).values, **near())
    told = torch.tensor([[value for value, _, _ in row] for row in meta["output_token_ids_logprobs"]])
    torch.testing.assert_close(told, expected[len(prompt) - 1 : -1, named], **near())


@pytest.mark.parametrize(
    "change",
    [
        {"sampling_params": {"stop_token_ids": [VOCABULARY, 10**6, -5]}},
        {"sampling_params": {"logit_bias": {"-1": 5.0}}},
        {"sampling_params": {"logit_bias": {str(VOCABULARY): 5.0}}},
    ],
    ids=str,
)
def test_tokens_out_of_the_vocabulary(change: dict[str, Any], server: Server, reference: Reference) -> None:
    """Such a request is answered or refused; the one beside it is answered, and nothing is left behind."""
    rng = random.Random(10)
    odd, plain = random_prompt(200, rng), random_prompt(200, rng)
    parameters = {**greedy(16), **change.get("sampling_params", {})}
    body = {"input_ids": odd, **change, "sampling_params": parameters}
    with ThreadPoolExecutor(2) as pool:
        beside = pool.submit(server.generate, plain, 32)
        answer = server.post("/generate", body)
        reference.compare([plain], [beside.result().tokens]).assert_equal()
    assert answer.status_code in (200, 400), answer.text
    if answer.status_code == 200:
        assert len(answer.json()["output_ids"]) == 16
    storm.assert_all_returned(server)


def test_several_answers(server: Server, reference: Reference) -> None:
    """n answers of one prompt are equal when greedy; beams, whose rows are no requests, are refused."""
    prompt = random_prompt(330, random.Random(11))
    body = {"input_ids": prompt, "sampling_params": {**greedy(24), "n": 3}}
    answers = server.post("/generate", body).json()
    reference.compare([prompt] * 3, [answer["output_ids"] for answer in answers]).assert_equal()
    refused = server.post(
        "/generate", {"input_ids": prompt, "sampling_params": {**greedy(24), "beam_width": 2}}
    )
    assert refused.status_code == 400 and "Beam search is not supported" in refused.text
    storm.assert_all_returned(server)


def test_chat_and_its_cousins(server: Server, reference: Reference) -> None:
    """Every dialect's answer is that of /generate to the prompt that the chat template makes."""
    messages = [{"role": "user", "content": "The sky is blue and the grass is green. " * 8}]
    prompt = server.post("/tokenize", {"messages": messages}).json()["tokens"]
    assert len(prompt) > 4 * LAZY.recent
    body = {"input_ids": prompt, "sampling_params": {"temperature": 0, "max_new_tokens": 24}}
    plain = server.post("/generate", body).json()
    reference.compare([prompt], [plain["output_ids"]]).assert_equal()
    asked = {"model": server.info()["served_model_name"], "temperature": 0}
    chat = server.post("/v1/chat/completions", {**asked, "messages": messages, "max_tokens": 24}).json()
    claude = server.post("/v1/messages", {**asked, "messages": messages, "max_tokens": 24}).json()
    responses = server.post("/v1/responses", {**asked, "input": messages, "max_output_tokens": 24}).json()
    text = server.post("/detokenize", {"tokens": prompt, "skip_special_tokens": False}).json()["text"]
    options = {"temperature": 0, "num_predict": 24}
    body = {"model": asked["model"], "prompt": text, "raw": True, "stream": False, "options": options}
    ollama = server.post("/api/generate", body).json()
    told = {
        "chat": chat["choices"][0]["message"]["content"],
        "messages": claude["content"][0]["text"],
        "ollama": ollama["response"],
    }
    # Blanks at the ends are cut by some, and a character whose bytes are not all there yet by others.
    whole = plain["text"].strip(ENDS)
    assert {name: text.strip(ENDS) for name, text in told.items()} == dict.fromkeys(told, whole)
    # /v1/responses counts a token more than it shows.
    begun = responses["output"][-1]["content"][0]["text"].strip(ENDS)
    assert whole.startswith(begun) and len(begun) > len(whole) / 2


def test_scores(server: Server, reference: Reference) -> None:
    """/v1/score: the share of each label in the next token's distribution."""
    rng = random.Random(13)
    query, items, labels = random_prompt(200, rng), [random_prompt(n, rng) for n in (3, 90)], [5, 50, 500]
    body = {
        "query": query,
        "items": items,
        "label_token_ids": labels,
        "apply_softmax": True,
        "model": "default",
    }
    answer = server.post("/v1/score", body)
    assert answer.status_code == 200, answer.text
    wanted = [reference.run([*query, *item]).logits[0, -1, labels].softmax(-1) for item in items]
    torch.testing.assert_close(torch.tensor(answer.json()["scores"]), torch.stack(wanted), **near())


def near() -> dict[str, float]:
    """How near two engines' log-probabilities are."""
    return {"atol": TOLERANCE, "rtol": TOLERANCE}


def ids(tokens: Sequence[int]) -> torch.Tensor:
    """As a column of indices."""
    return torch.tensor(tokens)[:, None]


def tokens_of(server: Server, text: str) -> list[int]:
    """What the server's tokenizer makes of ``text``."""
    return list(server.post("/tokenize", {"prompt": text, "add_special_tokens": False}).json()["tokens"])

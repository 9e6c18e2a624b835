"""--is-embedding in static mode: the normed state of the last token equals the reference's."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch

from . import storm
from .packed import ensure_rounded_model
from .prompts import edge_lengths, random_prompt
from .reference import Reference
from .server import Server
from .specs import EMBEDDING, LAZY_SERVERS

pytestmark = [pytest.mark.engine, pytest.mark.served_by(EMBEDDING)]

LAZY = LAZY_SERVERS[EMBEDDING]
TOLERANCE = 1e-3


def expected(reference: Reference, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
    """[prompts, hidden], float32."""
    states = [reference.run(prompt, output_hidden_states=True).hidden_states[-1][0, -1] for prompt in prompts]
    return torch.nn.functional.normalize(torch.stack(states), dim=-1)


def test_embeddings_equal_the_reference(server: Server) -> None:
    """One prompt in many lengths, cold and cached; the same vectors by /encode and /v1/embeddings."""
    rng = random.Random(1)
    lengths = [length for length in edge_lengths(LAZY.sinks, LAZY.recent, 1500) if length > 1]
    trunk = random_prompt(1200, rng)
    prompts = [random_prompt(length, rng) for length in lengths]
    prompts += [[*trunk[:keep], *random_prompt(20, rng)] for keep in (100, 700, 1200)]
    reference = Reference(LAZY.model(), LAZY.layers, LAZY.sinks, LAZY.recent)
    wanted = expected(reference, prompts)
    for _ in range(2):
        answers = server.post("/encode", {"input_ids": prompts}).json()
        told = torch.tensor([answer["embedding"] for answer in answers])
        torch.testing.assert_close(told, wanted, atol=TOLERANCE, rtol=TOLERANCE)
    answer = server.post("/v1/embeddings", {"model": "default", "input": prompts[-1]}).json()
    told = torch.tensor(answer["data"][0]["embedding"])
    torch.testing.assert_close(told, wanted[-1], atol=TOLERANCE, rtol=TOLERANCE)

    full = expected(Reference(LAZY.model(), (), LAZY.sinks, LAZY.recent), prompts[-1:])
    assert (full[0] - wanted[-1]).abs().max() > 10 * TOLERANCE, "full attention passes as well"
    storm.assert_all_returned(server)


def test_embeddings_of_clients_take_their_place(server: Server) -> None:
    """embed_overrides of /v1/embeddings stand for the placeholders, also in a prompt of several chunks."""
    rng = random.Random(2)
    placeholder, reference = 3, Reference(LAZY.model(), LAZY.layers, LAZY.sinks, LAZY.recent)
    prompt = [token for token in random_prompt(320, rng) if token != placeholder]
    places = [70, 270, len(prompt) - 5]
    for place in places:
        prompt[place] = placeholder
    vectors = [[rng.uniform(-1, 1) for _ in range(64)] for _ in places]
    body = {
        "model": "default",
        "input": [prompt],
        "embed_override_token_id": placeholder,
        "embed_overrides": [vectors],
    }
    answer = server.post("/v1/embeddings", body)
    assert answer.status_code == 200, answer.text
    embeds = reference.embeddings(prompt)
    embeds[places] = torch.tensor(vectors)
    state = reference.run(prompt, inputs_embeds=embeds[None], output_hidden_states=True).hidden_states[-1][
        0, -1
    ]
    wanted = torch.nn.functional.normalize(state, dim=-1)
    told = torch.tensor(answer.json()["data"][0]["embedding"])
    torch.testing.assert_close(told, wanted, atol=TOLERANCE, rtol=TOLERANCE)
    plain = torch.tensor(server.post("/encode", {"input_ids": prompt}).json()["embedding"])
    torch.testing.assert_close(plain, expected(reference, [prompt])[0], atol=TOLERANCE, rtol=TOLERANCE)
    assert (plain - wanted).abs().max() > 10 * TOLERANCE


def test_after_a_weight_update_nothing_old_is_read(server: Server) -> None:
    """With flush_cache, as by default: prompts that were cached give what the new weights make of them."""
    rng = random.Random(3)
    prompts = [random_prompt(length, rng) for length in (70, 300, 700)]
    before, after = LAZY.model(), ensure_rounded_model(LAZY.model())
    wanted = [
        expected(Reference(model, LAZY.layers, LAZY.sinks, LAZY.recent), prompts) for model in (before, after)
    ]
    assert (wanted[0] - wanted[1]).abs().max() > 10 * TOLERANCE
    for model, vectors in ((before, wanted[0]), (after, wanted[1]), (before, wanted[0])):
        server.post("/update_weights_from_disk", {"model_path": str(model)}).raise_for_status()
        for _ in range(2):
            answers = server.post("/encode", {"input_ids": prompts}).json()
            told = torch.tensor([answer["embedding"] for answer in answers])
            torch.testing.assert_close(told, vectors, atol=TOLERANCE, rtol=TOLERANCE)
    storm.assert_all_returned(server)

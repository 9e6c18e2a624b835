"""loadtest.experiments.long_outputs: what is sent, and what is made of answers."""

from __future__ import annotations

import json
from http.server import BaseHTTPRequestHandler
from typing import Any

import pytest

from loadtest.experiments.long_outputs import KEYS, Asked, Found, Trial, right_steps, summary
from tests.http_server import serving


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        (" 6, 7, 8, 9", 3),  # the limit may have cut the last one off
        (" 6, 7, 9, 9, 10,", 2),
        (" 7, 8,", 0),
        ("", 0),
        (" 6, 7, seven. The end", 2),
    ],
)
def test_steps_are_counted_to_the_first_wrong_one(text: str, steps: int) -> None:
    assert right_steps(text) == steps


class Letters:
    """A token is the code of a letter."""

    prefix: tuple[int, ...] = ()

    def encode(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]

    def decode(self, tokens: list[int]) -> str:
        return "".join(map(chr, tokens))


def test_a_key_is_asked_for_behind_the_model_s_own_output() -> None:
    """In the name space of its trial, so that the server finds what it decoded."""
    seen: list[dict[str, Any]] = []

    class Server(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append(body)
            asked = "".join(map(chr, body["input_ids"]))
            answer = " 6, 7, 8" if asked.endswith("5,") else " 123 indeed" if "garden?" in asked else " 9"
            reply = {
                "output_ids": list(map(ord, answer)),
                "meta_info": {"cached_tokens": len(asked) - 9},
            }
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(reply).encode())

        def log_message(self, *_: Any) -> None:
            pass

    tokenizer: Any = Letters()
    trial = Trial({"garden": "123", "school": "456"}, tuple(map(ord, "1, 2, 3, 4, 5,")))
    with serving(Server) as url:
        found = Asked(url, tokenizer, 99).trial(trial)
    assert (found.steps, found.length, found.right) == (2, 8, (True, False))
    assert found.cached == len(seen[-1]["input_ids"]) - 9
    first, *questions = seen
    assert first["sampling_params"] == {"temperature": 0, "max_new_tokens": 99}
    own = [*first["input_ids"], *map(ord, " 6, 7, 8")]
    assert all(body["input_ids"][: len(own)] == own for body in questions)
    assert {body["extra_key"] for body in seen} == {first["extra_key"]}


def test_a_summary_compares_trial_by_trial() -> None:
    full = [Found(10, 100, (True,) * KEYS, 50), Found(20, 200, (True, False, False), 60)]
    mine = [Found(12, 130, (True,) * KEYS, 40), Found(4, 150, (False,) * KEYS, 70)]
    told = summary(mine, full)
    assert (told["keys_right"], told["of"], told["cached_least"]) == (3, 6, 40)
    assert (told["longer_than_full"], told["shorter_than_full"]) == (1, 1)
    assert told["steps_median"] == 8 and told["length_mean"] == 140
    low, high = told["keys_difference"]
    assert low < 0 and high == 0
    assert summary(full, full)["keys_difference"] == [0, 0]

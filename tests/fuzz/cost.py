"""What the guard costs for one request.

    python -m tests.fuzz.cost

Prints the milliseconds of each check for prompts of 100, 8,192 and 131,072 tokens.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable
from types import SimpleNamespace

from sglang.srt.managers.io_struct import GenerateReqInput, TokenizedGenerateReqInput
from sglang.srt.sampling.sampling_params import SamplingParams

from lt_sglang.guard.requests import check_request
from lt_sglang.guard.tokenized import Limits, check_tokenized

ROUNDS = 50


def milliseconds(work: Callable[[], None]) -> float:
    """The fastest of ``ROUNDS``."""
    took = []
    for _ in range(ROUNDS):
        begun = time.perf_counter()
        work()
        took.append(time.perf_counter() - begun)
    return min(took) * 1e3


def main() -> None:
    """Print a line for each length."""
    limits = Limits(vocab_size=152_064, hidden_size=4096, takes_embeds=True)
    given = {"max_new_tokens": 200, "temperature": 0.7, "top_p": 0.9, "stop": ["\n\n"]}
    for length in (100, 8192, 131_072):
        params = SamplingParams(**given)
        params.normalize(SimpleNamespace(encode=lambda text, **more: list(text)))
        tokenized = TokenizedGenerateReqInput(
            rid="r",
            input_text="",
            input_ids=array("q", range(length)),
            input_embeds=None,
            mm_inputs=None,
            token_type_ids=None,
            sampling_params=params,
            return_logprob=False,
            logprob_start_len=-1,
            top_logprobs_num=0,
            token_ids_logprob=None,
            stream=False,
        )
        raw = GenerateReqInput(input_ids=list(range(length)), sampling_params=given)
        before = milliseconds(lambda raw=raw: check_request(raw))  # type: ignore[misc]
        after = milliseconds(lambda made=tokenized: check_tokenized(limits, None, made))  # type: ignore[misc]
        print(f"{length:>7} tokens: {before:.3f} ms as it came, {after:.3f} ms tokenized")


if __name__ == "__main__":
    main()

"""One engine, asked over SGLang's native HTTP interface."""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import requests

from lt_sglang.errors import LightTransferError
from lt_sglang.eval.divergence import Top

T = TypeVar("T")
R = TypeVar("R")
Progress = Callable[[Iterable[R], int], Iterable[R]]
TIMEOUT_SECONDS = 3600.0


def silent(results: Iterable[R], count: int) -> Iterable[R]:
    """No progress bar."""
    return results


@dataclass(frozen=True)
class Decision:
    """What a server said of a request: lazy layers, scores by layer, where they came from.

    laziness: None of a list. origin: "prompt", "prefix" (inherited with a cached prefix), "default" or
    "static".
    """

    lazy_layers: tuple[int, ...]
    laziness: tuple[float, ...] | None
    origin: str


@dataclass(frozen=True)
class Continued:
    """What an engine expects along a given continuation.

    tops: the most likely tokens at each position. logprobs: of the tokens that follow. decision: of the
    prompt.
    """

    tops: tuple[Top, ...]
    logprobs: tuple[float, ...]
    decision: Decision | None


@dataclass(frozen=True)
class Reply:
    """One turn of a conversation.

    tokens: the answer. cached: tokens of the prompt that came from the prefix cache. decision: None from
    stock SGLang.
    """

    tokens: tuple[int, ...]
    cached: int
    decision: Decision | None


class Endpoint:
    """A running server. Every method raises LightTransferError that names it if it does not answer.

    Each question has a name space of the prefix cache to itself (``extra_key``). Otherwise questions that
    begin alike, as RULER's do, would inherit the lazy layers that dynamic mode found for the first of them.

    clients: requests at a time.
    """

    def __init__(self, name: str, url: str, clients: int = 8) -> None:
        self.name = name
        self.url = url.rstrip("/")
        self.clients = clients
        self._session = requests.Session()
        # A proxy in the environment must not catch requests to this machine; a remote endpoint is named by
        # its address.
        self._session.trust_env = False
        self._run = uuid.uuid4().hex
        self._questions = itertools.count()

    def info(self) -> dict[str, Any]:
        """What /server_info says: the version, the model, and under ``lighttransfer`` the lazy layers."""
        data: dict[str, Any] = self._ask("GET", "/server_info")
        states = data.get("internal_states") or [{}]
        keep = ("model_path", "version", "attention_backend", "kv_cache_dtype", "dtype", "tp_size")
        return {**{key: data.get(key) for key in keep}, "lighttransfer": states[0].get("lighttransfer")}

    def answers(
        self, prompts: Sequence[tuple[Sequence[int], int]], progress: Progress[list[int]] = silent
    ) -> list[list[int]]:
        """Greedy tokens after each prompt: (ids, how many at most)."""

        def one(question: tuple[Sequence[int], int]) -> list[int]:
            ids, new_tokens = question
            return [int(token) for token in self._generate(ids, new_tokens)["output_ids"]]

        return self._each(one, prompts, progress)

    def decide(
        self, prompts: Sequence[Sequence[int]], progress: Progress[Decision | None] = silent
    ) -> list[Decision | None]:
        """The lazy layers of each prompt; None from a server that is not in dynamic mode."""
        return self._each(lambda ids: _decision(self._generate(ids, 1)), prompts, progress)

    def continued(
        self,
        texts: Sequence[tuple[Sequence[int], Sequence[int]]],
        top: int,
        progress: Progress[Continued] = silent,
    ) -> list[Continued]:
        """The next-token distributions along each text's continuation, as decoding it would have them.

        The prompt alone is sent first, so that it is cached and, in dynamic mode, decided. Prompt and
        continuation then hit the cache: the continuation's queries see lazy layers as decoded tokens do.
        Position i of the result is what continuation[: i + 1] predicts; there are len(continuation) - 1.

        Raises:
            LightTransferError: the prompt was not cached (the server runs without a prefix cache, or with
                too small a one).
        """
        return self._each(lambda text: self._continued(*text, top=top), texts, progress)

    def converse(
        self, conversations: Iterable[Sequence[tuple[Sequence[int], int]]], *, cold: bool = False
    ) -> Iterator[tuple[Reply, ...]]:
        """Greedy answers to each conversation's turns, in their order, as they come.

        What is not iterated over is not sent, but for the conversations that are under way.

        Args:
            conversations: turns of (ids, how many new tokens at most). A conversation's turns are sent one
                after the other and share a name space of the prefix cache.
            cold: each turn has a name space of its own, so that it finds nothing in the cache.
        """
        return self._as_they_come(lambda turns: self._converse(turns, cold), conversations)

    def _converse(self, turns: Sequence[tuple[Sequence[int], int]], cold: bool) -> tuple[Reply, ...]:
        name_space = self._name_space()
        replies = []
        for ids, new_tokens in turns:
            reply = self._generate(ids, new_tokens, extra_key=self._name_space() if cold else name_space)
            tokens = tuple(int(token) for token in reply["output_ids"])
            replies.append(Reply(tokens, int(reply["meta_info"]["cached_tokens"]), _decision(reply)))
        return tuple(replies)

    def _continued(self, prompt: Sequence[int], continuation: Sequence[int], *, top: int) -> Continued:
        name_space = self._name_space()
        first = self._generate(prompt, 1, extra_key=name_space)
        reply = self._generate(
            [*prompt, *continuation],
            1,
            extra_key=name_space,
            return_logprob=True,
            logprob_start_len=len(prompt),
            top_logprobs_num=top,
        )
        meta = reply["meta_info"]
        if meta["cached_tokens"] < len(prompt):
            raise LightTransferError(
                f"{self.name}: {meta['cached_tokens']} of a prompt's {len(prompt)} tokens were cached; "
                "divergence needs the server's prefix cache, with room for the prompts"
            )
        tops = [
            {int(token): float(value) for value, token, _ in position}
            for position in meta["input_top_logprobs"]
            if position
        ]
        values = [float(item[0]) for item in meta["input_token_logprobs"] if item[0] is not None]
        wanted = len(continuation) - 1
        if min(len(tops), len(values)) < wanted:
            raise LightTransferError(f"{self.name}: {len(tops)} of {wanted} positions came back")
        return Continued(tuple(tops[-wanted:]), tuple(values[-wanted:]), _decision(first))

    def _generate(self, ids: Sequence[int], new_tokens: int, **body: Any) -> dict[str, Any]:
        # Servers without dynamic mode ignore the custom parameter.
        parameters = {
            "temperature": 0,
            "max_new_tokens": new_tokens,
            "custom_params": {"lighttransfer": True},
        }
        reply: dict[str, Any] = self._ask(
            "POST",
            "/generate",
            json={
                "input_ids": list(ids),
                "sampling_params": parameters,
                "extra_key": self._name_space(),
                **body,
            },
        )
        reason = (reply["meta_info"].get("finish_reason") or {}).get("type")
        if reason == "abort":
            raise LightTransferError(f"{self.name}: a request was aborted: {reply['meta_info']}")
        return reply

    def _name_space(self) -> str:
        return f"{self._run}-{next(self._questions)}"

    def _each(self, ask: Callable[[T], R], questions: Sequence[T], progress: Progress[R]) -> list[R]:
        return list(progress(self._as_they_come(ask, questions), len(questions)))

    def _as_they_come(self, ask: Callable[[T], R], questions: Iterable[T]) -> Iterator[R]:
        pool = ThreadPoolExecutor(self.clients)
        try:
            yield from pool.map(ask, questions)
        finally:
            # After Ctrl-C nobody waits for what was not sent yet.
            pool.shutdown(wait=False, cancel_futures=True)

    def _ask(self, method: str, path: str, **options: Any) -> Any:
        try:
            reply = self._session.request(method, f"{self.url}{path}", timeout=TIMEOUT_SECONDS, **options)
        except requests.RequestException as error:
            raise LightTransferError(f"{self.name}: {self.url}{path} does not answer ({error})") from None
        if reply.status_code != 200:
            raise LightTransferError(f"{self.name}: {path}: {reply.status_code} {reply.text[:300]}")
        return reply.json()


def _decision(reply: dict[str, Any]) -> Decision | None:
    told = reply["meta_info"].get("lighttransfer")
    if not told or told[0] is None:
        return None
    scores = told[0]["laziness"]
    return Decision(
        tuple(told[0]["lazy_layers"]), None if scores is None else tuple(scores), str(told[0]["origin"])
    )

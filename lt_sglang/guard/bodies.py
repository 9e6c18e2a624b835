"""A body as it came, before a route parses it: its size, its text, and a chat template of the client's.

SGLang's routes parse a body of any size, and most of them tokenize all of its text before one looks at the
context length. Nobody else is answered meanwhile, and memory grows with it. ``/v1/responses`` and
``/v1/decisions`` render a chat template that the client sent, which ``/v1/chat/completions`` refuses: with
loops in loops it never ends, and nobody is answered any more.

Stands behind SGLang's check of keys, so that nothing is read of who has none.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import numpy as np

from lt_sglang import guard

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

MIB = 1 << 20
# The largest body, in MiB: a batch of 4,096 prompts of 2,000 ids has 50.
MOST_VARIABLE = "LT_SGLANG_BODY_MIB"
MOST_MIB = 64
# Characters of a body that holds one conversation, for each token of the context; and at least. Where text is
# that much longer than the context, hardly any tokenizer makes it fit.
CHARACTERS_A_TOKEN = 8
MOST_CHARACTERS = 1 << 20
# Of one that may hold many prompts. Tokenizing so much takes some seconds, in which nobody is answered.
MOST_CHARACTERS_OF_BATCH = 8 << 20
BATCHES = (
    "/generate",
    "/encode",
    "/classify",
    "/v1/completions",
    "/v1/embeddings",
    "/v1/classify",
    "/vertex_generate",
)
# Lists and objects in each other. Python ends a few hundred further on, in the middle of a route: a 500.
MOST_LEVELS = 128
# Routes that write the first of these fields in front of every entry of the second.
WRITTEN_OUT = {
    "/v1/score": ("query", "items"),
    "/v1/rerank": ("query", "documents"),
    "/v1/decisions": ("input", "questions"),
}
# What SGLang itself gives to the tokenizer that renders the template; a client's value beside it is a 500.
NOT_KWARGS = ("conversation", "messages", "tools", "tokenize", "return_dict", "add_generation_prompt")
TEMPLATES, TEMPLATE = "chat_template_kwargs", "chat_template"
# How JSON may write the characters of that name. json.loads also takes UTF-16 and UTF-32.
_ESCAPED = re.compile(rb"\\u00[2-7]")
_WIDE = (b"\xff\xfe", b"\xfe\xff")


class BodyGate:
    """ASGI middleware.

    Args:
        app: what it stands in front of.
        context_length: the longest request, in tokens.
        takes_templates: whether the operator trusts the chat templates that clients send.
        is_admins: whether a request is for an admin's route. Weights come that way; they have any size.
    """

    def __init__(
        self,
        app: Any,
        context_length: Callable[[], int],
        takes_templates: Callable[[], bool],
        is_admins: Callable[[Scope], bool],
    ) -> None:
        self.app = app
        self.context_length = context_length
        self.takes_templates = takes_templates
        self.is_admins = is_admins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on with the body that was read, or refuse it."""
        if not guard.is_on() or scope["type"] != "http" or not self._looks_at(scope):
            await self.app(scope, receive, send)
            return
        most = most_mib()
        messages = await _read(receive, most * MIB)
        if messages is None:
            await _refuse(send, 413, f"the body has more than {most} MiB, which no request may have")
            return
        body = b"".join(message.get("body", b"") for message in messages)
        path = str(scope["path"]).removeprefix(str(scope.get("root_path", "")))
        problem = await self._problem(path, body)
        if problem is not None:
            await _refuse(send, 400, problem)
            return
        del body

        async def again() -> Message:
            return messages.pop(0) if messages else await receive()

        await self.app(scope, again, send)

    def _looks_at(self, scope: Scope) -> bool:
        headers = dict(scope["headers"])
        length = headers.get(b"content-length")
        if length is None and b"transfer-encoding" not in headers:
            return False
        small = length is not None and int(length) <= MOST_CHARACTERS
        return small or not self.is_admins(scope)

    async def _problem(self, path: str, body: bytes) -> str | None:
        deep = may_be_deep(body)
        looked_into = deep or may_hold_template(body) or path in WRITTEN_OUT
        if len(body) <= MOST_CHARACTERS and not looked_into:
            return None
        most = self._most_characters(path)
        if len(body) <= most and not looked_into:
            return None
        # Beside the event loop, which answers everybody.
        value = await asyncio.get_running_loop().run_in_executor(None, _parse, body)
        if deep and levels(value) > MOST_LEVELS:
            return f"the body has more than {MOST_LEVELS} lists and objects in each other"
        if isinstance(value, dict):
            if (problem := self._template_problem(value.get(TEMPLATES))) is not None:
                return problem
            first, entries = WRITTEN_OUT.get(path, ("", ""))
            several = value.get(entries)
            size = text_length(value.get(first)) * (len(several) if isinstance(several, list) else 1)
            if size > most:
                return (
                    f"{entries}: with {first} in front of each they have {size} characters or tokens; at "
                    f"most {most} are taken at once"
                )
        # A batch of token ids needs no tokenizer; a conversation has none, and /v1/detokenize writes text.
        if len(body) > most and (size := text_length(value, tokens=path not in BATCHES)) > most:
            return (
                f"this request has {size} characters of text; at most {most} are taken at once ({path}, "
                f"context length {self.context_length()} tokens)"
            )
        return None

    def _template_problem(self, given: Any) -> str | None:
        if not isinstance(given, dict):
            return None
        if TEMPLATE in given and not self.takes_templates():
            return (
                f"{TEMPLATES}.{TEMPLATE}: templates of clients are not rendered; start the server with "
                "--trust-request-chat-template to permit it"
            )
        wrong = next((name for name in NOT_KWARGS if name in given), None)
        return None if wrong is None else f"{TEMPLATES}.{wrong}: is set by the server; leave it out"

    def _most_characters(self, path: str) -> int:
        most = max(MOST_CHARACTERS, CHARACTERS_A_TOKEN * self.context_length())
        return max(most, MOST_CHARACTERS_OF_BATCH) if path in BATCHES or path in WRITTEN_OUT else most


def put(app: Any, tokenizer_manager: Any) -> None:
    """Put a gate behind all that stands in front of SGLang's FastAPI ``app``, or will.

    That is SGLang's check of keys, and what unpacks bodies. tokenizer_manager: knows the context length.
    """
    from sglang.srt.runtime_context import get_serving
    from sglang.srt.utils import auth
    from starlette.middleware import Middleware

    app.user_middleware.append(
        Middleware(
            BodyGate,
            context_length=lambda: int(tokenizer_manager.context_len),
            takes_templates=lambda: bool(get_serving().trust_request_chat_template),
            is_admins=lambda scope: (
                auth._get_auth_level_from_app_and_scope(app, dict(scope)) != auth.AuthLevel.NORMAL
            ),
        )
    )


def most_mib() -> int:
    """The largest body in MiB, as the environment says, or else the default."""
    given = os.environ.get(MOST_VARIABLE, "").strip()
    return int(given) if given.isascii() and given.isdigit() and int(given) > 0 else MOST_MIB


def may_hold_template(body: bytes) -> bool:
    """Whether a template or kwargs for one may be among the keys of a body, however they are written."""
    return (
        TEMPLATE.encode() in body
        or _ESCAPED.search(body) is not None
        or body.startswith(_WIDE)
        or b"\0" in body[:4]
    )


def may_be_deep(body: bytes) -> bool:
    """Whether a body may have more levels than are taken; brackets in its strings count, too."""
    if body.count(b"[") + body.count(b"{") <= MOST_LEVELS:
        return False
    read = np.frombuffer(body, dtype=np.uint8)
    steps = np.zeros(len(read), dtype=np.int8)
    for opening, closing in (b"[]", b"{}"):
        steps += read == opening
        steps -= read == closing
    return int(np.cumsum(steps, dtype=np.int32).max()) > MOST_LEVELS


def levels(value: Any) -> int:
    """How many lists and objects of a value are in each other at most."""
    found, here = 0, [value]
    while here := [one for one in here if isinstance(one, dict | list)]:
        found += 1
        here = [part for one in here for part in (one.values() if isinstance(one, dict) else one)]
    return found


def text_length(value: Any, tokens: bool = True) -> int:
    """Characters of all strings in a value, names among them. tokens: and how many numbers it has."""
    found, waiting = 0, [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, str):
            found += len(one)
        elif isinstance(one, dict):
            found += sum(map(len, one))
            waiting += one.values()
        elif isinstance(one, list):
            waiting += one
        elif tokens and one is not None:
            found += 1
    return found


def _parse(body: bytes) -> Any:
    """The body's value; None for one that is no JSON, or too deep, which the route refuses."""
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return None


async def _read(receive: Receive, most: int) -> list[Message] | None:
    """All of a body, or None if it is longer. It is read to its end, since clients listen only then."""
    messages: list[Message] | None = []
    length = 0
    while True:
        message = await receive()
        length += len(message.get("body", b""))
        if length > most:
            messages = None
        if messages is not None:
            messages.append(message)
        if message["type"] != "http.request" or not message.get("more_body", False):
            return messages


async def _refuse(send: Send, status: int, sentence: str) -> None:
    error = {"message": sentence, "type": "BadRequest", "code": status}
    headers = [(b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps({"error": error}).encode()})

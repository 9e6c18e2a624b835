"""The key of SGLang's admin routes: given, made at start, or left out on purpose.

SGLang leaves /flush_cache, /abort_request, /update_weights_from_disk and others open to every client unless
it has an admin key. It takes one as an argument only, which every user of the machine can read in the list of
processes; here it travels in the environment, from where the server takes it into its arguments.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass

from lt_sglang.errors import LightTransferError
from lt_sglang.launch import sglang_args as flags
from lt_sglang.launch.sglang_args import SglangArgs

KEY_VARIABLE = "LT_SGLANG_ADMIN_API_KEY"
OPTION = "--lt-admin-routes"
CLOSED, OPEN = "key", "open"

HELP = f"""\
admin routes (/flush_cache, /abort_request, /update_weights_from_disk and others of SGLang's):
  {OPTION} key|open  key (default): they ask for --admin-api-key KEY or the variable {KEY_VARIABLE};
                            where neither is given, a key is made and shown once, if this is a terminal.
                            open: every client may use them"""


@dataclass(frozen=True)
class Admin:
    """key: the server's admin key; None leaves its admin routes open. made: made here, nobody else knows it.

    open_because: why there is no key, half a sentence; None where there is one, or no admin routes.
    """

    key: str | None = None
    made: bool = False
    open_because: str | None = None

    def lines(self, terminal: bool) -> list[str]:
        """What to tell who starts the server. terminal: whether they alone will read it."""
        if self.open_because is not None:
            return [f"SGLang's admin routes are open to every client: {self.open_because}"]
        if not self.made:
            return []
        if terminal:
            return [f"key of the admin routes, made for this start and not shown again: {self.key}"]
        return [
            "SGLang's admin routes are closed: a key was made for them, and not shown, since this output may "
            f"be kept; to use them, give one with --admin-api-key or in {KEY_VARIABLE}"
        ]


def admin_headers(key: str | None) -> dict[str, str]:
    """HTTP headers of a request to an admin route; none without a key."""
    return {"Authorization": f"Bearer {key}"} if key else {}


def take_option(argv: list[str]) -> tuple[bool, list[str]]:
    """Whether the admin routes are to stay open, and the other arguments; raises LightTransferError."""
    value, rest, given = CLOSED, [], False
    todo = iter(argv)
    for arg in todo:
        flag, equals, text = arg.partition("=")
        if flag != OPTION:
            rest.append(arg)
            continue
        if given:
            raise LightTransferError(f"{OPTION}: given twice")
        value, given = text if equals else next(todo, ""), True
        if value not in (CLOSED, OPEN):
            raise LightTransferError(f"{OPTION}: {value!r} is not one of {CLOSED}, {OPEN}")
    return value == OPEN, rest


def choose_key(args: SglangArgs, env: Mapping[str, str], leave_open: bool, has_routes: bool) -> Admin:
    """The admin key of the server that is started with ``args``; raises LightTransferError.

    has_routes: False for a server without HTTP, and for the other nodes of an engine.
    """
    given = args.get(flags.ADMIN_KEY)
    source = flags.ADMIN_KEY[0] if given is not None else KEY_VARIABLE
    key = given if given is not None else env.get(KEY_VARIABLE) or None
    if key is not None and leave_open:
        raise LightTransferError(f"{OPTION} {OPEN}: {source} gives a key for them; leave one of them out")
    if key is not None and not (key and key.isascii() and key.isprintable() and " " not in key):
        raise LightTransferError(f"{source}: a key is ASCII letters, digits and signs, without a space")
    if not has_routes:
        return Admin()
    if leave_open:
        return Admin(open_because=f"{OPTION} {OPEN}")
    if args.get_int(flags.TOKENIZER_WORKERS, 1) > 1:
        if key is not None:
            raise LightTransferError(
                f"{flags.TOKENIZER_WORKERS[0]}: SGLang checks no key with more than one; leave it or the key "
                f"({source}) out"
            )
        return Admin(open_because=f"SGLang checks no key with {flags.TOKENIZER_WORKERS[0]} above 1")
    if key is not None:
        return Admin(key)
    if args.get(flags.GRPC_PORT) is not None or env.get("SGLANG_GRPC_PORT"):
        return Admin(open_because=f"SGLang takes no key beside {flags.GRPC_PORT[0]}")
    return Admin(secrets.token_urlsafe(32), made=True)

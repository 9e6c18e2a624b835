"""Keep the gateway's engines those that the API server knows: the chart's container ``workers`` beside it.

SGLang's gateway (sglang-router 0.3.2) finds pods by a watch. It drops the event of a pod that is deleted
without grace, and never renews a watch that has fallen silent. So every few seconds this asks the API server
itself: an engine whose pod is gone is taken out, one that is ready and unknown for two rounds is put in.
Where either side does not answer nothing is changed. It is in the gateway's image and needs only the standard
library.
"""

from __future__ import annotations

import contextlib
import json
import os
import ssl
import tempfile
import time
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

SECONDS = 10.0
TIMEOUT = 10.0
SECRETS = Path("/var/run/secrets/kubernetes.io/serviceaccount")
API_SERVER = "https://kubernetes.default.svc"


def ask(method: str, url: str, key: str, body: Any = None, tls: ssl.SSLContext | None = None) -> Any:
    """The JSON that an address answers; raises OSError or ValueError."""
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, headers, method=method)
    with urllib.request.urlopen(request, timeout=TIMEOUT, context=tls) as answer:
        return json.load(answer)


def read(path: Path) -> str:
    """A file's text; empty if there is none."""
    with contextlib.suppress(FileNotFoundError):
        return path.read_text(encoding="utf-8").strip()
    return ""


def pods() -> dict[str, bool]:
    """Addresses of the engines' pods that are not ending, each with whether it is ready; raises OSError."""
    ca = SECRETS / "ca.crt"
    tls = ssl.create_default_context(cafile=str(ca)) if ca.exists() else None
    selector = urllib.parse.urlencode({"labelSelector": os.environ["SELECTOR"]})
    server = os.environ.get("API_SERVER", API_SERVER)
    url = f"{server}/api/v1/namespaces/{os.environ['NAMESPACE']}/pods?{selector}"
    found = {}
    for pod in ask("GET", url, read(SECRETS / "token"), tls=tls)["items"]:
        status = pod.get("status", {})
        if "deletionTimestamp" not in pod["metadata"] and status.get("podIP"):
            conditions = {one["type"]: one["status"] for one in status.get("conditions", [])}
            address = f"http://{status['podIP']}:{os.environ['ENGINE_PORT']}"
            found[address] = conditions.get("Ready") == "True"
    return found


def compare(unknown: set[str]) -> set[str]:
    """One round.

    Args:
        unknown: the ready pods that the gateway did not know in the last round.

    Returns:
        Those of this one.

    Raises:
        OSError, ValueError, KeyError: one of the two sides does not answer as it should.
    """
    gateway = f"{os.environ['GATEWAY']}/workers"
    # Where no Secret has it, the gateway's container has made one and put it into the folder that both have.
    key = os.environ.get("LT_ADMIN_KEY") or read(Path(tempfile.gettempdir()) / "admin-key")
    wanted = pods()
    known = {worker["url"]: worker["id"] for worker in ask("GET", gateway, key)["workers"]}
    for url in known.keys() - wanted.keys():
        print(f"no pod has {url} now: taken out", flush=True)
        ask("DELETE", f"{gateway}/{known[url]}", key)
    missing = {url for url, ready in wanted.items() if ready} - known.keys()
    for url in missing & unknown:
        print(f"the gateway does not know {url}: put in", flush=True)
        ask("POST", gateway, key, {"url": url, "api_key": os.environ.get("LT_API_KEY")})
    return missing


def main() -> None:
    """For ever."""
    unknown: set[str] = set()
    while True:
        try:
            unknown = compare(unknown)
        except (OSError, ValueError, KeyError) as error:
            # The gateway is still starting, or one of the two is away.
            print(f"not compared: {error}", flush=True)
        # The container's probes look at this file and its age.
        Path(tempfile.gettempdir(), "round").touch()
        time.sleep(float(os.environ.get("PERIOD_SECONDS", SECONDS)))


if __name__ == "__main__":
    main()

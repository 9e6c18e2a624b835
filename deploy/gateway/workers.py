"""Keep the gateway's engines those that the API server knows: the container `workers` beside the gateway.

SGLang's gateway (sglang-router 0.3.2) finds pods by a watch. It drops the event of a pod that is deleted without
grace, and never renews a watch that has fallen silent. So every few seconds this asks the API server itself: an
engine whose pod is gone is taken out, one that is ready and unknown for two rounds is put in. Where either side
does not answer nothing is changed.
"""

import json
import os
import ssl
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request

SECONDS = float(os.environ.get("PERIOD_SECONDS", "10"))
SECRETS = "/var/run/secrets/kubernetes.io/serviceaccount"
API_SERVER = os.environ.get("API_SERVER") or "https://{KUBERNETES_SERVICE_HOST}:{KUBERNETES_SERVICE_PORT}".format(
    **{"KUBERNETES_SERVICE_HOST": "kubernetes.default.svc", "KUBERNETES_SERVICE_PORT": "443", **os.environ}
)


def ask(method, url, key, body=None, tls=None):
    """The JSON that an address answers; raises OSError."""
    headers = {"Authorization": "Bearer " + key, "Content-Type": "application/json"}
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, headers, method=method)
    with urllib.request.urlopen(request, timeout=10, context=tls) as answer:
        return json.load(answer)


def read(path):
    """A file's text; empty if there is none."""
    try:
        with open(path, encoding="utf-8") as file:
            return file.read().strip()
    except FileNotFoundError:
        return ""


def pods():
    """Addresses of the engines' pods that are not ending, each with whether it is ready."""
    query = urllib.parse.urlencode({"labelSelector": os.environ["SELECTOR"]})
    ca = SECRETS + "/ca.crt"
    tls = ssl.create_default_context(cafile=ca) if os.path.exists(ca) else None
    path = "/api/v1/namespaces/" + os.environ["NAMESPACE"] + "/pods?" + query
    found = {}
    for pod in ask("GET", API_SERVER + path, read(SECRETS + "/token"), tls=tls)["items"]:
        status = pod.get("status", {})
        if "deletionTimestamp" not in pod["metadata"] and status.get("podIP"):
            conditions = {one["type"]: one["status"] for one in status.get("conditions", [])}
            url = "http://{}:{}".format(status["podIP"], os.environ["ENGINE_PORT"])
            found[url] = conditions.get("Ready") == "True"
    return found


def compare(unknown):
    """One round; ``unknown`` are the ready pods that the last one missed, and what it returns this one's."""
    gateway = os.environ["GATEWAY"] + "/workers"
    key = os.environ.get("LT_ADMIN_KEY") or read(tempfile.gettempdir() + "/admin-key")
    wanted = pods()
    known = {worker["url"]: worker["id"] for worker in ask("GET", gateway, key)["workers"]}
    for url in known.keys() - wanted.keys():
        print("no pod has", url, "now: taken out", flush=True)
        ask("DELETE", gateway + "/" + known[url], key)
    missing = {url for url, ready in wanted.items() if ready} - known.keys()
    for url in missing & unknown:
        print("the gateway does not know", url, ": put in", flush=True)
        ask("POST", gateway, key, {"url": url, "api_key": os.environ.get("LT_API_KEY")})
    return missing


def main():
    """For ever."""
    unknown = set()
    while True:
        try:
            unknown = compare(unknown)
        except (OSError, ValueError, KeyError) as error:
            # The gateway is still starting, or one of the two is away.
            print("not compared:", error, flush=True)
        time.sleep(SECONDS)


if __name__ == "__main__":
    main()

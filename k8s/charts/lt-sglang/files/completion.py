"""One completion through the gateway: what `helm test` runs."""

import json
import os
import urllib.request

body = {"model": os.environ["MODEL"], "prompt": "The capital of France is", "max_tokens": 8, "temperature": 0}
headers = {"Content-Type": "application/json"}
if "LT_API_KEY" in os.environ:
    headers["Authorization"] = "Bearer " + os.environ["LT_API_KEY"]
request = urllib.request.Request(os.environ["URL"], json.dumps(body).encode(), headers)
with urllib.request.urlopen(request, timeout=120) as answer:
    reply = json.load(answer)
assert reply["usage"]["completion_tokens"] > 0, reply
print(reply["choices"][0]["text"])

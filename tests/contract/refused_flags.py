"""What SGLang's own resolution of arguments makes of each flag that we refuse, as JSON: flag to error.

    python -m tests.contract.refused_flags FOLDER       a model's folder

A refusal that looks at a field which SGLang has rewritten by then would never fire, and say nothing.
"""

from __future__ import annotations

import json
import os
import sys

from sglang.srt.plugins import load_plugins
from sglang.srt.server_args import prepare_server_args

from lt_sglang.config import CONFIG_KEY
from lt_sglang.names import BACKEND
from lt_sglang.refusals import DYNAMIC_REFUSALS, REFUSALS

# Flags that are no switches, or need others beside them.
VALUES = {
    "--speculative-algorithm": ["NGRAM"],
    "--disaggregation-mode": ["prefill"],
    "--pp-size": ["2"],
    "--dcp-size": ["2", "--tp-size", "2"],
    "--attn-cp-size": ["2", "--tp-size", "2"],
    "--attn-dp-size": ["2", "--tp-size", "2"],
    "--enable-dp-attention": ["--dp-size", "2", "--tp-size", "2"],
    "--hicache-storage-backend": ["file"],
    "--hicache-io-backend": ["direct"],
    "--hicache-mem-layout": ["page_head"],
    "--radix-cache-backend": ["flexkv"],
    "--kv-canary": ["log"],
    "--model-impl": ["transformers"],
    "--kv-cache-dtype": ["mxfp8"],
    "--dllm-algorithm": ["LowConfidence"],
    "--lora-paths": ["a=/tmp"],
    "--swa-full-tokens-ratio": ["0.5"],
    "--swa-prefix-tails": ["4"],
    "--rl-on-policy-target": ["fsdp"],
    "--tokenizer-worker-num": ["2"],
}
OLD_SPELLINGS = ("--enable-dp-attention",)
STATIC, DYNAMIC = {"lazy_layers": "1-3"}, {"mode": "dynamic", "keep": 3}


def resolve(model: str, flag: str, config: dict[str, object]) -> str:
    """The error of a process of its own, with its type; empty if there is none."""
    reader, writer = os.pipe()
    if os.fork() == 0:
        error = ""
        given = ["--model-path", model, "--device", "cpu", "--grammar-backend", "none", "--attention-backend"]
        given += [BACKEND, "--json-model-override-args", json.dumps({CONFIG_KEY: config})]
        try:
            prepare_server_args([*given, flag, *VALUES.get(flag, [])]).resolve_once()
        except BaseException as caught:
            error = f"{type(caught).__name__}: {caught}"
        os.write(writer, error.encode()[:4000])
        os._exit(0)
    os.close(writer)
    os.wait()
    return os.read(reader, 4000).decode()


def main() -> None:
    """Print the object."""
    load_plugins()
    model = sys.argv[1]
    found = {refusal.flag: resolve(model, refusal.flag, STATIC) for refusal in REFUSALS}
    found |= {refusal.flag: resolve(model, refusal.flag, DYNAMIC) for refusal in DYNAMIC_REFUSALS}
    found |= {flag: resolve(model, flag, STATIC) for flag in OLD_SPELLINGS}
    print(json.dumps(found))


if __name__ == "__main__":
    main()

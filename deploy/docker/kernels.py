"""Compile the FlashInfer kernels that full and lazy layers run on a GPU, in bfloat16 with heads of 128.

Usage: ``python kernels.py [--list]``; needs nvcc, and no GPU. The result goes to FLASHINFER_WORKSPACE_BASE,
for the GPUs of FLASHINFER_CUDA_ARCH_LIST. A model with other heads compiles its own at its first start.
"""

from __future__ import annotations

import sys
from typing import Any

HEAD_DIM = 128


def specs() -> list[Any]:
    """What to compile: FlashInfer's own build recipes."""
    import torch
    from flashinfer.jit.attention import modules as attention
    from flashinfer.jit.cascade import gen_cascade_module
    from flashinfer.jit.norm import gen_norm_module
    from flashinfer.jit.page import gen_page_module
    from flashinfer.jit.quantization import gen_quantization_module
    from flashinfer.jit.sampling import gen_sampling_module

    bf16, index = torch.bfloat16, torch.int32
    types = (bf16, bf16, bf16, index, HEAD_DIM, HEAD_DIM, 0)
    # FA2: decode, and prefill over a prefix; with a window for lazy layers. FA3: ragged prefill on Hopper.
    return [
        *(
            attention._gen_batch_prefill_primary_module("fa2", *types, window, False, False)
            for window in (False, True)
        ),
        attention.gen_batch_prefill_module("fa3", *types, False, False, False),
        attention.gen_batch_decode_module(*types, False, False),
        gen_cascade_module(),
        gen_quantization_module(),
        gen_sampling_module(),
        gen_norm_module(),
        gen_page_module(),
    ]


def main(arguments: list[str]) -> int:
    """Compile, or print the names."""
    from flashinfer.jit import build_jit_specs

    found = specs()
    for spec in found:
        print(spec.name, flush=True)
    if "--list" not in arguments:
        build_jit_specs(found, verbose=False)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

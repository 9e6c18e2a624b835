"""Compile the FlashInfer kernels that full and lazy layers run on a GPU.

Usage: ``python kernels.py [--list] [--head-dims 64,128] [--dtypes bfloat16,float16] [--into FOLDER]``; needs
nvcc, and no GPU. They are compiled for the GPUs of FLASHINFER_CUDA_ARCH_LIST and put where FlashInfer looks
for kernels that came with it. There they are loaded as they are; in its cache they would be compiled again
wherever a path, a header or the compiler is another.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def specs(head_dims: Sequence[int] = (128,), dtypes: Sequence[str] = ("bfloat16",)) -> list[Any]:
    """What to compile: FlashInfer's own build recipes."""
    from flashinfer.jit.cascade import gen_cascade_module
    from flashinfer.jit.norm import gen_norm_module
    from flashinfer.jit.page import gen_page_module
    from flashinfer.jit.quantization import gen_quantization_module
    from flashinfer.jit.sampling import gen_sampling_module

    return [
        *(spec for dtype in dtypes for head_dim in head_dims for spec in attention_specs(head_dim, dtype)),
        gen_cascade_module(),
        gen_quantization_module(),
        gen_sampling_module(),
        gen_norm_module(),
        gen_page_module(),
    ]


def attention_specs(head_dim: int, dtype: str) -> list[Any]:
    """FA2: decode, and paged prefill; FA3 (Hopper): ragged prefill; both with a window for lazy layers."""
    import torch
    from flashinfer.jit.attention import modules as attention

    values = getattr(torch, dtype)
    types = (values, values, values, torch.int32, head_dim, head_dim, 0)
    return [
        *(
            generate(kernels, *types, window, False, False)
            for kernels, generate in (
                ("fa2", attention._gen_batch_prefill_primary_module),
                ("fa3", attention.gen_batch_prefill_module),
            )
            for window in (False, True)
        ),
        attention.gen_batch_decode_module(*types, False, False),
    ]


def main(arguments: Sequence[str]) -> int:
    """Compile, or print the names."""
    from flashinfer.jit import build_jit_specs
    from flashinfer.jit import env as places

    parser = argparse.ArgumentParser(prog="kernels.py", description=__doc__)
    parser.add_argument("--list", action="store_true", help="print the names only")
    parser.add_argument("--head-dims", default="128", help="of the models to be served")
    parser.add_argument("--dtypes", default="bfloat16", help="of the models' K and V, as torch calls them")
    parser.add_argument("--into", type=Path, default=places.FLASHINFER_AOT_DIR)
    args = parser.parse_args(arguments)
    found = specs([int(dim) for dim in args.head_dims.split(",")], args.dtypes.split(","))
    for spec in found:
        print(spec.name, flush=True)
    if args.list:
        return 0
    build_jit_specs(found, verbose=False)
    for spec in found:
        target = args.into / spec.name / f"{spec.name}.so"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(spec.jit_library_path, target)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""GPU time without launches, and FlashInfer's decode in a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch

# Query heads, KV heads and their size, as of Mistral-7B and Llama-3-8B.
HEADS, KV_HEADS, DIM = 32, 8, 128


def decode_workspace() -> torch.Tensor:
    """What FlashInfer's decode splits its work in, SGLang's size; one serves any number of wrappers."""
    return torch.empty(384 << 20, dtype=torch.uint8, device="cuda")


def graph_clock(run: Callable[[], Any], runs: int = 1, replays: int = 7) -> Callable[[], float]:
    """Capture ``runs`` calls of ``run``; the result, called, gives microseconds of one, median of replays."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [run() for _ in range(runs)]

    def once(tensors: Any = (run, kept)) -> float:  # the graph reads what ``run`` holds and gave
        times = []
        for _ in range(replays):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) * 1e3 / runs)
        return median(times)

    return once


class PagedDecode:
    """FlashInfer's tensor-core decode of bfloat16 queries, fit for a CUDA graph.

    Args:
        requests: of every plan.
        most_pages: of all lists together.
        heads: query heads, KV heads, their size.
        workspace: uint8, on the GPU.
        dtype: of K and V.
    """

    def __init__(
        self,
        requests: int,
        most_pages: int,
        heads: tuple[int, int, int],
        workspace: torch.Tensor,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        from flashinfer import BatchDecodeWithPagedKVCacheWrapper

        self._requests, self._heads, self._dtype = requests, heads, dtype
        sizes = {"indptr": requests + 1, "indices": most_pages, "last_page_len": requests}
        buffers = {
            f"paged_kv_{name}_buffer": torch.empty(size, dtype=torch.int32, device="cuda")
            for name, size in sizes.items()
        }
        self.wrapper = BatchDecodeWithPagedKVCacheWrapper(
            workspace, "NHD", use_cuda_graph=True, use_tensor_cores=True, backend="fa2", **buffers
        )

    def plan(self, lengths: Sequence[int], pages: torch.Tensor, page_size: int = 1) -> None:
        """Plan for lists of ``lengths`` full pages, one after the other in ``pages`` (int32)."""
        indptr = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
        last = torch.full((self._requests,), page_size, dtype=torch.int32)
        types = {"q_data_type": torch.bfloat16, "kv_data_type": self._dtype}
        self.wrapper.plan(indptr, pages, last, *self._heads, page_size, **types)

    def query(self) -> torch.Tensor:
        """Random queries [requests, heads, size]."""
        heads, _, size = self._heads
        return torch.randn(self._requests, heads, size, device="cuda", dtype=torch.bfloat16)

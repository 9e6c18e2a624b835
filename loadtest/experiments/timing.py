"""GPU time without launches, and FlashInfer's decode in a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch


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
    """FlashInfer's tensor-core decode at page size 1, bfloat16, fit for a CUDA graph.

    Args:
        requests: of every plan.
        most_rows: of all lists together.
        heads: query heads, KV heads, their size.
        workspace: uint8, on the GPU.
    """

    def __init__(
        self, requests: int, most_rows: int, heads: tuple[int, int, int], workspace: torch.Tensor
    ) -> None:
        from flashinfer import BatchDecodeWithPagedKVCacheWrapper

        self._requests, self._heads = requests, heads
        sizes = {"indptr": requests + 1, "indices": most_rows, "last_page_len": requests}
        buffers = {
            f"paged_kv_{name}_buffer": torch.empty(size, dtype=torch.int32, device="cuda")
            for name, size in sizes.items()
        }
        self.wrapper = BatchDecodeWithPagedKVCacheWrapper(
            workspace, "NHD", use_cuda_graph=True, use_tensor_cores=True, backend="fa2", **buffers
        )

    def plan(self, lengths: Sequence[int], rows: torch.Tensor) -> None:
        """Plan for lists of ``lengths`` rows, one after the other in ``rows`` (int32)."""
        indptr = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
        last = torch.ones(self._requests, dtype=torch.int32)
        types = {"q_data_type": torch.bfloat16, "kv_data_type": torch.bfloat16}
        self.wrapper.plan(indptr, rows, last, *self._heads, 1, **types)

    def query(self) -> torch.Tensor:
        """Random queries [requests, heads, size]."""
        heads, _, size = self._heads
        return torch.randn(self._requests, heads, size, device="cuda", dtype=torch.bfloat16)

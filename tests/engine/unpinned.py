"""A plug-in that lets SGLang's LoRA code run without a GPU: it pins host memory, which needs a CUDA driver.

Where memory lies is all that changes; what is computed from it, and cached, is not.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

import torch


def register() -> None:
    """Called by SGLang in each of its processes."""
    if torch.cuda.is_available():
        return
    for name in ("tensor", "empty", "zeros", "arange"):
        setattr(torch, name, _unpinned(getattr(torch, name)))
    torch.Tensor.pin_memory = lambda tensor, *args, **kwargs: tensor


def _unpinned(make: Any) -> Any:
    @wraps(make)
    def made(*args: Any, **kwargs: Any) -> torch.Tensor:
        kwargs.pop("pin_memory", None)
        return make(*args, **kwargs)

    return made

"""Starting kernels, and memory for their results."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor


def launch(kernel: Any, blocks: int, *arguments: Any, num_warps: int = 4, **constants: Any) -> None:
    """Run ``blocks`` programs of a kernel on the GPU of its first tensor, on its current stream.

    Args:
        kernel: a ``triton.jit`` function.
        blocks: how many; none: no launch.
        arguments: of the kernel, in order.
        num_warps: per program.
        constants: its ``tl.constexpr`` arguments.
    """
    if blocks == 0:
        return
    # Products and sums are rounded one by one, as in the other backends: the bits must not depend
    # on what a compiler fuses. Kernels that want a fused multiply-add say so (tl.fma).
    run(kernel, blocks, arguments, constants | {"num_warps": num_warps, "enable_fp_fusion": False})


def run(kernel: Any, blocks: int, arguments: Sequence[Any], options: dict[str, Any]) -> None:
    """Hand a launch to Triton (tests hand it to a simulator instead)."""
    device = next(a.device for a in arguments if isinstance(a, Tensor))
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[(blocks,)](*arguments, **options)


def new_empty(like: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    """Memory on the GPU of ``like``; its contents are undefined."""
    return like.new_empty(shape, dtype=dtype)


def ceil_div(a: int, b: int) -> int:
    """``a / b``, rounded up."""
    return -(-a // b)

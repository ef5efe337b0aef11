"""Counting the floating point operations of matrix products, attention and sampled gradients.

torch's own counter knows products and convolutions; attention on a CPU and this package's sampled
products are added here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import (
    FlopCounterMode,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

from .limits import Needs


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


def _attention_backward(grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_backward_flop_count(grad, query, key, value))


#: torch counts no operations for attention on a CPU by itself.
ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


class _SampledProducts(TorchDispatchMode):
    """Counts the operations of sampled gradients: two per token and entry."""

    total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.saft_kernels.sampled_grad.default:
            _, dy, _, _, entry_columns, _ = args
            self.total += 2 * len(dy) * entry_columns.numel()
        return func(*args, **kwargs or {})


class Flops:
    """Floating point operations of all that ran while :meth:`counting`.

    Attributes:
        dense: of products, convolutions and attention.
        sampled: of sampled gradients.
    """

    def __init__(self) -> None:
        self.dense = 0
        self.sampled = 0

    @property
    def total(self) -> int:
        """All of them."""
        return self.dense + self.sampled

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Add what runs in the block."""
        counter = FlopCounterMode(display=False, custom_mapping=ATTENTION)
        with counter, _SampledProducts() as sampled:
            yield
        self.dense += counter.get_total_flops()
        self.sampled += sampled.total

    def needs(self, moves: int, dtype: torch.dtype = torch.float32) -> Callable[[], Needs]:
        """What work needs that moves these bytes, too; known once it was checked."""
        return lambda: Needs(moves, self.total, dtype)

    def checked(
        self, check: Callable[[Callable[[], Any]], None]
    ) -> Callable[[Callable[[], Any]], None]:
        """A contender's check that counts what the contender does in it."""

        def counted(run: Callable[[], Any]) -> None:
            def counting_run() -> Any:
                with self.counting():
                    return run()

            check(counting_run)

        return counted

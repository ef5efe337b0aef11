"""What the machine can do at best, measured among the contenders: copying and multiplying.

Bytes that a piece of work must move and operations that it must do, over these two, are the floor
that stands beside its time (the roofline model; Williams, Waterman & Patterson 2009).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .outcome import first_quartile

#: Size of the buffers that are copied and of what evicts the caches, by kind of device; on a CPU
#: with a larger last-level cache, the size of that.
BUFFER_BYTES = {"cpu": 128 << 20, "cuda": 1 << 30}

#: Rows and columns of the matrices that are multiplied, by kind of device.
MATRIX_SIZE = {"cpu": 2048, "cuda": 8192}

COPY = "copy"


@dataclass(frozen=True)
class Needs:
    """What a piece of work cannot do without.

    Attributes:
        moves: bytes read and written.
        flops: floating point operations.
        dtype: whose matrix products set the rate of these.
    """

    moves: int
    flops: int = 0
    dtype: torch.dtype = torch.float32

    @property
    def arithmetic(self) -> bool:
        """Whether operations could be the limit: no machine here does one per byte or less."""
        return self.flops > self.moves


def dtype_name(dtype: torch.dtype) -> str:
    """Such as float32."""
    return str(dtype).removeprefix("torch.")


def product_name(dtype: torch.dtype) -> str:
    """What the product of matrices of this type is called among the contenders."""
    return f"{dtype_name(dtype)} matrix product"


@cache
def buffer_bytes(device: torch.device) -> int:
    """Size of each of :func:`buffers`: what the caches hold, or more."""
    least = BUFFER_BYTES[device.type]
    return max(least, last_level_cache()) if device.type == "cpu" else least


def last_level_cache(processors: Path = Path("/sys/devices/system/cpu")) -> int:
    """Bytes of all caches of the last level together; 0 where the system does not tell."""
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    sizes = {}
    for folder in processors.glob("cpu[0-9]*/cache/index*"):
        level, size, shared = (
            (folder / name).read_text().strip() for name in ("level", "size", "shared_cpu_list")
        )
        sizes[int(level), shared] = int(size[:-1]) * units[size[-1]]
    last = max((level for level, _ in sizes), default=0)
    return sum(size for (level, _), size in sizes.items() if level == last)


@cache
def buffers(device: torch.device) -> tuple[Tensor, Tensor]:
    """What is copied, and what evicts the caches."""
    elements = buffer_bytes(device) // 4
    source, target = (torch.full((elements,), float(i), device=device) for i in range(2))
    return source, target


@cache
def matrices(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What is multiplied."""
    size = MATRIX_SIZE[device.type]
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(size, size, generator=generator).to(device, dtype) for _ in range(2))
    return a, b


def copy_once(device: torch.device) -> Callable[[], Tensor]:
    """A copy of :func:`buffers`."""
    source, target = buffers(device)
    return lambda: target.copy_(source)


def multiply_once(device: torch.device, dtype: torch.dtype) -> Callable[[], Tensor]:
    """A product of :func:`matrices`."""
    a, b = matrices(device, dtype)
    return lambda: a @ b


def copied(device: torch.device) -> bool:
    """Whether the copy equals its source."""
    return torch.equal(*buffers(device))


def multiplied(product: Tensor) -> bool:
    """Whether the first rows of a product are what double precision makes them."""
    a, b = matrices(product.device, product.dtype)
    expected = a[:4].double() @ b.double()
    error = (product[:4].double() - expected).abs().max()
    return bool(error <= 4 * torch.finfo(product.dtype).eps * len(a) ** 0.5 * expected.abs().max())


def bandwidth(seconds: Sequence[float], device: torch.device) -> float:
    """Bytes read and written per second, from times of copies."""
    return 2 * buffer_bytes(device) / first_quartile(seconds)


def rate(seconds: Sequence[float], device: torch.device) -> float:
    """Floating point operations per second, from times of products."""
    return 2 * MATRIX_SIZE[device.type] ** 3 / first_quartile(seconds)


def evict_caches(device: torch.device = torch.device("cpu")) -> Any:  # noqa: B008 - immutable
    """Fill every cache with something else, so that the next run starts cold."""
    source, target = buffers(device)
    return target.copy_(source)

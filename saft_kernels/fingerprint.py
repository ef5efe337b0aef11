"""Recognising a tensor by its content: dtype, shape and every byte.

A fingerprint is an XXH3 hash of 128 bits (of the ``xxhash`` package), in hexadecimal. It does not
depend on the memory layout or the device. Two tensors that differ have the same one with a
probability of 2**-128, unless somebody makes them so: it tells mistakes, not malice.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
import xxhash
from torch import Tensor

#: Elements that are copied at most at a time, of tensors that are not contiguous or not on the CPU.
BLOCK = 1 << 20

_LENGTH = 32  # hexadecimal digits


def fingerprint(tensor: Tensor) -> str:
    """The fingerprint of one tensor.

    Args:
        tensor: any dtype, shape, strides and device but ``meta``.

    Returns:
        32 hexadecimal digits, from dtype, shape and the elements' bytes in logical row-major order
        (little-endian).
    """
    digest = xxhash.xxh3_128(json.dumps([str(tensor.dtype), list(tensor.shape)]).encode())
    for block in _blocks(tensor.detach()):
        if block.stride() != (1,):  # of one element too: viewing as bytes insists on it
            block = block.clone(memory_format=torch.contiguous_format)
        digest.update(block.cpu().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def fingerprints(tensors: Iterable[Tensor]) -> list[str]:
    """The fingerprints of many tensors, several at a time (hashing runs outside Python's lock)."""
    tensors = list(tensors)
    for device in {tensor.device for tensor in tensors if tensor.is_cuda}:
        # The threads read on a stream of their own, which waits for no other.
        torch.cuda.current_stream(device).synchronize()
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(fingerprint, tensors))


def is_fingerprint(text: object) -> bool:
    """Whether ``text`` has the form of a fingerprint."""
    return isinstance(text, str) and len(text) == _LENGTH and set(text) <= set("0123456789abcdef")


def _blocks(tensor: Tensor) -> Iterator[Tensor]:
    """The elements in row-major order, as contiguous vectors of bounded size."""
    if tensor.is_contiguous():
        yield from tensor.reshape(-1).split(BLOCK)
    elif tensor[0].numel() > BLOCK:
        for part in tensor:
            yield from _blocks(part)
    else:
        rows = max(1, BLOCK // max(1, tensor[0].numel()))
        for part in tensor.split(rows):
            yield part.reshape(-1)


def same_bits(a: Tensor, b: Tensor) -> Tensor:
    """True where two tensors of one shape and dtype agree bit for bit (NaN with NaN)."""
    return _bits(a.detach()) == _bits(b.detach())


def count_different_bits(a: Tensor, b: Tensor) -> int:
    """How many elements differ in some bit; ``b`` may be on another device."""
    if not a.dim() or (a.is_contiguous() and b.is_contiguous()):  # rows may be of any length
        a, b = a.reshape(-1), b.reshape(-1)
    rows = max(1, BLOCK // max(1, a[:1].numel()))
    return sum(
        int((~same_bits(part, other.to(part.device))).sum())
        for part, other in zip(a.detach().split(rows), b.detach().split(rows), strict=True)
    )


def _bits(tensor: Tensor) -> Tensor:
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.view(integers[tensor.element_size()])

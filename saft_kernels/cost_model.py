"""Which way to a layer's weight gradient is the fastest: the dense product, or one of two sampled.

On a CPU the model is one measured number, :data:`CROWDED`. On a GPU it is the formulas below,
fitted to what ``python -m bench gpu gpu_choices`` measured on an H200 (docs/gpu.md). Only ratios of
its times are used.

For T tokens, a weight [O, I], n selected entries in R rows and C columns, and b bytes per number,
seconds are::

    dense     T max((O + I) b / memory, 2 O I / rate)
    packing   T (min(I b, 32 C) + C b) / packing     x in, whole or in sectors; columns out
    reading   T (min(O b, 32 R) + C b) / memory      dy and columns, by either sampled way
    entries   T n b / entries                        every entry reads its column, from L2
    product   T tiles 128 b / product                tiles of 64 x 64 used rows and columns

and the sampled way takes ``packing + reading + min(entries, product)``. Rates are bytes per second,
for the dense product operations per second. What tensor cores could do is no part of it: tiles are
bound by the loads of their operands, in fp32 and in bf16 at the same bytes per second.

**Entries or product.** Both read the same from memory, so that n against the number of tiles
decides, whatever the type: tiles are taken where more than 225 entries lie in one of them on
average, from 6% of the used places on. The choice changes the order of sums, so it depends on sizes
alone, never on the GPU. On the H200 it takes the faster way at all 20 masks that were measured.

**A planned transposition was not built.** dy could be packed as x is, ``[T / 16, R, 16]``, once per
backward, to save load instructions. It would cost R T b written and read again, as much as reading
dy a second and a third time, and load instructions are not what entries are bound by.

**Sampled or dense.** The sampled ways also save memory: the dense one keeps the whole input for
backward, not C columns of it, and makes a gradient of the size of the weight. That is taken to be
worth a factor :data:`MEMORY_IS_WORTH` of time, unless most of the weight is selected. At attach
time T is not known; the model takes :data:`TOKENS`, and adds what launches cost, which is all the
cost of small layers. For 3072 x 768 in bf16 the border is at 0.9% of a uniform mask (the dense
product, very fast in bf16, takes less time from 0.2% on), in fp32 at one half. The type is the one
that the product is computed in where the weight is used: autocast's, if it is on there.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

#: On a CPU, the share of selected entries from which on the dense product is used: the cost model
#: there, and all of it. With AVX-512 the sampled product of a uniform mask was still faster at 10%
#: in fp32, and more so in bf16 or where entries share rows (``python -m bench run sampled_grad``).
#: A third way, the dense product over the used rows and columns only, lost to the sampled one on
#: masks of real models (``real_masks``).
CROWDED = 0.1

#: How many times faster the dense product must be on a GPU to make up for the memory it takes.
MEMORY_IS_WORTH = 2.0

#: A batch, to weigh what is paid once: CLIP's 164 images of 50 tokens, or 106 texts of 77.
TOKENS = 8192

# Measured on an H200, in bytes per second.
_MEMORY = 4.1e12
_PACKING = 2.0e12
_ENTRIES = 3.7e12
_PRODUCT = 2.1e12

# The same, in floating-point operations per second of torch's products, without TF32. That of fp16
# was not measured and is taken to be bf16's; that of fp64 is three quarters of the datasheet's.
_RATE = {
    torch.bfloat16: 690e12,
    torch.float16: 690e12,
    torch.float32: 50e12,
    torch.float64: 25e12,
}

_LAUNCH = 4e-6  # seconds of a kernel that does nearly nothing, from launch to launch
_SECTOR = 32  # bytes that an access to memory moves at least
_TILE = 64  # rows, and columns; mirrors kTile of csrc/cuda/sampled_product_kernel.cu


@dataclass(frozen=True)
class Layer:
    """A weight and its selected entries.

    Attributes:
        height: O, rows.
        width: I, columns.
        n: selected entries.
        rows: R, rows that hold one.
        columns: C, columns that hold one.
        dtype: in which the layer computes.
    """

    height: int
    width: int
    n: int
    rows: int
    columns: int
    dtype: torch.dtype


def prefers_product(n: int, rows: int, columns: int, dtype: torch.dtype) -> bool:
    """Whether tiles of the product are the faster sampled way on a GPU, for entries so laid out."""
    if dtype not in _RATE:
        return False
    return _product_seconds(rows, columns, dtype) < _entries_seconds(n, dtype)


def is_crowded(layer: Layer) -> bool:
    """Whether the dense product is to be used on a GPU."""
    if layer.dtype not in _RATE:
        return False
    most = 2 * layer.n > layer.height * layer.width  # then the sampled ways save no memory
    return dense_seconds(layer) * (1.0 if most else MEMORY_IS_WORTH) < sampled_seconds(layer)


def dense_seconds(layer: Layer, tokens: int = TOKENS) -> float:
    """The dense product and the gathering of its entries."""
    size = layer.dtype.itemsize
    memory = (layer.height + layer.width) * size / _MEMORY
    arithmetic = 2 * layer.height * layer.width / _RATE[layer.dtype]
    gradient = 2 * layer.height * layer.width * size / _MEMORY  # written, and read at most once
    return tokens * max(memory, arithmetic) + gradient + 2 * _LAUNCH


def sampled_seconds(layer: Layer, tokens: int = TOKENS) -> float:
    """Packing and the faster of the two sampled ways."""
    size = layer.dtype.itemsize
    columns = layer.columns * size
    packing = (_bytes_read(layer.width, layer.columns, size) + columns) / _PACKING
    reading = (_bytes_read(layer.height, layer.rows, size) + columns) / _MEMORY
    inner = min(
        _entries_seconds(layer.n, layer.dtype),
        _product_seconds(layer.rows, layer.columns, layer.dtype),
    )
    return tokens * (packing + reading + inner) + 3 * _LAUNCH


def _bytes_read(features: int, used: int, size: int) -> int:
    """Per token, of its used features: all of them in order, or sectors."""
    return min(features * size, used * _SECTOR)


def _entries_seconds(n: int, dtype: torch.dtype) -> float:
    """Per token, without what comes from memory."""
    return n * dtype.itemsize / _ENTRIES


def _product_seconds(rows: int, columns: int, dtype: torch.dtype) -> float:
    """Per token, without what comes from memory."""
    tiles = -(-rows // _TILE) * -(-columns // _TILE)
    return tiles * 2 * _TILE * dtype.itemsize / _PRODUCT

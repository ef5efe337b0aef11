"""Which way to a layer's weight gradient is the fastest: the dense product, or one of two sampled.

On a CPU the model is one measured number, :data:`CROWDED`. On a GPU it is the formulas below.
Nothing was measured on a GPU: every time here is a prediction, and only ratios of them are used.

For T tokens, a weight [O, I], n selected entries in R rows and C columns, and b bytes per number,
seconds per token are, each the larger of its parts, since memory, caches and arithmetic work side
by side::

    dense     memory      (O + I) b / streamed
              arithmetic  2 O I / (share of torch * peak)
    packing   memory      min(I b / streamed, 32 C / scattered) + C b / streamed
                                                              of x in, columns out
    entries   memory      min(O b / streamed, 32 R / scattered) + C b / streamed
                                                              of dy, columns
              L2          n b / L2                            every entry reads its column
              loads       n (1 + b / 4) / 32 / LOADS          of dy, and 128 bytes of columns each
    product   memory      as entries
              L2          tiles 128 b / L2                    of 64 x 64 used rows and columns
              arithmetic  2 * 64 * 64 tiles / (0.3 peak)

The numbers are those of :mod:`saft_kernels.machine` for an H100: bytes per second in order
(streamed) and in sectors of 32 bytes that lie apart (scattered); peaks without sparsity, of tensor
cores for bf16 and fp16, of plain units for fp32, whose factors tensor cores would round, and for
fp64; and torch's share of them. Ours is taken to be 0.3: the operands of our tiles are gathered.

**Entries or product.** Both move the same bytes from memory, so L2, loads and arithmetic decide.
In bf16 the product is the faster one from a share of about 3% of the R C used places on, in fp32
from 14%. The choice changes the order of sums, so it depends on sizes alone, never on the GPU: an
A100, whose tensor cores are slower against its caches, would place the border at about 4%, and near
a border the two cost nearly the same.

**A planned transposition was not built.** dy could be packed as x is, ``[T / 16, R, 16]``, once per
backward. That saves load instructions: 16 loads of a warp for 16 tokens become 2 (bf16). It costs
R T b written and read again, and entries of masks of real models are bound by memory: for
3072 x 768, one entry in a thousand and 12,800 tokens in bf16, 42 MB written and 42 MB read beside
the 97 MB that are moved now, to save loads that take 6 of 34 us and run beside the memory. Where
loads would be the bound, entries share rows, and the product is faster than either.

**Sampled or dense.** The sampled ways also save memory: the dense one keeps the whole input for
backward, not C columns of it, and makes a gradient of the size of the weight. That is taken to be
worth a factor :data:`MEMORY_IS_WORTH` of time, unless most of the weight is selected. At attach
time T is not known; the model takes :data:`TOKENS`, and adds what launches cost, which is all the
cost of small layers. For 3072 x 768 in bf16 the border is at about 2% of a uniform mask. The type
is the one that the product is computed in where the weight is used: autocast's, if it is on there.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from saft_kernels.machine import H100, LAUNCH, MATRIX, PLAIN, SCATTERED, STREAMED

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

_STREAM = STREAMED * H100.bandwidth  # bytes/s
_SECTORS = SCATTERED * H100.bandwidth  # bytes/s
_L2 = 5.5e12  # bytes/s
_LOADS = 132 * 1.7e9  # load instructions of a warp, or 128 bytes out of an L1 cache, per second
_TILE = 64  # rows, and columns; mirrors kTile of csrc/cuda/sampled_product_kernel.cu

_PEAK = {
    torch.bfloat16: H100.bf16,  # floating-point operations/s
    torch.float16: H100.bf16,
    torch.float32: H100.fp32,
    torch.float64: 34e12,
}
_SHARE_OF_TORCH = {dtype: MATRIX if dtype.itemsize == 2 else PLAIN for dtype in _PEAK}
_SHARE_OF_TILES = 0.3


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
    if dtype not in _PEAK:
        return False
    return _product_seconds(rows, columns, dtype) < _entries_seconds(n, dtype)


def is_crowded(layer: Layer) -> bool:
    """Whether the dense product is to be used on a GPU."""
    if layer.dtype not in _PEAK:
        return False
    most = 2 * layer.n > layer.height * layer.width  # then the sampled ways save no memory
    return dense_seconds(layer) * (1.0 if most else MEMORY_IS_WORTH) < sampled_seconds(layer)


def dense_seconds(layer: Layer, tokens: int = TOKENS) -> float:
    """The dense product and the gathering of its entries: a prediction."""
    size = layer.dtype.itemsize
    memory = (layer.height + layer.width) * size / _STREAM
    rate = _SHARE_OF_TORCH[layer.dtype] * _PEAK[layer.dtype]
    arithmetic = 2 * layer.height * layer.width / rate
    gradient = 2 * layer.height * layer.width * size / _STREAM  # written, and read at most once
    return tokens * max(memory, arithmetic) + gradient + 2 * LAUNCH


def sampled_seconds(layer: Layer, tokens: int = TOKENS) -> float:
    """Packing and the faster of the two sampled ways: a prediction."""
    size = layer.dtype.itemsize
    columns = layer.columns * size / _STREAM
    packing = _reading_seconds(layer.width, layer.columns, size) + columns
    reading = _reading_seconds(layer.height, layer.rows, size) + columns
    inner = min(
        _entries_seconds(layer.n, layer.dtype),
        _product_seconds(layer.rows, layer.columns, layer.dtype),
    )
    return tokens * (packing + max(reading, inner)) + 3 * LAUNCH


def _reading_seconds(features: int, used: int, size: int) -> float:
    """Per token, of its used features: all of them in order, or sectors."""
    return min(features * size / _STREAM, used * H100.sector / _SECTORS)


def _entries_seconds(n: int, dtype: torch.dtype) -> float:
    """Per token, without what comes from memory."""
    loads = n * (1 + dtype.itemsize / 4) / 32
    return max(n * dtype.itemsize / _L2, loads / _LOADS)


def _product_seconds(rows: int, columns: int, dtype: torch.dtype) -> float:
    """Per token, without what comes from memory."""
    tiles = -(-rows // _TILE) * -(-columns // _TILE)
    arithmetic = 2 * _TILE * _TILE * tiles / (_SHARE_OF_TILES * _PEAK[dtype])
    return max(tiles * 2 * _TILE * dtype.itemsize / _L2, arithmetic)

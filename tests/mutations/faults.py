"""The faults: what is replaced by what, and the tests that must notice."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


@dataclass(frozen=True)
class Fault:
    """One wrong edit of a kernel.

    Attributes:
        name: what is wrong then.
        file: relative to the repository.
        right: the text that is there, once.
        wrong: the text that takes its place.
        tests: the file of tests that must fail.
    """

    name: str
    file: str
    right: str
    wrong: str
    tests: str

    @property
    def backend(self) -> str:
        """``cuda`` or ``triton``, which is also how its tests are called."""
        return "cuda" if self.file.startswith("csrc/cuda") else "triton"


_GATHER_CU = "csrc/cuda/gather_scatter_kernel.cu"
_GATHER_PY = "saft_kernels/triton/gather_scatter.py"
_GATHER_TESTS = "tests/test_gather_scatter.py"

_ENTRIES_CU = "csrc/cuda/sampled_grad_kernel.cu"
_PRODUCT_CU = "csrc/cuda/sampled_product_kernel.cu"
_LOOKUP_CU = "csrc/cuda/sampled_embedding_kernel.cu"
_SUMS_CU = "csrc/cuda/sums.cuh"
_SAMPLED_PY = "saft_kernels/triton/sampled_grad.py"
_LOOKUP_PY = "saft_kernels/triton/sampled_embedding.py"
_SAMPLED_TESTS = "tests/test_sampled_grad.py"
_SAMPLED_GPU_TESTS = "tests/test_sampled_grad_gpu.py"

FAULTS = (
    Fault(
        "gather, scatter: the first entry behind the end is moved too",
        _GATHER_CU,
        "if (first >= n) return;",
        "if (first > n) return;",
        _GATHER_TESTS,
    ),
    Fault(
        "gather, scatter: the last, incomplete group of entries is dropped",
        _GATHER_CU,
        "if (first >= n) return;",
        "if (first + kEntries > n) return;",
        _GATHER_TESTS,
    ),
    Fault(
        "gather, scatter: a thread's entries overlap its neighbour's",
        _GATHER_CU,
        "+ threadIdx.x) * kEntries;",
        "+ threadIdx.x) * (kEntries - 1);",
        _GATHER_TESTS,
    ),
    Fault(
        "gather, scatter: strides are ignored",
        _GATHER_CU,
        "place[i] = place_of(layout, index[i]);",
        "place[i] = index[i];",
        _GATHER_TESTS,
    ),
    Fault(
        "all: incomplete groups are loaded as a whole",
        "csrc/cuda/vectors.cuh",
        "return count == kEntries && reinterpret_cast",
        "return reinterpret_cast",
        _GATHER_TESTS,
    ),
    Fault(
        "all: misaligned groups are loaded as a whole",
        "csrc/cuda/vectors.cuh",
        "% alignof(Entries<T>) == 0;",
        "% sizeof(T) == 0;",
        _GATHER_TESTS,
    ),
    Fault(
        "all: the innermost dimension comes last",
        "csrc/cuda/numbers.cuh",
        "for (int d = layout.dims - 1; d >= 0; --d)",
        "for (int d = 0; d < layout.dims; ++d)",
        _GATHER_TESTS,
    ),
    Fault(
        "gather: entries behind the end are stored",
        _GATHER_PY,
        "tl.store(values + entry, tl.load(dense + place, exists), exists)",
        "tl.store(values + entry, tl.load(dense + place, exists))",
        _GATHER_TESTS,
    ),
    Fault(
        "scatter: entries behind the end are stored",
        _GATHER_PY,
        "tl.store(dense + place, tl.load(values + entry, exists), exists)",
        "tl.store(dense + place, tl.load(values + entry, exists))",
        _GATHER_TESTS,
    ),
    Fault(
        "all: the remainder of the last dimension is lost",
        "saft_kernels/triton/strided.py",
        "rest = rest // sizes[DIMS - 1 - i]",
        "rest = rest // sizes[0]",
        _GATHER_TESTS,
    ),
    Fault(
        "pack: tokens behind the last are ones in the column of ones",
        _ENTRIES_CU,
        "from_float<P>(t < left ? 1.0f : 0.0f)",
        "from_float<P>(1.0f)",
        _SAMPLED_TESTS,
    ),
    Fault(
        "pack: only the first block of columns is packed",
        _ENTRIES_CU,
        "int64_t{blockIdx.x % chunks} * kThreads + threadIdx.x",
        "int64_t{threadIdx.x}",
        _SAMPLED_TESTS,
    ),
    Fault(
        "pack: fp32 is cut off instead of rounded",
        "csrc/cuda/numbers.cuh",
        "return __float2bfloat16_rn(x);",
        "return __float2bfloat16_rz(x);",
        _SAMPLED_TESTS,
    ),
    Fault(
        "entries: the last, shorter part is dropped",
        _ENTRIES_CU,
        "min(first + blocks_of_part, ceil_div(dy.tokens, kTokens))",
        "min(first + blocks_of_part, dy.tokens / kTokens)",
        _SAMPLED_TESTS,
    ),
    Fault(
        "entries: parts overlap",
        _ENTRIES_CU,
        "const int64_t first = int64_t{blockIdx.y} * blocks_of_part;",
        "const int64_t first = int64_t{blockIdx.y} * (blocks_of_part - 1);",
        _SAMPLED_TESTS,
    ),
    Fault(
        "entries: a chain of sums is lost",
        _ENTRIES_CU,
        "(sums[0] + sums[2]) + (sums[1] + sums[3])",
        "(sums[0] + sums[2]) + sums[1]",
        _SAMPLED_TESTS,
    ),
    Fault(
        "sum of parts: a group is lost",
        _ENTRIES_CU,
        "for (int k = 1; k < kGroups; ++k) sum",
        "for (int k = 2; k < kGroups; ++k) sum",
        _SAMPLED_TESTS,
    ),
    Fault(
        "sum of parts: no barrier",
        _ENTRIES_CU,
        "= sum;\n  __syncthreads();",
        "= sum;",
        _SAMPLED_TESTS,
    ),
    Fault(
        "sampled: an empty row hides the next",
        _SUMS_CU,
        "lower_bound(plan.offsets + 1, plan.n_rows, e + 1)",
        "lower_bound(plan.offsets + 1, plan.n_rows, e)",
        _SAMPLED_TESTS,
    ),
    Fault(
        "sampled: misaligned tokens are loaded as pieces",
        _SUMS_CU,
        "reinterpret_cast<uintptr_t>(column) % alignof(Piece<T>) == 0",
        "true",
        _SAMPLED_TESTS,
    ),
    Fault(
        "sampled: tokens behind the last are loaded as pieces",
        _SUMS_CU,
        "token_stride == 1 && left >= count &&",
        "token_stride == 1 &&",
        _SAMPLED_TESTS,
    ),
    Fault(
        "product: rows of a multiplication are swapped",
        _PRODUCT_CU,
        "lane() / 4 + i / 2 * 8][",
        "lane() / 4 + (1 - i / 2) * 8][",
        _SAMPLED_TESTS,
    ),
    Fault(
        "product: the factors' tokens do not match",
        _PRODUCT_CU,
        "* kTokens + lane() % 4 * 4;",
        "* kTokens + (3 - lane() % 4) * 4;",
        _SAMPLED_TESTS,
    ),
    Fault(
        "product: one buffer for both steps",
        _PRODUCT_CU,
        "++block, buffer ^= 1)",
        "++block)",
        _SAMPLED_TESTS,
    ),
    Fault(
        "product: results overwrite factors in use",
        _PRODUCT_CU,
        "  __syncthreads();  // the results take the place of the factors\n",
        "",
        _SAMPLED_GPU_TESTS,
    ),
    Fault(
        "product: entries of the next tile are picked too",
        _PRODUCT_CU,
        "if (column >= 0 && column < kTile) sums",
        "if (column >= 0) sums",
        _SAMPLED_GPU_TESTS,
    ),
    Fault(
        "product: a tile with an entry is taken for empty",
        _PRODUCT_CU,
        "found = column >= 0 && column < kTile;",
        "found = column > 0 && column < kTile;",
        _SAMPLED_TESTS,
    ),
    Fault(
        "product: rows behind the last are read",
        _PRODUCT_CU,
        "const bool exists = j < job.plan.n_rows;",
        "const bool exists = true;",
        _SAMPLED_TESTS,
    ),
    Fault(
        "embedding: a token that is no row is taken for one",
        _LOOKUP_CU,
        "row < n_rows && rows[row] == token ? row : n_rows",
        "row < n_rows ? row : n_rows",
        _SAMPLED_TESTS,
    ),
    Fault(
        "embedding: a row's last token is lost",
        _LOOKUP_CU,
        "i < end; i += kWarp)",
        "i < end - 1; i += kWarp)",
        _SAMPLED_TESTS,
    ),
    Fault(
        "embedding: half of the lanes are not added",
        _LOOKUP_CU,
        "for (int half = kWarp / 2; half > 0;",
        "for (int half = kWarp / 4; half > 0;",
        _SAMPLED_TESTS,
    ),
    Fault(
        "pack: columns behind the last are stored",
        _SAMPLED_PY,
        "tl.store(to, values.to(packed.dtype.element_ty), exists)",
        "tl.store(to, values.to(packed.dtype.element_ty))",
        _SAMPLED_TESTS,
    ),
    Fault(
        "product: the factors' tokens do not match",
        _SAMPLED_PY,
        "* TOKENS + k % TOKENS,",
        "* TOKENS + (TOKENS - 1 - k % TOKENS),",
        _SAMPLED_TESTS,
    ),
    Fault(
        "product: a tile with an entry is taken for empty",
        _SAMPLED_PY,
        "if found > 0:",
        "if found > 1:",
        _SAMPLED_TESTS,
    ),
    Fault(
        "product: blocks behind a part are added",
        _SAMPLED_PY,
        "exists & (token < tokens) & (j < n_rows)[None, :]",
        "(token < tokens) & (j < n_rows)[None, :]",
        _SAMPLED_TESTS,
    ),
    Fault(
        "sum of parts: the last are lost",
        _SAMPLED_PY,
        "for first in range(0, parts, GROUPS):",
        "for first in range(0, parts - 1, GROUPS):",
        _SAMPLED_GPU_TESTS,
    ),
    Fault(
        "search: one step too few",
        "saft_kernels/triton/search.py",
        "while longest > 0:",
        "while longest > 1:",
        _SAMPLED_TESTS,
    ),
    Fault(
        "embedding: a token that is no row is taken for one",
        _LOOKUP_PY,
        "tl.where(is_row & (token >= 0), place, n_rows)",
        "tl.where(token >= 0, place, n_rows)",
        _SAMPLED_TESTS,
    ),
)

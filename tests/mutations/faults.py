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
)

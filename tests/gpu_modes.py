"""On which GPU backends each gradient mode of SparseAdamW can be tested here."""

from __future__ import annotations

from conftest import CPU, IMPLEMENTATIONS
from saft_kernels.triton import library
from training import MODES

GPU = [name for name in IMPLEMENTATIONS if name not in CPU]


def _serves(name: str, mode: str) -> bool:
    """The sampled mode needs operations that the Triton backend may not have yet."""
    return mode != "sampled" or "cuda" in name or "sampled_grad" in library.IMPLEMENTATIONS


#: (implementation, mode)
GPU_MODES = [(name, mode) for name in GPU for mode in MODES if _serves(name, mode)]

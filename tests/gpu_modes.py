"""The GPU backends that can be tested here, and each with every gradient mode of SparseAdamW."""

from __future__ import annotations

from itertools import product

from conftest import CPU, IMPLEMENTATIONS
from training import MODES

GPU = [name for name in IMPLEMENTATIONS if name not in CPU]
#: (implementation, mode)
GPU_MODES = list(product(GPU, MODES))

"""Stage 5, the delta: what fine-tuning changed, as a small file (``docs/delta_format.md``).

:mod:`.sparse_delta` captures, applies and reverts it, :mod:`.file` reads and writes it,
:mod:`.swap` changes from one to another, :mod:`.composition` makes one of several.
"""

from saft_kernels.delta.composition import RULES, Overlap, compose, overlap
from saft_kernels.delta.sparse_delta import SparseDelta
from saft_kernels.delta.swap import DeltaSwap

__all__ = ["RULES", "DeltaSwap", "Overlap", "SparseDelta", "compose", "overlap"]

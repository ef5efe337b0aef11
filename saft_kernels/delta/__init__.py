"""Stage 5, the delta: what fine-tuning changed, as a small file (``docs/delta_format.md``).

:mod:`.sparse_delta` captures, applies and reverts it, :mod:`.file` reads and writes it,
:mod:`.swap` changes from one to another, :mod:`.composition` makes one of several,
:mod:`.difference` compares two, :mod:`.extraction` makes one of two models, :mod:`.export` writes
it as other programs read it, and :mod:`.weights` opens the files that models come in.
"""

from saft_kernels.delta.composition import RULES, Overlap, compose, overlap
from saft_kernels.delta.difference import Difference, diff
from saft_kernels.delta.export import WeightPatch, save_patches, save_shira, weight_patches
from saft_kernels.delta.extraction import Extraction, extract
from saft_kernels.delta.sparse_delta import SparseDelta
from saft_kernels.delta.swap import DeltaSwap
from saft_kernels.delta.weights import open_weights, save_weights

__all__ = [
    "RULES",
    "DeltaSwap",
    "Difference",
    "Extraction",
    "Overlap",
    "SparseDelta",
    "WeightPatch",
    "compose",
    "diff",
    "extract",
    "open_weights",
    "overlap",
    "save_patches",
    "save_shira",
    "save_weights",
    "weight_patches",
]

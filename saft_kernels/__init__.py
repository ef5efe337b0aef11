"""Sparse fine-tuning: select a small part of a model's parameters, train only those, ship a delta.

The data path, each stage in a module of its own (``docs/data_path.md``)::

    mask = select(model, loss_fn, batches, density=1e-3)      # 1 which parameters
    opt = SparseAdamW(model, mask, gradients="sampled")       # 3, 4 only their gradients; step
    delta = SparseDelta.capture(model, mask, base=state_dict) # 5 ship what changed

``python -m saft_kernels`` prints what was built and which backends work here.
"""

from saft_kernels.attach import attach
from saft_kernels.delta import SparseDelta
from saft_kernels.errors import SaftError
from saft_kernels.mask import CooMask
from saft_kernels.ops import sparse_adamw_
from saft_kernels.optim import SparseAdamW
from saft_kernels.sampled import sampled_linear
from saft_kernels.select import select
from saft_kernels.topk import StreamingTopK

__version__ = "0.1.0"

__all__ = [
    "CooMask",
    "SaftError",
    "SparseAdamW",
    "SparseDelta",
    "StreamingTopK",
    "__version__",
    "attach",
    "sampled_linear",
    "select",
    "sparse_adamw_",
]

"""The Triton kernels as torch operations, with the schemas and fakes of the compiled ones."""

from __future__ import annotations

from typing import Any

import torch

from saft_kernels import backends, ops
from saft_kernels.triton import (
    accumulate_topk,
    gather_scatter,
    sampled_embedding,
    sampled_grad,
    sparse_adamw,
)

NAMESPACE = "saft_triton"

#: Operation -> its implementation.
IMPLEMENTATIONS = {
    "accumulate_topk_": accumulate_topk.accumulate_topk_,
    "compact_topk_": accumulate_topk.compact_topk_,
    "gather": gather_scatter.gather,
    "scatter_": gather_scatter.scatter_,
    "sparse_adamw_": sparse_adamw.sparse_adamw_,
    "pack_columns": sampled_grad.pack_columns,
    "sampled_grad": sampled_grad.sampled_grad,
    "sampled_embedding_grad": sampled_embedding.sampled_embedding_grad,
}


_library: torch.library.Library | None = None


def library() -> torch.library.Library:
    """The library, registered for GPU tensors when it is first used.

    Compiled code must find it made (see ``_gpu_obstacles`` in :mod:`saft_kernels.backends`).
    """
    global _library
    if _library is None:
        _library = _register()
    return _library


def _register() -> torch.library.Library:
    made = ops.define(NAMESPACE)
    key = "CPU" if backends.interpreting() else "CUDA"  # which is the key of AMD's tensors too
    for name, implementation in IMPLEMENTATIONS.items():
        made.impl(name, implementation, key)
    return made


def operations() -> Any:
    """The namespace of the operations."""
    library()
    return getattr(torch.ops, NAMESPACE)

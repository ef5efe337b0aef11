"""torch's own sampled product: ``torch.sparse.sampled_addmm``, by a sparse CSR pattern.

The weight gradient dY.T @ X of a linear layer, at the entries of the pattern only: what the kernel
``sampled_grad`` is checked and measured against. fp32 and fp64; torch has none in bf16.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor


def pattern(flat: Tensor, height: int, width: int) -> Tensor:
    """A CSR tensor with ones at flat indices of a weight, which must ascend."""
    where = torch.stack([flat // width, flat % width])
    ones = torch.ones(flat.numel())
    with warnings.catch_warnings():  # CSR is in beta, torch says
        warnings.simplefilter("ignore")
        coo = torch.sparse_coo_tensor(where, ones, (height, width), check_invariants=True)
        return coo.coalesce().to_sparse_csr()


def sampled_addmm(pattern: Tensor, dy: Tensor, x: Tensor) -> Tensor:
    """The entries of dY.T @ X, in the order of the flat indices.

    Args:
        pattern: [O, I], where they are.
        dy: [T, O], the gradient of the output.
        x: [T, I], the input.
    """
    return torch.sparse.sampled_addmm(pattern, dy.t(), x, beta=0).values()

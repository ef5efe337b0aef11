"""``torch.optim.SparseAdam``, and a hook that makes the dense gradient a sparse COO tensor.

It trains the mask's entries in place, by Adam (Kingma & Ba 2015) without weight decay: SparseAdam
has none (pytorch/pytorch#25484). It updates the moments of the entries that are in the gradient
only; all of the mask's are, in every step, so that this is Adam on them. One thing differs: it adds
eps to the root of the second moment before that is corrected for its bias, so that at first eps
counts up to 32 times as much.

The dense gradient of each parameter exists until its hook has run, and the moments are as large as
the parameters: 8 bytes for every entry of a parameter that has a selected one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from saft_kernels import CooMask

from ..models import ADAMW
from . import Loss, Step, step_of

COVERS = "the same entries, by Adam without weight decay"

_BETA2, _EPS = 0.999, 1e-8  # the defaults


def sparse_adam(model: nn.Module, mask: CooMask, loss: Loss) -> Step:
    """Train the selected entries where they are."""
    model.requires_grad_(False)
    views = []
    for _, param, indices in mask.parameters(model):
        # The same memory in one dimension, where flat indices are those of a COO tensor.
        view = nn.Parameter(param.detach().view(-1))
        param.requires_grad_(True)
        param.register_post_accumulate_grad_hook(_sparsify(indices.long(), view))
        views.append(view)
    optimizer = torch.optim.SparseAdam(views, lr=ADAMW["lr"], betas=(0.9, _BETA2), eps=_EPS)
    return step_of(optimizer, model, loss)


def _sparsify(indices: Tensor, view: nn.Parameter) -> Callable[[Tensor], None]:
    def hook(param: Tensor) -> None:
        assert param.grad is not None
        values, param.grad = param.grad.reshape(-1)[indices], None
        # A mask's indices ascend, so that SparseAdam need not sort them in every step.
        view.grad = torch.sparse_coo_tensor(
            indices[None], values, view.shape, check_invariants=False, is_coalesced=True
        )

    return hook


def first_step(
    weights: Mapping[str, Tensor], gradients: Mapping[str, Tensor], mask: CooMask
) -> dict[str, Tensor]:
    """Where the selected entries should be after the first step, whose moments are g and g**2."""
    expected = {}
    for name, indices in mask.items():
        weight, gradient = (t[name].detach().view(-1)[indices] for t in (weights, gradients))
        size = gradient.abs() + _EPS / (1 - _BETA2) ** 0.5
        expected[name] = weight - ADAMW["lr"] * gradient / size
    return expected

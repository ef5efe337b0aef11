"""Checks that several cases share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from saft_kernels import CooMask, reference
from saft_kernels.ops import end_to_end

from .harness import WrongResultError, require
from .models import ADAMW

#: How far one AdamW step may be from the specification's: a hundredth of the largest update, for
#: roundings of the gradient, and some roundings of the weight itself, in units of its last place.
#: Decay is more than that where a weight is 0.2 or larger, as those of norms are.
STEP_ATOL = 0.01 * ADAMW["lr"]
STEP_ROUNDINGS = 1.5

#: The first step's loss may be this far from the fp32 one's, relatively.
LOSS_TOLERANCE = {"fp32": 1e-4, "amp_bf16": 2e-2}

#: Share of the larger half of gradients whose sign bf16 must leave alone.
MOVED = 0.9

#: Of gradients summed in another order, relative to the largest of their parameter.
GRADIENT_TOLERANCE = 1e-3

#: Gradients this much smaller than the largest of their tensor may be roundings of their sums.
ROUNDING = 1e-4


def require_loss(loss: float, expected: float, precision: str) -> None:
    """The loss is the fp32 one, as closely as the precision allows."""
    near = abs(loss - expected) <= LOSS_TOLERANCE[precision] * abs(expected)
    require(near, f"its loss is {loss}, not {expected}")


@dataclass(frozen=True)
class Stepped:
    """What a first AdamW step makes of the selected entries and their state.

    Attributes:
        values: by name, rounded to the weights' type.
        exp_avg: first moments of all entries, end to end.
        exp_avg_sq: second moments.
        master: exact values of weights of less than fp32; None of others.
    """

    values: dict[str, Tensor]
    exp_avg: Tensor
    exp_avg_sq: Tensor
    master: Tensor | None


def stepped(
    weights: Mapping[str, Tensor], gradients: Mapping[str, Tensor], mask: CooMask
) -> Stepped:
    """The first AdamW step at the selected entries, by the specification."""
    values = {n: reference.gather(weights[n].detach(), i) for n, i in mask.items()}
    grads = torch.cat([reference.gather(gradients[n], i) for n, i in mask.items()]).float()
    compact, bounds = end_to_end([torch.arange(value.numel()) for value in values.values()])
    exact = torch.cat(list(values.values()))
    found = Stepped(
        values,
        torch.zeros_like(grads),
        torch.zeros_like(grads),
        None if exact.dtype == torch.float32 else exact.float(),
    )
    reference.sparse_adamw_(
        list(values.values()), (), grads, compact, bounds,
        found.exp_avg, found.exp_avg_sq, found.master, torch.zeros(len(values)),
        ADAMW["lr"], None, 0.9, 0.999, 1e-8, ADAMW["weight_decay"], False, None, None,
    )  # fmt: skip
    return found


def reference_step(
    weights: Mapping[str, Tensor], gradients: Mapping[str, Tensor], mask: CooMask
) -> dict[str, Tensor]:
    """The selected entries after the first AdamW step, by the specification."""
    return stepped(weights, gradients, mask).values


def require_state(
    expected: Stepped, exp_avg: Tensor, exp_avg_sq: Tensor, master: Tensor | None
) -> None:
    """The optimizer's state is what the specification makes of it, too.

    Weights of less than fp32 hardly move in one step: of them, the exact values tell whether they
    did.
    """
    for what, actual, wanted in (
        ("first moments", exp_avg, expected.exp_avg),
        ("second moments", exp_avg_sq, expected.exp_avg_sq),
    ):
        require(torch.allclose(actual, wanted, rtol=1e-5, atol=0), f"its {what} are wrong")
    if expected.master is not None:
        if master is None:
            raise WrongResultError("it keeps no exact values")
        rtol = STEP_ROUNDINGS * torch.finfo(torch.float32).eps
        close = torch.allclose(master, expected.master, rtol=rtol, atol=STEP_ATOL)
        require(close, "its exact values are not where one AdamW step leads")


def require_moved(
    weights: Mapping[str, Tensor],
    before: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor],
    mask: CooMask,
) -> None:
    """Most of the selected entries with the larger gradients went against these, by a step."""
    grads = torch.cat([reference.gather(gradients[n], i) for n, i in mask.items()]).float()
    moved = torch.cat(
        [reference.gather(weights[n].detach() - before[n].detach(), i) for n, i in mask.items()]
    )
    larger = grads.abs() > grads[grads != 0].abs().median()  # most embeddings get none
    right = -moved[larger] * grads[larger].sign() > 0.5 * ADAMW["lr"]
    share = right.float().mean().item()
    require(share >= MOVED, f"only {share:.0%} of the entries with larger gradients went their way")


def require_stepped(
    weights: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    mask: CooMask,
    other_sums_than: Mapping[str, Tensor] | None = None,
) -> None:
    """The selected entries are what the specification makes of them.

    Where gradients were summed in another order than these, entries whose gradient is nothing but
    rounding (of a key's bias, say) are left out: a first AdamW step follows the sign alone.
    """
    for name, indices in mask.items():
        actual, wanted = reference.gather(weights[name].detach(), indices), expected[name]
        if other_sums_than is not None:
            gradient = other_sums_than[name]
            sure = reference.gather(gradient, indices).abs() > ROUNDING * gradient.abs().max()
            actual, wanted = actual[sure], wanted[sure]
        rtol = STEP_ROUNDINGS * torch.finfo(actual.dtype).eps
        close = torch.allclose(actual, wanted, rtol=rtol, atol=STEP_ATOL)
        require(close, f"{name!r} is not where one AdamW step leads")


def require_untouched(
    weights: Mapping[str, Tensor], before: Mapping[str, Tensor], mask: CooMask | None
) -> None:
    """Every entry outside the mask (None: every entry) has the bits it had."""
    for name, original in before.items():
        actual = weights[name].detach()
        if mask is not None and name in mask:
            actual = actual.clone()
            indices = mask[name]
            reference.scatter_(actual, indices, reference.gather(original, indices))
        require(torch.equal(actual, original), f"{name!r} has changed outside the mask")


def require_same_gradients(
    actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], mask: CooMask | None = None
) -> None:
    """The gradients agree, at the selected entries if there is a mask.

    Those that cancel to nothing but roundings are held to the largest of all parameters.
    """
    names = expected.keys() if mask is None else set(mask)
    require(actual.keys() == names, "other parameters get gradients")
    largest = max(gradient.abs().max() for gradient in expected.values())
    for name, gradient in actual.items():
        wanted = expected[name]
        scale = torch.maximum(wanted.abs().max(), 1e-3 * largest)
        if mask is not None:
            gradient, wanted = (reference.gather(t, mask[name]) for t in (gradient, wanted))
        error = (gradient - wanted).abs().max()
        require(bool(error <= GRADIENT_TOLERANCE * scale), f"the gradient of {name!r} differs")


def require_same_indices(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Two selections name the same entries of the same parameters."""
    require(list(actual) == list(expected), "entries of other parameters are selected")
    for name, indices in expected.items():
        require(torch.equal(actual[name], indices), f"other entries of {name!r} are selected")

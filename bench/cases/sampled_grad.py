"""Stage 4: the weight gradient of one layer at selected entries, against the dense one.

A layer of 3072 x 768 on 6,304 tokens, a ViT-B/16's on 32 images. Two masks of the same number of
entries: ``uniform``, the worst case, and ``concentrated`` in rows and columns as masks of trained
models are (8% of the columns, 32% of the rows: what the largest mean gradients of a pretrained
sentence encoder touched, MiniLM with a sentiment loss).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from saft_kernels import ops
from saft_kernels.cost_model import CROWDED
from saft_kernels.plan import LinearPlan

from ..baselines.sampled_addmm import pattern, sampled_addmm
from ..harness import (
    Contender,
    Figure,
    Outcome,
    Timing,
    evict_caches,
    fitted_exponent,
    measure,
    require,
    times_as_long,
    times_faster,
)
from ..models import Setting, concentrated_entries, uniform_entries

DENSE = "dense product"

#: Least speed-ups over the dense product, both masks, at a density of 0.1%.
BARS = {torch.float32: 12, torch.bfloat16: 7}

SWEEP = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 3e-1)

#: Shares of the layer's tokens, at the setting's density.
TOKENS = (1 / 8, 1 / 4, 1 / 2, 1, 2)

#: Densities that the growth with the entries is fitted to: below, what does not grow counts most,
#: and above, nobody samples.
FITTED = (1e-4, 1e-1)

#: The largest exponent of the time over tokens and over entries.
GROWTH = 1.1


def run(setting: Setting) -> Outcome:
    """Both dtypes at the setting's density, then sweeps of densities and of tokens in fp32."""
    small = setting.model == "saft-tiny"
    tokens, height, width = (100, 48, 32) if small else (6304, 3072, 768)
    outcome = Outcome()
    for dtype, bar in BARS.items():
        outcome += _one_dtype(dtype, bar, (tokens, height, width), setting)
    outcome += _density_sweep((tokens, height, width), setting)
    outcome += _token_sweep((tokens, height, width), setting)
    return outcome


def _one_dtype(
    dtype: torch.dtype, bar: float, sizes: tuple[int, int, int], setting: Setting
) -> Outcome:
    x, dy = operands(dtype, sizes)
    name = str(dtype).removeprefix("torch.")
    masks = {
        "uniform": uniform_entries(*_entries(sizes, setting.density)),
        "concentrated": concentrated_entries(*_entries(sizes, setting.density)),
    }
    exact = exact_gradient(x, dy)
    contenders = [_dense(x, dy, exact)]
    for kind, flat in masks.items():
        contenders += _sampled(kind, flat, x, dy, exact)
    if dtype == torch.float32:  # torch has none in bf16
        contenders.append(_oracle(masks["uniform"], x, dy, exact))
    timings = measure(f"weight gradient, {name}", contenders, setting.kernels)
    figures = [
        times_faster(
            f"sampled gradient against the dense product, {name}, {kind} mask",
            timings[DENSE],
            timings[f"sampled_grad, {kind} mask"],
            bar,
        )
        for kind in masks
    ]
    return Outcome(list(timings.values()), figures)


def operands(dtype: torch.dtype, sizes: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """The input [T, I] and the output gradient [T, O] of a layer, for (T, O, I)."""
    tokens, height, width = sizes
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, width, generator=generator)
    dy = torch.randn(tokens, height, generator=generator)
    return x.to(dtype), dy.to(dtype)


def _entries(sizes: tuple[int, int, int], density: float) -> tuple[int, int, int]:
    """Height and width of the weight, and how many of its entries are selected."""
    _, height, width = sizes
    return height, width, int(density * height * width)


def exact_gradient(x: Tensor, dy: Tensor) -> Tensor:
    """In fp64."""
    return dy.double().t() @ x.double()


def check_gradient(expected: Tensor) -> Callable[[Callable[[], Any]], None]:
    """Within what fp32 sums of this many products may be off, or a bf16 rounding of the result."""

    def check(run: Callable[[], Any]) -> None:
        actual = run()
        tolerance = 2**-7 if actual.dtype == torch.bfloat16 else 1e-5
        scale = expected.square().mean().sqrt()
        error = (actual.double() - expected).abs() - tolerance * expected.abs()
        require(bool((error <= 10 * tolerance * scale).all()), "it is not the gradient")

    return check


def _dense(x: Tensor, dy: Tensor, exact: Tensor) -> Contender:
    moves = x.nbytes + dy.nbytes + x.element_size() * exact.numel()
    return Contender(DENSE, lambda: dy.t() @ x, check_gradient(exact), evict_caches, moves)


def _sampled(kind: str, flat: Tensor, x: Tensor, dy: Tensor, exact: Tensor) -> list[Contender]:
    """The kernel on a packed input, as backward runs it, and the packing, as forward does."""
    plan = LinearPlan.of(x.shape[1], flat)
    columns, *rest, _ = plan.tensors()
    packed = ops.pack_columns(x, columns)
    element, tokens = x.element_size(), len(x)
    moves = packed.nbytes + element * tokens * plan.rows.numel() + 12 * flat.numel()

    def check_packed(run: Callable[[], Any]) -> None:
        require(torch.equal(run(), packed), "other columns")

    return [
        Contender(
            f"sampled_grad, {kind} mask",
            lambda: ops.sampled_grad(packed, dy, *rest),
            check_gradient(exact.view(-1)[flat]),
            evict_caches,
            moves,
        ),
        Contender(
            f"pack_columns, {kind} mask",
            lambda: ops.pack_columns(x, columns),
            check_packed,
            evict_caches,
            2 * packed.nbytes,
        ),
    ]


def _oracle(flat: Tensor, x: Tensor, dy: Tensor, exact: Tensor) -> Contender:
    """torch's own sampled product."""
    entries = pattern(flat, *exact.shape)
    return Contender(
        "torch.sparse.sampled_addmm, uniform mask",
        lambda: sampled_addmm(entries, dy, x),
        check_gradient(exact.view(-1)[flat]),
        evict_caches,
    )


# Growth -------------------------------------------------------------------------------------------


def _density_sweep(sizes: tuple[int, int, int], setting: Setting) -> Outcome:
    """Growth with the entries, and where the dense product becomes the faster one."""
    x, dy = operands(torch.float32, sizes)
    exact = exact_gradient(x, dy)
    contenders = [_dense(x, dy, exact)]
    for density in SWEEP:
        flat = uniform_entries(*_entries(sizes, density))
        contenders.append(_sampled(f"density {density:g}", flat, x, dy, exact)[0])
    timings = measure("weight gradient over density, uniform mask", contenders, setting.kernels)
    dense, *sampled = timings.values()
    speeds = [
        times_faster(
            f"sampled gradient against the dense product, float32, uniform mask of density {d:g}",
            dense,
            timing,
        )
        for d, timing in zip(SWEEP, sampled, strict=True)
    ]
    ratios = [speed.value for speed in speeds]
    figures = [*speeds, _entries_exponent(sampled), crossover(SWEEP, ratios)]
    return Outcome(list(timings.values()), [*figures, automatic_choice(SWEEP, sampled, dense)])


def _entries_exponent(sampled: Sequence[Timing]) -> Figure:
    low, high = FITTED
    fitted = [(d, t) for d, t in zip(SWEEP, sampled, strict=True) if low <= d <= high]
    what = "growth of the sampled gradient's time with entries (uniform mask of 1e-4 to 1e-1)"
    return _exponent(what, *zip(*fitted, strict=True))


def _exponent(what: str, sizes: Sequence[float], timings: Sequence[Timing]) -> Figure:
    exponent = fitted_exponent(sizes, timings)
    return Figure(f"{what}: exponent", exponent, "", bar=GROWTH, at_least=False)


def crossover(densities: Sequence[float], speeds: Sequence[float]) -> Figure:
    """The density at which the dense product becomes the faster one.

    Args:
        densities: of the sweep, ascending.
        speeds: how many times faster the sampled gradient is at each.
    """
    what = "density at which the dense product becomes as fast as the sampled gradient"
    points = list(zip(densities, speeds, strict=True))
    for (low, before), (high, after) in pairwise(points):
        if before >= 1 > after:
            share = math.log(before) / math.log(before / after)
            value = low * (high / low) ** share
            return Figure(what, value, "", note=f"interpolated between {low:g} and {high:g}")
    sampled_wins = speeds[-1] >= 1
    value = densities[-1] if sampled_wins else densities[0]
    return Figure(what, value, "", note=f"{'above' if sampled_wins else 'below'} {value:g}")


def automatic_choice(
    densities: Sequence[float], sampled: Sequence[Timing], dense: Timing
) -> Figure:
    """At how many densities sampled mode takes the way that is not the slower one for sure."""
    right = 0
    for density, timing in zip(densities, sampled, strict=True):
        chosen, other = (dense, timing) if density > CROWDED else (timing, dense)
        right += times_as_long("chosen", chosen, other, 1.0).verdict != "MISS"
    what = (
        f"densities at which the automatic choice, dense above {CROWDED:g}, is not the slower way"
    )
    return Figure(what, right, f"of {len(densities)}", bar=len(densities))


def _token_sweep(sizes: tuple[int, int, int], setting: Setting) -> Outcome:
    """Growth with the tokens of a batch."""
    tokens, height, width = sizes
    counts = [int(share * tokens) for share in TOKENS]
    x, dy = operands(torch.float32, (counts[-1], height, width))
    flat = uniform_entries(*_entries(sizes, setting.density))
    contenders = []
    for count in counts:
        some = x[:count], dy[:count]
        contenders.append(
            _sampled(f"{count:,} tokens, uniform", flat, *some, exact_gradient(*some))[0]
        )
    timings = measure("weight gradient over tokens, uniform mask", contenders, setting.kernels)
    what = f"growth of the sampled gradient's time with tokens ({counts[0]:,} to {counts[-1]:,})"
    figure = _exponent(what, counts, list(timings.values()))
    return Outcome(list(timings.values()), [figure])

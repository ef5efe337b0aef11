"""Stage 4: the weight gradient of one layer at selected entries, against the dense one.

The kernel runs in backward, on used columns that forward has packed; ratios are of the kernel
alone, which the bars are about, and of both together, which decides between the two ways.

A layer of 3072 x 768 on 6,304 tokens, a ViT-B/16's on 32 images. Two masks of the same number of
entries: ``uniform``, the worst case, and ``concentrated`` in rows and columns as masks of trained
models are (8% of the columns, 32% of the rows: what the largest mean gradients of a pretrained
sentence encoder touched, MiniLM with a sentiment loss).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from saft_kernels import ops
from saft_kernels.cost_model import CROWDED
from saft_kernels.plan import LinearPlan

from ..bars import held_to
from ..baselines.sampled_addmm import pattern, sampled_addmm
from ..harness import Contender, measure, require
from ..limits import Needs, evict_caches
from ..models import Setting, concentrated_entries, uniform_entries
from ..outcome import BASELINE, Figure, Outcome, Timing, one_after_another
from ..ratios import ratio, times_faster
from ..sweeps import growth, over_threads

DENSE = "dense product"

#: Lines of plots, all in fp32.
SAMPLED = "sampled_grad, uniform mask"

#: Both have a bar; ``--dtype fp16`` adds a third.
DTYPES = (torch.float32, torch.bfloat16)

SWEEP = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 3e-1)

#: Shares of the layer's tokens, at the setting's density.
TOKENS = (1 / 8, 1 / 4, 1 / 2, 1, 2)

#: Densities that the growth with the entries is fitted to: below, what does not grow counts most,
#: and above, nobody samples.
FITTED = (1e-4, 1e-1)

#: T, O and I of the layer: 32 images of a ViT-B/16, and its first MLP matrix.
SIZES, SMALL_SIZES = (6304, 3072, 768), (100, 48, 32)


def run(setting: Setting) -> Outcome:
    """All dtypes at the setting's density, then sweeps of densities, tokens, threads in fp32."""
    sizes = SMALL_SIZES if setting.small else SIZES
    outcome = Outcome()
    for dtype in dict.fromkeys((*DTYPES, setting.torch_dtype)):
        outcome += _one_dtype(dtype, sizes, setting)
    outcome += _density_sweep(sizes, setting)
    outcome += _token_sweep(sizes, setting)
    outcome += _thread_sweep(sizes, setting)
    return outcome


def _one_dtype(dtype: torch.dtype, sizes: tuple[int, int, int], setting: Setting) -> Outcome:
    name = str(dtype).removeprefix("torch.")
    contenders = weight_gradient(dtype, sizes, setting.density)
    timings = measure(f"weight gradient, {name}", contenders, setting.kernels)
    figures = []
    for kind in ("uniform", "concentrated"):
        what = f"sampled gradient against the dense product, {name}, {kind} mask"
        kernel = timings[f"sampled_grad, {kind} mask"]
        figure = times_faster(what, timings[DENSE], kernel)
        figures.append(held_to(f"sampled/{name}/{kind}", figure) if dtype in DTYPES else figure)
        both = one_after_another("packed", timings[f"pack_columns, {kind} mask"], kernel)
        figures.append(times_faster(f"{what}, packing included", timings[DENSE], both))
    return Outcome(list(timings.values()), figures)


def weight_gradient(
    dtype: torch.dtype, sizes: tuple[int, int, int], density: float
) -> list[Contender]:
    """The dense product, the sampled one for both masks, and torch's own."""
    x, dy = operands(dtype, sizes)
    masks = {
        "uniform": uniform_entries(*_entries(sizes, density)),
        "concentrated": concentrated_entries(*_entries(sizes, density)),
    }
    exact = exact_gradient(x, dy)
    contenders = [_dense(x, dy, exact)]
    for kind, flat in masks.items():
        contenders += _sampled(kind, flat, x, dy, exact)
    if dtype == torch.float32:  # torch has none in bf16
        contenders.append(_oracle(masks["uniform"], x, dy, exact))
    return contenders


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
        tolerance = max(1e-5, torch.finfo(actual.dtype).eps)
        scale = expected.square().mean().sqrt()
        error = (actual.double() - expected).abs() - tolerance * expected.abs()
        require(bool((error <= 10 * tolerance * scale).all()), "it is not the gradient")

    return check


def _dense(x: Tensor, dy: Tensor, exact: Tensor) -> Contender:
    moves = x.nbytes + dy.nbytes + x.element_size() * exact.numel()
    needs = Needs(moves, 2 * len(x) * exact.numel(), x.dtype)
    check = check_gradient(exact)
    return Contender(DENSE, lambda: dy.t() @ x, check, evict_caches, needs, role=BASELINE)


def _sampled(kind: str, flat: Tensor, x: Tensor, dy: Tensor, exact: Tensor) -> list[Contender]:
    """The kernel on a packed input, as backward runs it, and the packing, as forward does."""
    plan = LinearPlan.of(x.shape[1], flat)
    columns, *rest, _ = plan.tensors()
    packed = ops.pack_columns(x, columns)
    element, tokens = x.element_size(), len(x)
    moves = packed.nbytes + element * tokens * plan.rows.numel() + 12 * flat.numel()
    needs = Needs(moves, 2 * tokens * flat.numel(), x.dtype)

    def check_packed(run: Callable[[], Any]) -> None:
        require(torch.equal(run(), packed), "other columns")

    return [
        Contender(
            f"sampled_grad, {kind} mask",
            lambda: ops.sampled_grad(packed, dy, *rest),
            check_gradient(exact.view(-1)[flat]),
            evict_caches,
            needs,
        ),
        Contender(
            f"pack_columns, {kind} mask",
            lambda: ops.pack_columns(x, columns),
            check_packed,
            evict_caches,
            Needs(2 * packed.nbytes),
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
        Needs(x.nbytes + dy.nbytes + 12 * flat.numel(), 2 * len(x) * flat.numel()),
        role=BASELINE,
    )


# Growth -------------------------------------------------------------------------------------------


def _density_sweep(sizes: tuple[int, int, int], setting: Setting) -> Outcome:
    """Growth with the entries, and where the dense product becomes the faster one."""
    x, dy = operands(torch.float32, sizes)
    exact = exact_gradient(x, dy)
    contenders = [_dense(x, dy, exact)]
    for density in SWEEP:
        flat = uniform_entries(*_entries(sizes, density))
        contenders += _sampled(f"density {density:g}", flat, x, dy, exact)
    timings = measure("weight gradient over density, uniform mask", contenders, setting.kernels)
    dense, *ours = timings.values()
    sampled, packing = ours[::2], ours[1::2]
    whole = [one_after_another("packed", *pair) for pair in zip(packing, sampled, strict=True)]
    speeds = [
        times_faster(
            "sampled gradient against the dense product, packing included, float32, uniform mask "
            f"of density {d:g}",
            dense,
            timing,
        )
        for d, timing in zip(SWEEP, whole, strict=True)
    ]
    ratios = [speed.value for speed in speeds]
    figure, line = growth(SAMPLED, "density", SWEEP, sampled, FITTED)
    figures = [
        *speeds,
        held_to("sampled/growth/entries", figure),
        crossover(SWEEP, ratios),
        automatic_choice(SWEEP, whole, dense),
    ]
    return Outcome(list(timings.values()), figures, [line])


def crossover(densities: Sequence[float], speeds: Sequence[float]) -> Figure:
    """The density at which the dense product becomes the faster one.

    Args:
        densities: of the sweep, ascending.
        speeds: how many times faster the sampled gradient is at each, packing included.
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
    """At how many densities sampled mode takes the way that is not the slower one for sure.

    Args:
        densities: of the sweep.
        sampled: times of packing and sampling at each.
        dense: of the dense product.
    """
    right = 0
    for density, timing in zip(densities, sampled, strict=True):
        chosen, other = (dense, timing) if density > CROWDED else (timing, dense)
        _, low, _ = ratio(chosen, other)
        right += low <= 1
    what = (
        f"densities at which the automatic choice, dense above {CROWDED:g}, is not the slower way"
    )
    figure = held_to("sampled/choice", Figure(what, right, f"of {len(densities)}"))
    return replace(figure, bar=len(densities))


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
    figure, line = growth(SAMPLED, "tokens", counts, list(timings.values()))
    return Outcome(list(timings.values()), [held_to("sampled/growth/tokens", figure)], [line])


def _thread_sweep(sizes: tuple[int, int, int], setting: Setting) -> Outcome:
    """Growth with the threads of the machine."""
    x, dy = operands(torch.float32, sizes)
    flat = uniform_entries(*_entries(sizes, setting.density))
    ours, _ = _sampled("uniform", flat, x, dy, exact_gradient(x, dy))
    return over_threads(SAMPLED, ours, setting.kernels)

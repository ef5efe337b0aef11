"""Choosing what to train: the d = floor(density * D) best entries of the whole model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from fractions import Fraction
from itertools import accumulate
from numbers import Real
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from saft_kernels.errors import SelectionError
from saft_kernels.gradient_pass import (
    ALIGNMENT,
    GradientSelection,
    LossFunction,
    Progress,
    aligned,
    cut_into_chunks,
)
from saft_kernels.layout import index_dtype
from saft_kernels.mask import CooMask
from saft_kernels.topk import StreamingTopK
from saft_kernels.untrusted import near_matches

Score = Literal["mean_grad", "fisher", "random", "magnitude"]
Memory = Literal["full", "chunked"]
NameFilter = str | Sequence[str] | Callable[[str], bool]

#: ``memory="chunked"`` refuses a budget that would need more passes over the data than this.
MAX_PASSES = 1000

_LARGEST_FLOAT_BITS = 0x7F7FFFFF
_MAGNITUDE_PIECE = 1 << 20  # elements of the temporary that holds reversed magnitudes


def select(
    model: nn.Module,
    loss_fn: LossFunction | None = None,
    batches: Iterable[Any] | None = None,
    density: float = 1e-3,
    score: Score = "mean_grad",
    include: NameFilter | None = None,
    exclude: NameFilter | None = None,
    *,
    examples: Callable[[Any], int] | None = None,
    memory: Memory = "full",
    memory_budget: int | None = None,
    progress: Progress | None = None,
    seed: int = 0,
) -> CooMask:
    """Select exactly floor(density * D) entries of a model, by one ranking over all of it.

    D counts the elements of all candidate parameters: those that require a gradient and pass
    ``include`` and ``exclude``; tied parameters are one. Ties go to the parameter that comes first
    in the model, then to the lower flat index.

    Scores:
        ``mean_grad``: |mean over the examples of the loss gradient| (SAFT, arXiv 2407.03036). The
            sum over batches of (examples in the batch) * (gradient of its mean loss) is ranked;
            dividing it by the number of examples would not change the order. A short last batch
            thus counts for what it holds, and a constant factor on the loss changes nothing.
        ``fisher``: mean over the examples of the squared gradient of their own loss, the diagonal
            of the empirical Fisher information (SAFT, Eq. 7; FISH mask, Sung et al. 2021). One
            backward pass per example: every batch is cut along the leading dimension of its
            tensors, so keep tensors that all examples share out of it.
        ``magnitude``: the *smallest* |weight| (a strategy of SAFT's Table 4). Needs no data.
        ``random``: uniform without replacement. Needs no data; depends on ``seed`` and the model's
            shapes alone.

    Gradients are added up in fp32 whatever their dtype. Peak memory for the gradient scores is the
    weights, one fp32 accumulator of D elements, and the largest layer's gradient. The model is in
    its own train or eval mode, except that normalisation layers use their running statistics and
    do not change them. Training flags, ``requires_grad``, ``.grad``, hooks and torch's random
    state are as before when the call returns or raises. Weights are not changed.

    Args:
        model: the model; all candidates on one device.
        loss_fn: (model, batch) -> mean loss over the batch, a tensor of one element. It does any
            autocast itself.
        batches: the data, gone over once (``memory="full"``) or once per chunk.
        density: the fraction of entries to select, in (0, 1]. It stands for every real number that
            rounds to this float: 0.3 of 10 elements is 3, and k / D of D is k.
        score: one of the above.
        include: which parameters are candidates, by name: a shell pattern (``fnmatch``), several
            of them, or a function; None: all. A tied parameter may be matched by any of its names.
        exclude: which ones are not; wins over ``include``. Patterns that match nothing are fine, so
            that one list serves many models.
        examples: batch -> its number of examples; None takes the leading dimension of its first
            tensor, 1 if it has none.
        memory: ``full``, or ``chunked``: the accumulator holds one contiguous part of the
            candidates at a time, and the data is gone over once for each part. The result is the
            same. ``batches`` must give the same batches each time; torch's global random state is
            reset for each pass, so a shuffled DataLoader and dropout repeat themselves.
        memory_budget: for ``chunked``, bytes for accumulator and candidate buffer (see
            :class:`StreamingTopK`) together; at least the buffer and 4 bytes for every thousandth
            candidate element (1,000 passes), parameters and the result rounded up to multiples of 4
            elements.
        progress: called with (done, total or None, description) after each batch (``magnitude``:
            parameter).
        seed: of ``random``, a non-negative integer.

    Returns:
        The mask, on the CPU.

    Raises:
        SelectionError: if the density is outside (0, 1] or selects no entry, there is no candidate
            or no data, a pattern of ``include`` matches nothing, the loss is not one number, the
            budget is too small, the data changes between passes, or an argument is not one of its
            choices.
        NonFiniteGradientError: if a loss or gradient is NaN or infinite; it names the parameter.
    """
    _require_choice("score", score, Score)
    _require_choice("memory", memory, Memory)
    candidates = _candidates(model, include, exclude)
    shapes = {name: tuple(param.shape) for name, param in candidates.items()}
    k = number_of_entries(density, _numel(candidates))
    if score == "random":
        return CooMask(_random_entries(shapes, k, seed), shapes)
    top = _new_topk(candidates, k)
    if score == "magnitude":
        _offer_smallest_weights(candidates, top, progress)
    else:
        if loss_fn is None or batches is None:
            raise SelectionError(f"score={score!r} needs loss_fn and batches")
        scores = GradientSelection(
            model,
            loss_fn,
            batches,
            per_example=score == "fisher",
            examples=examples,
            progress=progress,
        )
        needed = sum(aligned(param.numel()) for param in candidates.values())
        limit = _accumulator_size(memory, memory_budget, top.nbytes, needed)
        scores.offer(cut_into_chunks(candidates, limit), top)
    return CooMask({str(name): index for name, index in top.finish().items()}, shapes)


def number_of_entries(density: float, numel: int) -> int:
    """floor(density * numel), where ``density`` stands for every number that rounds to it.

    Thus ``number_of_entries(0.3, 10) == 3`` although the float 0.3 lies below three tenths, and
    ``number_of_entries(k / numel, numel) == k``.

    Raises:
        SelectionError: if the density is outside (0, 1], or if the result is zero.
    """
    if not isinstance(density, Real) or not 0 < density <= 1:
        raise SelectionError(f"density is {density!r}; it must be above 0 and at most 1")
    largest = Fraction(density) + Fraction(math.ulp(density)) / 2
    k = min(math.floor(largest * numel), numel)
    if k == 0:
        raise SelectionError(
            f"density {density:g} of {numel:,} elements selects no entry; "
            f"use at least {1 / numel:.3g}"
        )
    return k


def _candidates(
    model: nn.Module, include: NameFilter | None, exclude: NameFilter | None
) -> dict[str, nn.Parameter]:
    """The parameters to choose from, under their first names, in model order."""
    names: dict[nn.Parameter, list[str]] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        names.setdefault(param, []).append(name)
    _require_matches(include, [name for tied in names.values() for name in tied])
    found = {
        tied[0]: param
        for param, tied in names.items()
        if param.requires_grad
        and (include is None or _matches(tied, include))
        and (exclude is None or not _matches(tied, exclude))
    }
    if not any(param.numel() for param in found.values()):
        raise SelectionError(
            f"the model has no candidate: none of its {len(names)} parameters requires a gradient "
            "and passes include and exclude"
        )
    for name, param in found.items():
        if not param.is_floating_point():
            raise SelectionError(f"{name!r} is {param.dtype}, which is not supported; exclude it")
    return found


def _matches(names: Sequence[str], wanted: NameFilter) -> bool:
    if callable(wanted):
        return any(wanted(name) for name in names)
    return any(fnmatchcase(name, pattern) for name in names for pattern in _patterns(wanted))


def _patterns(wanted: str | Sequence[str]) -> Sequence[str]:
    return [wanted] if isinstance(wanted, str) else wanted


def _require_matches(include: NameFilter | None, names: Sequence[str]) -> None:
    if include is None or callable(include):
        return
    for pattern in _patterns(include):
        if not _matches(names, pattern):
            raise SelectionError(
                f"include pattern {pattern!r} matches no parameter{near_matches(pattern, names)}"
            )


def _new_topk(candidates: dict[str, nn.Parameter], k: int) -> StreamingTopK:
    devices = {param.device for param in candidates.values()}
    if len(devices) > 1:
        raise SelectionError(
            f"the candidates lie on several devices ({', '.join(sorted(map(str, devices)))}); "
            "move the model to one, or select on parts of it with include"
        )
    return StreamingTopK(k, device=devices.pop(), keys=list(candidates), total=_numel(candidates))


def _accumulator_size(memory: Memory, budget: int | None, buffer: int, needed: int) -> int:
    """How many of the ``needed`` elements the accumulator may hold at a time."""
    if memory == "full":
        if budget is not None:
            raise SelectionError("memory_budget needs memory='chunked'")
        return needed
    smallest = buffer + 4 * aligned(math.ceil(needed / MAX_PASSES))
    if budget is None or budget < smallest:
        raise SelectionError(
            f"memory='chunked' needs a memory_budget of at least {smallest:,} bytes here"
            + ("" if budget is None else f", not {budget:,}")
        )
    elements = (budget - buffer) // 4
    return elements - elements % ALIGNMENT


def _offer_smallest_weights(
    candidates: dict[str, nn.Parameter], top: StreamingTopK, progress: Progress | None
) -> None:
    for done, (name, param) in enumerate(candidates.items(), start=1):
        weights = param.detach().reshape(-1)
        for begin, piece in zip(
            range(0, param.numel(), _MAGNITUDE_PIECE), weights.split(_MAGNITUDE_PIECE), strict=False
        ):
            top.update(name, _reversed_magnitude(name, piece), offset=begin)
        if progress is not None:
            progress(done, len(candidates), "weights")


def _reversed_magnitude(name: str, weights: Tensor) -> Tensor:
    """Finite, non-negative floats that order exactly as the magnitudes do, but the other way round.

    The bits of non-negative floats order as the floats do, so subtracting them from the largest
    finite float's bits reverses the order without rounding, where 1/|w| or max - |w| would merge
    neighbours.
    """
    magnitude = weights.float().abs()
    if not bool(magnitude.isfinite().all()):
        raise SelectionError(f"parameter {name!r} holds NaN or infinity (in fp32)")
    return (_LARGEST_FLOAT_BITS - magnitude.view(torch.int32)).view(torch.float32)


def _random_entries(shapes: dict[str, tuple[int, ...]], k: int, seed: int) -> dict[str, Tensor]:
    sizes = [math.prod(shape) for shape in shapes.values()]
    begins = [0, *accumulate(sizes)]
    # The smaller of the two sets is drawn: what is selected, or what is not.
    inverted = 2 * k > begins[-1]
    drawn = _sample(begins[-1], begins[-1] - k if inverted else k, seed)
    cuts = np.searchsorted(drawn, begins)
    entries = {}
    for name, size, begin, low, high in zip(shapes, sizes, begins, cuts, cuts[1:], strict=False):
        local = drawn[low:high] - begin
        index = np.delete(np.arange(size), local) if inverted else local
        entries[name] = torch.from_numpy(index).to(index_dtype(size))
    return entries


def _sample(population: int, count: int, seed: int) -> NDArray[np.int64]:
    """The first ``count`` distinct numbers of a random sequence below ``population``, sorted.

    Only the raw stream of the generator is used: numpy keeps that the same on every machine and in
    every release, which it does not promise of its distributions.
    """
    if seed < 0:
        raise SelectionError(f"seed is {seed}; it must not be negative")
    generator = np.random.PCG64(seed)
    chosen = np.empty(0, dtype=np.int64)
    while chosen.size < count:
        # As many as are missing, so that there are never too many and none has to be thrown away.
        draws = generator.random_raw(count - chosen.size)
        draws %= np.uint64(population)
        chosen = np.concatenate([chosen, draws.view(np.int64)])
        chosen.sort()  # not np.unique, which hashes: minutes where this takes seconds
        chosen = chosen[np.append(True, chosen[1:] != chosen[:-1])]
    return chosen


def _numel(candidates: dict[str, nn.Parameter]) -> int:
    return sum(param.numel() for param in candidates.values())


def _require_choice(what: str, value: object, choices: Any) -> None:
    if value not in get_args(choices):
        raise SelectionError(f"{what} is {value!r}; choose one of {', '.join(get_args(choices))}")

"""Every operation of the data path on a GPU, under each backend that runs there, and whole steps.

Kernels are timed with a head start for the host (:class:`bench.timers.CudaTimer`), so that the GPU
is measured and not Python; training steps without, as their user waits for both. Operations have
the names that :mod:`bench.roofline` predicts them by, with the backend behind. Nothing runs in
TF32. The same code runs on a CPU, for its tests.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from saft_kernels import CooMask, SparseAdamW, StreamingTopK, backends, cost_model, ops, reference
from saft_kernels.plan import EmbeddingPlan, LinearPlan

from .. import roofline
from ..allocations import TrainingWork
from ..baselines import Loss, Step, step_of
from ..baselines.topk import concatenated, split, topk
from ..correctness import (
    reference_step,
    require_loss,
    require_same_indices,
    require_stepped,
    require_untouched,
)
from ..environment import current_gpu
from ..flops import Flops
from ..harness import Contender, measure, require
from ..limits import Needs, evict_caches
from ..memory import peak_memory
from ..models import (
    ADAMW,
    DTYPES,
    Setting,
    Task,
    Workload,
    candidates,
    concentrated_entries,
    lines_touched,
    uniform_entries,
    with_concentrated_mask,
    workload,
)
from ..outcome import BASELINE, Figure, Memory, Outcome, Timing, one_after_another
from ..ratios import times_as_long, times_faster
from ..timers import CPU, CudaTimer, Timer
from . import accumulate_topk, clip_step, sampled_grad, sparse_adamw

#: Bytes that an access to a GPU's memory moves at least.
SECTOR = 32

PRECISIONS = ("fp32", "bf16")

FULL = clip_step.FULL
DENSE = "SparseAdamW, dense gradients, uniform mask"

#: Tokens of the layer and sizes of the layer and of the embedding, for a tiny model.
SMALL_TOKENS, SMALL_LAYER, SMALL_EMBEDDING = (20, 50), (48, 32), (60, 16)


#: What the ways to a weight gradient are compared at, and how its entries are drawn.
DENSITIES = {
    "uniform": (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1),
    "concentrated": (1e-3, 3e-3, 1e-2, 2.5e-2),
}
DRAWN = {"uniform": uniform_entries, "concentrated": concentrated_entries}

#: The kernels of a sampled gradient: the one that is chosen, and each by name.
WAYS_TO_SUM = {
    "sampled_grad": None,
    "sampled_grad by entries": False,
    "sampled_grad by tiles": True,
}


def dense(model: nn.Module, mask: CooMask, loss: Loss) -> Step:
    """This package, reading gradients that exist as a whole."""
    return step_of(SparseAdamW(model, mask, gradients="dense", **ADAMW), model, loss)


#: Training steps.
OURS = {
    DENSE: clip_step.Way(dense),
    **{
        name: clip_step.WAYS[name]
        for name in (clip_step.STREAMED, clip_step.SAMPLED, clip_step.SAMPLED_CONCENTRATED)
    },
}
THEIRS = {name: clip_step.WAYS[name] for name in (FULL, clip_step.FLOOR)}


# Where --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """Where to measure.

    Attributes:
        device: of all tensors.
        backends: those that run there.
        kernels: times operations.
        steps: times training steps.
        capture: makes a CUDA graph of some work, and returns its replay; None: there are none.
        memory: what some work needs in a process of its own, as :func:`bench.memory.peak_memory`.
    """

    device: torch.device
    backends: Sequence[str]
    kernels: Timer
    steps: Timer
    capture: Callable[[Callable[[], Any]], Callable[[], Any]] | None
    memory: Callable[..., Memory]

    def under(self, backend: str, work: Callable[[], Any]) -> Callable[[], Any]:
        """The work, under one backend."""

        def run() -> Any:
            with backends.use_backend(backend):
                return work()

        return run

    def cold(self) -> None:
        """What goes before an operation."""
        evict_caches(self.device)


def gpu() -> Place:
    """The current GPU.

    Raises:
        MeasurementError: if there is none, or no backend for it.
    """
    device, names = current_gpu()
    timers = CudaTimer(device), CudaTimer(device, head_start=0)
    return Place(device, names, *timers, captured, peak_memory)


def captured(work: Callable[[], Any]) -> Callable[[], Any]:
    """The replay of a CUDA graph of some work, which runs once before."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


@contextmanager
def full_precision() -> Iterator[None]:
    """fp32 means fp32: no TF32 in products and convolutions."""
    settings: tuple[Any, ...] = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [each.allow_tf32 for each in settings]
    try:
        for each in settings:
            each.allow_tf32 = False
        yield
    finally:
        for each, allowed in zip(settings, before, strict=True):
            each.allow_tf32 = allowed


# Running ------------------------------------------------------------------------------------------


def run_operations(setting: Setting) -> Outcome:
    """Every operation, on the current GPU."""
    return operations_at(gpu(), setting)


def run_choices(setting: Setting) -> Outcome:
    """What is chosen from for a weight gradient, on the current GPU."""
    return choices_at(gpu(), setting)


def run_steps(setting: Setting) -> Outcome:
    """Whole training steps, on the current GPU."""
    return steps_at(gpu(), setting)


def operations_at(place: Place, setting: Setting) -> Outcome:
    """In the order of the data path."""
    outcome = Outcome()
    with full_precision():
        work = with_concentrated_mask(workload(setting, place.device), setting.density)
        for dtype in PRECISIONS:
            outcome += _accumulation(place, work, dtype, setting)
        outcome += _selection(place, work, setting)
        outcome += _gather(place, work, setting)
        outcome += _scatter(place, work, setting)
        for dtype in PRECISIONS:
            outcome += _optimizer(place, work, dtype, setting)
        outcome += _weight_gradients(place, setting)
        outcome += _embedding(place, setting)
    return outcome


def choices_at(place: Place, setting: Setting) -> Outcome:
    """In both dtypes."""
    outcome = Outcome()
    with full_precision():
        for dtype in PRECISIONS:
            outcome += _densities(place, dtype, setting)
    return outcome


def steps_at(place: Place, setting: Setting) -> Outcome:
    """In both precisions."""
    outcome = Outcome()
    with full_precision():
        work = with_concentrated_mask(workload(setting, place.device), setting.density)
        for precision in ("fp32", "amp_bf16"):
            outcome += _steps(place, work, precision, setting)
    return outcome


def named(operation: str, backend: str) -> str:
    """What a contender is called."""
    return f"{operation} ({backend})"


def _measured(
    place: Place, group: str, contenders: Sequence[Contender], setting: Setting
) -> Outcome:
    """Timings, and figures for the operations whose baseline is among the contenders."""
    timings = measure(group, contenders, setting.kernels, timer=place.kernels)
    figures = [
        times_faster(f"{name} against {baseline}", timings[baseline], timing)
        for name, timing in timings.items()
        if (baseline := baseline_of(name)) in timings
    ]
    return Outcome(list(timings.values()), figures)


#: What may stand behind an operation's name: that it was replayed, and the backend.
_SUFFIX = re.compile(r"(, CUDA graph)? \(\w+\)$")


def baseline_of(name: str) -> str | None:
    """The baseline of a contender's operation."""
    # The layers of a tiny model have as many tokens as theirs, and the same baselines.
    operation = _SUFFIX.sub("", name)
    known = roofline.OPERATIONS.get(operation)
    if known is not None:
        return known.baseline
    size = re.search(r"[\d,]+ tokens, \w+$", operation)
    return f"dense product, {size[0]}" if size and operation.startswith("sampled_grad") else None


def _on(device: torch.device, tensors: Mapping[str, Tensor], dtype: Any = None) -> dict[str, Any]:
    """Copies on a device."""
    return {
        name: tensor.detach().to(device=device, dtype=dtype or tensor.dtype, copy=True)
        for name, tensor in tensors.items()
    }


def _on_cpu(tensors: Mapping[str, Tensor], dtype: Any = None) -> dict[str, Tensor]:
    return _on(CPU.device, tensors, dtype)


# Selecting ----------------------------------------------------------------------------------------


class _Stream:
    """A selection that can be repeated.

    Args:
        sums: what is selected from.
        k: how many.
        gradients: what is added first; None: nothing.
    """

    def __init__(
        self, sums: Mapping[str, Tensor], k: int, gradients: Mapping[str, Tensor] | None = None
    ) -> None:
        self.sums = sums
        self.k = k
        self.gradients = gradients

    def start(self) -> None:
        """Begin with an empty buffer."""
        numel = accumulate_topk.numel_of(self.sums)
        device = next(iter(self.sums.values())).device
        self.top = StreamingTopK(self.k, device=device, keys=list(self.sums), total=numel)

    def update(self) -> None:
        """Offer every tensor."""
        for name, acc in self.sums.items():
            gradient = None if self.gradients is None else self.gradients[name]
            self.top.update(name, acc, gradient, accumulate_topk.SCALE)

    def finish(self) -> dict[Any, Tensor]:
        """The entries."""
        return self.top.finish()

    def start_and_update(self) -> None:
        """What :meth:`finish` needs."""
        self.start()
        self.update()

    def whole(self) -> dict[Any, Tensor]:
        """All of it."""
        self.start_and_update()
        return self.finish()


def _accumulation(place: Place, work: Workload, dtype: str, setting: Setting) -> Outcome:
    """The last batch of a selection, from tensor to tensor."""
    scale, k = accumulate_topk.SCALE, work.masks["selected"].nnz
    scaled = {name: scale * gradient for name, gradient in work.gradients.items()}
    sums = _on(place.device, scaled)
    gradients = _on(place.device, work.gradients, DTYPES[dtype])
    stream = _Stream(sums, k, gradients)

    def add() -> None:
        for name, gradient in gradients.items():
            sums[name].add_(gradient, alpha=scale)

    def check_sums(run: Callable[[], Any]) -> None:
        expected = {name: acc + scale * gradients[name].float() for name, acc in sums.items()}
        run()
        right = all(accumulate_topk.close(sums[name], acc) for name, acc in expected.items())
        require(right, "the sums are wrong")

    def check_both(run: Callable[[], Any]) -> None:
        check_sums(run)
        require_same_indices(stream.finish(), accumulate_topk.selected(sums, k))

    needs = Needs((8 + DTYPES[dtype].itemsize) * work.numel, 2 * work.numel)
    contenders = [
        Contender(f"acc.add_(grad), {dtype} gradients", add, check_sums, needs=needs, role=BASELINE)
    ]
    for backend in place.backends:
        name = named(f"accumulate_topk, {dtype} gradients", backend)
        update, start = (place.under(backend, f) for f in (stream.update, stream.start))
        check = _under(place, backend, check_both)
        contenders.append(Contender(name, update, check, start, needs))
    return _measured(place, f"accumulate and select, {dtype} gradients", contenders, setting)


def _under(place: Place, backend: str, check: Callable[[Any], None]) -> Callable[[Any], None]:
    """A check that itself runs under one backend."""
    return lambda run: place.under(backend, lambda: check(run))()


def _selection(place: Place, work: Workload, setting: Setting) -> Outcome:
    """From sums that are there already, against ``torch.topk``, also with what that needs."""
    k = work.masks["selected"].nnz
    sums = _on(place.device, work.gradients)
    magnitude = concatenated(sums)
    stream = _Stream(sums, k)
    check = accumulate_topk.same_selection(accumulate_topk.selected(sums, k))

    def check_topk(run: Callable[[], Any]) -> None:
        check(lambda: split(run(), sums))

    def plain() -> Tensor:
        return magnitude.topk(k, sorted=False).indices

    def plain_whole() -> dict[str, Tensor]:
        return topk(concatenated(sums), sums, k)

    needs = Needs(4 * work.numel)
    contenders = [
        Contender(roofline.TOPK, plain, check_topk, needs=needs, role=BASELINE),
        Contender(roofline.WITH_CONCATENATION, plain_whole, check, needs=needs, role=BASELINE),
    ]
    for backend in place.backends:
        whole, finish, before = (
            place.under(backend, f) for f in (stream.whole, stream.finish, stream.start_and_update)
        )
        name = named("selection from sums, finish included", backend)
        contenders.append(Contender(name, whole, check, needs=needs))
        contenders.append(Contender(named("finish", backend), finish, check, before))
    return _measured(place, "select from sums", contenders, setting)


# Gathering ----------------------------------------------------------------------------------------


def _gather(place: Place, work: Workload, setting: Setting) -> Outcome:
    """What streamed mode does with each gradient: its entries, into the optimizer's vector."""
    mask = work.masks["uniform"]
    tensors = _on(place.device, {name: work.gradients[name] for name in mask})
    indices = _on(place.device, dict(mask.items()))
    flat = torch.zeros(mask.nnz, device=place.device)
    sizes = [index.numel() for index in indices.values()]
    pieces = dict(zip(indices, flat.split(sizes), strict=True))
    expected = torch.cat([reference.gather(tensors[name], i) for name, i in indices.items()])

    def ours() -> None:
        for name, index in indices.items():
            pieces[name].copy_(ops.gather(tensors[name], index))

    def theirs() -> None:
        for name, index in indices.items():
            pieces[name].copy_(tensors[name].view(-1).index_select(0, index))

    def check(run: Callable[[], Any]) -> None:
        flat.fill_(torch.nan)
        run()
        require(torch.equal(flat, expected), "other values than those at the indices")

    needs = Needs(SECTOR * _sectors(indices, tensors) + (4 + 12) * mask.nnz)
    contenders = [
        Contender("index_select, streamed, fp32", theirs, check, place.cold, needs, role=BASELINE)
    ]
    for backend in place.backends:
        name = named("gather, streamed, fp32", backend)
        run = place.under(backend, ours)
        contenders.append(Contender(name, run, check, place.cold, needs))
    return _measured(place, "gather, uniform mask", contenders, setting)


def _scatter(place: Place, work: Workload, setting: Setting) -> Outcome:
    """Values back to their places."""
    mask = work.masks["uniform"]
    tensors = _on(place.device, {name: work.gradients[name] for name in mask})
    expected = _on(place.device, tensors)
    indices = _on(place.device, dict(mask.items()))
    long_indices = _on(place.device, indices, torch.int64)
    values = {name: reference.gather(tensors[name], index) for name, index in indices.items()}

    def ours() -> None:
        for name, index in indices.items():
            ops.scatter_(tensors[name], index, values[name])

    def theirs() -> None:
        for name, index in long_indices.items():
            tensors[name].view(-1).index_copy_(0, index, values[name])

    def check(run: Callable[[], Any]) -> None:
        for name, index in long_indices.items():
            tensors[name].view(-1)[index] = torch.nan
        run()
        right = all(torch.equal(tensors[name], tensor) for name, tensor in expected.items())
        require(right, "other values than were to be written")

    needs = Needs(2 * SECTOR * _sectors(indices, tensors) + 8 * mask.nnz)
    contenders = [Contender("index_copy_, fp32", theirs, check, place.cold, needs, role=BASELINE)]
    for backend in place.backends:
        run = place.under(backend, ours)
        contenders.append(
            Contender(named("scatter_, fp32", backend), run, check, place.cold, needs)
        )
    return _measured(place, "scatter, uniform mask", contenders, setting)


def _sectors(indices: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> int:
    return sum(lines_touched(index, tensors[name], SECTOR) for name, index in indices.items())


# The optimizer ------------------------------------------------------------------------------------


def _optimizer(place: Place, work: Workload, dtype: str, setting: Setting) -> Outcome:
    """One step of the whole model, from cold caches; every contender changes the same weights."""
    mask = work.masks["uniform"]
    weights = _on(place.device, candidates(work.task.model), DTYPES[dtype])
    params = {name: nn.Parameter(weight) for name, weight in weights.items()}
    gradients = _on(place.device, work.gradients, DTYPES[dtype])
    for name, param in params.items():
        param.grad = gradients[name]
    full = torch.optim.AdamW(params.values(), fused=True, **ADAMW)
    element = DTYPES[dtype].itemsize
    contenders = [
        Contender(
            f"torch.optim.AdamW(fused=True), {dtype}",
            full.step,
            _check_step(params, gradients, mask, None),
            place.cold,
            Needs(7 * element * work.numel, sparse_adamw.FLOPS * work.numel),
            covers="every parameter",
            role=BASELINE,
        )
    ]
    for backend in place.backends:
        with backends.use_backend(backend):
            for source in ("compact", "dense"):
                name = f"sparse_adamw_, {source} gradients, {dtype}"
                step = _sparse_step(params, gradients, mask, source)
                check = _check_step(params, gradients, mask, step)
                run = place.under(backend, step)
                needs = step.needs(SECTOR)
                contenders.append(Contender(named(name, backend), run, check, place.cold, needs))
            if place.capture is not None:
                name = named(f"sparse_adamw_, compact gradients, {dtype}, CUDA graph", backend)
                step = _sparse_step(params, gradients, mask, "compact")
                replay = place.capture(place.under(backend, step))
                step.restart()
                check = _check_step(params, gradients, mask, step)
                needs = step.needs(SECTOR)
                contenders.append(Contender(name, replay, check, place.cold, needs))
    return _measured(place, f"optimizer step, {dtype}", contenders, setting)


def _sparse_step(
    params: Mapping[str, nn.Parameter], gradients: Mapping[str, Tensor], mask: CooMask, source: str
) -> sparse_adamw.Step:
    names = list(mask)
    device = params[names[0]].device
    indices = [mask[name].to(device) for name in names]
    chosen: Any = [gradients[name] for name in names]
    if source == "compact":
        pairs = zip(chosen, indices, strict=True)
        chosen = torch.cat([reference.gather(gradient, index) for gradient, index in pairs]).float()
    return sparse_adamw.Step.of([params[name].detach() for name in names], chosen, indices)


def _check_step(
    params: Mapping[str, nn.Parameter],
    gradients: Mapping[str, Tensor],
    mask: CooMask,
    step: sparse_adamw.Step | None,
) -> Callable[[Callable[[], Any]], None]:
    """A first step against the specification, which runs on the CPU, and the bits of the rest.

    Of 16-bit weights the exact values are checked (the baseline has none: its weights to within a
    rounding), and that the weights are these, rounded.
    """

    def check(run: Callable[[], Any]) -> None:
        if step is not None and step.master is not None:
            step.master.copy_(_entries(params, mask))  # others have stepped meanwhile
        before = _on_cpu(params)
        exact = _on_cpu(before, torch.float32)
        expected = reference_step(exact, _on_cpu(gradients, torch.float32), mask)
        run()
        after = _on_cpu(params)
        if step is None:
            _require_near(after, expected, mask)
            return
        if step.master is not None:
            masters = step.master.cpu().split([index.numel() for _, index in mask.items()])
            for (name, index), master in zip(mask.items(), masters, strict=True):
                stored = reference.gather(after[name], index)
                rounded = torch.equal(stored, master.to(stored.dtype))
                require(rounded, f"{name!r} is not its exact value, rounded")
                reference.scatter_(exact[name], index, master)
        require_stepped(after if step.master is None else exact, expected, mask)
        require_untouched(after, before, mask)

    return check


def _entries(params: Mapping[str, Tensor], mask: CooMask) -> Tensor:
    """The selected entries of all parameters, in fp32."""
    pieces = [
        reference.gather(params[name].detach(), index.to(params[name].device))
        for name, index in mask.items()
    ]
    return torch.cat(pieces).float()


def _require_near(
    after: Mapping[str, Tensor], expected: Mapping[str, Tensor], mask: CooMask
) -> None:
    if next(iter(after.values())).dtype == torch.float32:
        require_stepped(after, expected, mask)
        return
    for name, index in mask.items():
        actual = reference.gather(after[name], index).float()
        near = torch.allclose(actual, expected[name], rtol=2**-7, atol=2 * ADAMW["lr"])
        require(near, f"{name!r} is not where one AdamW step leads")


# Weight gradients ---------------------------------------------------------------------------------


def _weight_gradients(place: Place, setting: Setting) -> Outcome:
    """A layer, at two numbers of tokens, in both dtypes, with both masks."""
    small = setting.small
    height, width = SMALL_LAYER if small else (roofline.HEIGHT, roofline.WIDTH)
    outcome = Outcome()
    for tokens in SMALL_TOKENS if small else roofline.TOKENS:
        for dtype in PRECISIONS:
            outcome += _layer(place, dtype, (tokens, height, width), setting)
    return outcome


def _layer(place: Place, dtype: str, sizes: tuple[int, int, int], setting: Setting) -> Outcome:
    tokens, height, width = sizes
    x, dy = (t.to(place.device) for t in sampled_grad.operands(DTYPES[dtype], sizes))
    exact = sampled_grad.exact_gradient(x, dy)
    size = f"{tokens:,} tokens, {dtype}"
    product = _product(place, f"dense product, {size}", x, dy, exact)
    contenders = [product]
    count = max(1, int(setting.density * height * width))
    for kind, draw in DRAWN.items():
        flat = draw(height, width, count).to(place.device)
        for backend in place.backends:
            contenders += _sampled(place, backend, f"{kind} mask, {size}", flat, x, dy, exact)
    return _measured(place, f"weight gradient, {size}", contenders, setting)


def _product(place: Place, name: str, x: Tensor, dy: Tensor, exact: Tensor) -> Contender:
    moves = x.element_size() * (x.numel() + dy.numel() + exact.numel())
    needs = Needs(moves, 2 * len(x) * exact.numel(), x.dtype)
    check = sampled_grad.check_gradient(exact)
    return Contender(name, lambda: dy.t() @ x, check, place.cold, needs, role=BASELINE)


def _sampled(
    place: Place, backend: str, what: str, flat: Tensor, x: Tensor, dy: Tensor, exact: Tensor
) -> list[Contender]:
    """The kernels on a packed input, as backward runs them, and the packing, as forward does.

    Both ways, besides the one that is chosen: whether the choice is right is an open question.
    """
    columns, *rest, places = LinearPlan.of(x.shape[1], flat).tensors()
    assert places is None
    packed = reference.pack_columns(x, columns)
    rows = rest[0].numel()
    moves = packed.nbytes + x.element_size() * len(x) * rows + 12 * flat.numel()
    needs = Needs(moves, 2 * len(x) * flat.numel(), x.dtype)

    def check_packed(run: Callable[[], Any]) -> None:
        require(torch.equal(run(), packed), "other columns")

    def summed(product: bool | None) -> Callable[[], Tensor]:
        return place.under(backend, lambda: ops.sampled_grad(packed, dy, *rest, product=product))

    check = sampled_grad.check_gradient(exact.view(-1)[flat])
    contenders = [
        Contender(named(f"{way}, {what}", backend), summed(product), check, place.cold, needs)
        for way, product in WAYS_TO_SUM.items()
    ]
    pack = place.under(backend, lambda: ops.pack_columns(x, columns))
    name = named(f"pack_columns, {what}", backend)
    return [*contenders, Contender(name, pack, check_packed, place.cold, Needs(2 * packed.nbytes))]


def _densities(place: Place, dtype: str, setting: Setting) -> Outcome:
    """Every way to a layer's weight gradient over densities: what :mod:`~saft_kernels.cost_model`
    chooses from, on the backend which a user gets.

    The dense one stands for all masks; the gathering of its entries is left out. The concentrated
    masks end where all places of their rows and columns are taken.
    """
    small = setting.small
    height, width = SMALL_LAYER if small else (roofline.HEIGHT, roofline.WIDTH)
    tokens = SMALL_TOKENS[0] if small else cost_model.TOKENS
    x, dy = (
        t.to(place.device) for t in sampled_grad.operands(DTYPES[dtype], (tokens, height, width))
    )
    exact = sampled_grad.exact_gradient(x, dy)
    group = f"weight gradient over density, {tokens:,} tokens, {dtype}"
    contenders = [
        product := _product(place, f"dense product, all densities, {dtype}", x, dy, exact)
    ]
    layers = {}
    for kind, densities in DENSITIES.items():
        for density in densities:
            count = max(1, int(density * height * width))
            flat = DRAWN[kind](height, width, count).to(place.device)
            what = f"{kind} mask of density {density:g}, {tokens:,} tokens, {dtype}"
            contenders += _sampled(place, place.backends[0], what, flat, x, dy, exact)
            rows, columns = (t.unique().numel() for t in (flat // width, flat % width))
            layers[what] = cost_model.Layer(height, width, count, rows, columns, x.dtype)
    timings = measure(group, contenders, setting.kernels, timer=place.kernels)
    found = [
        _choices(what, layer, timings[product.name], _ways(what, timings, place.backends[0]))
        for what, layer in layers.items()
    ]
    return Outcome(list(timings.values()), [figure for figures in found for figure in figures])


def _ways(what: str, timings: Mapping[str, Timing], backend: str) -> dict[bool, Timing]:
    """Packing and sampling: entry by entry, and by tiles of the product."""
    pack = timings[named(f"pack_columns, {what}", backend)]
    return {
        product: one_after_another("packed", pack, timings[named(f"{way}, {what}", backend)])
        for way, product in WAYS_TO_SUM.items()
        if product is not None
    }


def _choices(
    what: str, layer: cost_model.Layer, dense: Timing, ways: Mapping[bool, Timing]
) -> list[Figure]:
    """How the ways that the cost model compares do against each other, and which one it takes."""
    by_tiles = cost_model.prefers_product(layer.n, layer.rows, layer.columns, layer.dtype)
    tiles = times_faster(
        f"tiles against entries, packing included, {what}", ways[False], ways[True]
    )
    sampled = times_faster(
        f"the sampled gradient against the dense product, packing included, {what}",
        dense,
        ways[by_tiles],
    )
    return [
        _chosen(tiles, "tiles" if by_tiles else "entries"),
        _chosen(sampled, "dense" if cost_model.is_crowded(layer) else "sampled"),
    ]


def _chosen(figure: Figure, way: str) -> Figure:
    return replace(figure, note=f"{figure.note}; chosen: {way}")


def _embedding(place: Place, setting: Setting) -> Outcome:
    """The token embedding, against its dense gradient."""
    small = setting.small
    real = roofline.VOCABULARY, roofline.EMBEDDING
    vocabulary, width = SMALL_EMBEDDING if small else real
    generator = torch.Generator().manual_seed(0)
    count = SMALL_TOKENS[0] if small else roofline.PROMPT_TOKENS
    tokens = torch.randint(vocabulary, (count,), generator=generator).to(place.device)
    dy = torch.randn(count, width, generator=generator).to(place.device)
    entries = int(setting.density * vocabulary * width)
    flat = uniform_entries(vocabulary, width, entries).to(place.device)
    plan = EmbeddingPlan.of(width, flat)
    exact = torch.zeros(vocabulary, width, dtype=torch.float64, device=place.device)
    exact.index_add_(0, tokens, dy.double())

    def theirs() -> Any:
        return torch.ops.aten.embedding_dense_backward(dy, tokens, vocabulary, -1, False)

    def ours() -> Tensor:
        return ops.sampled_embedding_grad(tokens, dy, *plan.tensors())

    baseline, name = "embedding_dense_backward, fp32", "sampled_embedding_grad, fp32"
    check = sampled_grad.check_gradient(exact)
    check_ours = sampled_grad.check_gradient(exact.view(-1)[flat])
    dense, sampled = Needs(dy.nbytes + 4 * exact.numel()), Needs(dy.nbytes + 12 * entries)
    contenders = [Contender(baseline, theirs, check, place.cold, dense, role=BASELINE)]
    for backend in place.backends:
        run = place.under(backend, ours)
        contenders.append(Contender(named(name, backend), run, check_ours, place.cold, sampled))
    return _measured(place, "gradient of the token embedding", contenders, setting)


# Training steps -----------------------------------------------------------------------------------


def _steps(place: Place, work: Workload, precision: str, setting: Setting) -> Outcome:
    """Whole steps, host included, and the memory of each in a process of its own.

    Under the backend which a user gets: the operations show how another one compares.
    """
    task = replace(work.task, precision=precision)
    default = place.backends[0]
    ways: list[tuple[str, str, clip_step.Way, str | None]]
    ways = [(name, name, way, None) for name, way in THEIRS.items()]
    ways += [(named(name, default), name, way, default) for name, way in OURS.items()]
    group = f"training step in {precision}, {setting.images} images and {setting.prompts} prompts"
    # Before there are copies of the model here.
    memory = _memories(place, work, precision, setting, default)
    contenders = []
    for name, kind, way, backend in ways:
        own = task.to(place.device)
        step = _step(place, way, work, own, backend)
        check = _check_training(kind, own.model, work, way.mask, precision)
        contenders.append(_counted(name, step, check, precision, work, way))
    timings = measure(group, contenders, setting.steps, timer=place.steps)
    figures = [
        times_as_long(f"{group}: {name} against {other}", timings[name], timings[other])
        for name in timings
        if name not in THEIRS
        for other in THEIRS
    ]
    figures += _memory_figures(precision, {n: memory[kind] for n, kind, *_ in ways}, work.numel)
    uses = [clip_step.memory_use(group, n, memory[kind], way) for n, kind, way, _ in ways]
    return Outcome(list(timings.values()), figures, memory=uses)


def _counted(
    name: str,
    step: Callable[[], Tensor],
    check: Callable[[Callable[[], Any]], None],
    precision: str,
    work: Workload,
    way: clip_step.Way,
) -> Contender:
    """A training step, its operations counted while it is checked."""
    flops = Flops()
    needs = flops.needs(2 * 4 * work.numel, clip_step.PRODUCTS[precision])
    return Contender(
        name, step, flops.checked(check), needs=needs, covers=way.covers, role=way.role
    )


def _step(
    place: Place, way: clip_step.Way, work: Workload, own: Task, backend: str | None
) -> Callable[[], Tensor]:
    def make() -> Step:
        return way.method(own.model, work.masks[way.mask], own.loss)

    return make() if backend is None else place.under(backend, place.under(backend, make)())


def _memories(
    place: Place, work: Workload, precision: str, setting: Setting, backend: str
) -> dict[str, Memory]:
    """Of the steps of every way; the baselines do not care about the backend."""
    with TemporaryDirectory() as folder, backends.use_backend(backend):
        for name, mask in work.masks.items():
            mask.save(Path(folder, name))

        def measured(name: str) -> Memory:
            return place.memory(
                f"{__name__}:steps",
                name=name,
                mask=str(Path(folder, (OURS | THEIRS)[name].mask)),
                model=setting.model,
                images=setting.images,
                prompts=setting.prompts,
                pretrained=setting.pretrained,
                dtype=setting.dtype,
                precision=precision,
                device=str(place.device),
            )

        full = measured(FULL)  # which takes the most
        others = [name for name in OURS | THEIRS if name != FULL]
        with ThreadPoolExecutor(_at_once(place.device, full)) as pool:
            return {FULL: full, **dict(zip(others, pool.map(measured, others), strict=True))}


def _at_once(device: torch.device, memory: Memory) -> int:
    """How many processes that need so much fit on the device beside each other; each takes long to
    start, and what one of them allocates is its own."""
    if device.type == "cpu" or memory.reserved is None:
        return 1
    free, _ = torch.cuda.mem_get_info(device)
    return min(max(int(free / (1.5 * memory.reserved)), 1), 4)


def steps(name: str, *arguments: Any, **options: Any) -> TrainingWork:
    """The work whose memory is measured, of one of the ways that are here."""
    work = clip_step.training_work((OURS | THEIRS)[name].method, *arguments, **options)
    return replace(work, step=full_precision()(work.step))


def _check_training(
    kind: str, model: nn.Module, work: Workload, mask_name: str, precision: str
) -> Callable[[Callable[[], Any]], None]:
    """The first step's loss; in fp32 its weights; the bits of what must stay."""
    mask = work.masks[mask_name]

    def check(run: Callable[[], Any]) -> None:
        require_loss(run().item(), work.loss, precision)
        base, params = candidates(work.task.model), _on_cpu(candidates(model))
        if kind != clip_step.FLOOR and precision == "fp32":
            expected = reference_step(base, work.gradients, mask)
            require_stepped(params, expected, mask, other_sums_than=work.gradients)
        if kind != FULL:
            require_untouched(params, base, None if kind == clip_step.FLOOR else mask)

    return check


def _memory_figures(precision: str, memory: Mapping[str, Memory], numel: int) -> list[Figure]:
    what = f"peak memory below full fine-tuning's in {precision}, per parameter"
    full = memory[FULL].peak
    return [
        Figure(f"{what}: {name}", (full - each.peak) / numel, "bytes")
        for name, each in memory.items()
        if name != FULL
    ]

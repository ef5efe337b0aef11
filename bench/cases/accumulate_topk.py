"""Stage 1: selecting the k largest of a stream, alone and fused with the accumulation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from saft_kernels import StreamingTopK

from ..bars import held_to
from ..baselines.topk import concatenated, split, topk
from ..correctness import require_same_indices
from ..harness import Contender, Effort, measure, require
from ..limits import Needs
from ..memory import peak_memory
from ..models import Setting, candidates, make_task, workload
from ..outcome import BASELINE, Figure, Outcome
from ..ratios import times_as_long, times_faster
from ..sweeps import growth, over_threads

#: Example counts scale the gradients of batches.
SCALE = 16.0


#: Parts of the model's entries that the growth is measured over.
SHARES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1)


def run(setting: Setting) -> Outcome:
    """Both on two distributions: what a model's gradients look like, and the textbook's."""
    work = workload(setting)
    k = work.masks["selected"].nnz
    torch.manual_seed(0)
    distributions = {
        "gradients": {n: _sum_like(gradient) for n, gradient in work.gradients.items()},
        "normal numbers": {n: torch.randn(g.shape) for n, g in work.gradients.items()},
    }
    outcome = Outcome()
    for data, sums in distributions.items():
        outcome += _selection(data, sums, k, setting.kernels)
        outcome += _accumulation(data, sums, work.gradients, k, setting.kernels)
    outcome += _growth(distributions["normal numbers"], setting)
    outcome += _temporaries(work.numel, setting)
    return outcome


def _sum_like(gradient: Tensor) -> Tensor:
    """A sum of gradients; of those in 16 bits many are the same, which no sum is."""
    total = SCALE * gradient.float()
    return total if gradient.dtype == torch.float32 else total * (1 + 1e-3 * torch.rand_like(total))


def selection(mean: dict[str, Tensor], k: int) -> list[Contender]:
    """Selecting from sums that are there already: every entry has to be read once."""
    check = same_selection(selected(mean, k))
    needs = Needs(4 * numel_of(mean))
    magnitude = concatenated(mean)
    return [
        Contender(
            "torch.topk", lambda: topk(magnitude, mean, k), check, needs=needs, role=BASELINE
        ),
        Contender("StreamingTopK", lambda: _stream(mean, k), check, needs=needs),
    ]


def _selection(data: str, mean: dict[str, Tensor], k: int, effort: Effort) -> Outcome:
    timings = measure(f"select from {data}", selection(mean, k), effort)
    what = f"streaming selection from {data} against torch.topk on the concatenated magnitudes"
    plain, ours = timings.values()
    bar = f"selection/{data.replace(' ', '-')}"
    return Outcome([plain, ours], [held_to(bar, times_faster(what, plain, ours))])


def accumulation(sums: dict[str, Tensor], gradients: dict[str, Tensor], k: int) -> list[Contender]:
    """The last batch of a selection: add its gradient, and find the k largest sums.

    They add to a copy, which has the same sums before every run.
    """
    own = {name: tensor.clone() for name, tensor in sums.items()}

    def restore() -> None:
        for name, tensor in sums.items():
            own[name].copy_(tensor)

    def add() -> None:
        for name, gradient in gradients.items():
            own[name].add_(gradient, alpha=SCALE)

    def check_sums(run: Callable[[], Any]) -> Any:
        result = run()
        right = (close(own[n], s + SCALE * gradients[n]) for n, s in sums.items())
        require(all(right), "the sums are wrong")
        return result

    def check_both(run: Callable[[], Any]) -> None:
        result = check_sums(run)
        require_same_indices(result, selected(own, k))

    def fused() -> dict[Any, Tensor]:
        return _stream(own, k, gradients, SCALE)

    element = next(iter(gradients.values())).element_size()
    entries = numel_of(sums)
    needs = Needs((8 + element) * entries, 2 * entries)
    return [
        Contender("acc.add_(grad)", add, check_sums, restore, needs, role=BASELINE),
        Contender("StreamingTopK.update(acc, grad)", fused, check_both, restore, needs),
    ]


def _accumulation(
    data: str, sums: dict[str, Tensor], gradients: dict[str, Tensor], k: int, effort: Effort
) -> Outcome:
    contenders = accumulation(sums, gradients, k)
    timings = measure(f"accumulate a gradient, sums of {data}", contenders, effort)
    plain, fused = timings.values()
    what = f"accumulation fused with selection from {data} against acc.add_(grad) alone"
    figure = held_to(f"accumulation/{data.replace(' ', '-')}", times_as_long(what, fused, plain))
    return Outcome([plain, fused], [figure])


def _growth(sums: dict[str, Tensor], setting: Setting) -> Outcome:
    """Selection over the entries it goes through, the same share of them, and over threads."""
    flat = torch.cat([tensor.view(-1) for tensor in sums.values()])
    sizes = [int(share * flat.numel()) for share in SHARES]
    contenders = [_select_from(flat[:size], setting.density) for size in sizes]
    timings = list(measure("select over D", contenders, setting.kernels).values())
    figure, line = growth("StreamingTopK", "D", sizes, timings)
    outcome = Outcome(timings, [figure], [line])
    outcome += over_threads("StreamingTopK", contenders[-1], setting.kernels)
    return outcome


def _select_from(flat: Tensor, density: float) -> Contender:
    k = max(int(density * flat.numel()), 1)
    mean = {"all": flat}
    name = f"StreamingTopK, D = {flat.numel():,}"
    check = same_selection(selected(mean, k))
    return Contender(name, lambda: _stream(mean, k), check, needs=Needs(flat.nbytes))


def _temporaries(numel: int, setting: Setting) -> Outcome:
    arguments = {"model": setting.model, "density": setting.density}
    memory = peak_memory(f"{__name__}:fused_pass", **arguments)
    share = (memory.peak - memory.before) / (4 * numel)
    what = "all memory that the fused pass adds, in percent of D fp32 numbers"
    return Outcome(figures=[held_to("accumulation/memory", Figure(what, 100 * share, "%"))])


def fused_pass(model: str, density: float) -> Callable[[], object]:
    """The work whose memory is measured: accumulate into existing sums and select."""
    shapes = [param.shape for param in candidates(make_task(model, 1, 1).model).values()]
    sums = {str(i): torch.randn(shape) for i, shape in enumerate(shapes)}
    gradients = {str(i): torch.randn(shape) for i, shape in enumerate(shapes)}
    k = int(density * numel_of(sums))
    first = dict(list(sums.items())[:1])
    _stream(first, 1, gradients, SCALE)  # what is loaded or started at the first use
    return lambda: _stream(sums, k, gradients, SCALE)


def _stream(
    sums: Mapping[str, Tensor],
    k: int,
    gradients: Mapping[str, Tensor] | None = None,
    scale: float = 1.0,
) -> dict[Any, Tensor]:
    top = StreamingTopK(k, keys=list(sums), total=numel_of(sums))
    for name, acc in sums.items():
        top.update(name, acc, None if gradients is None else gradients[name], scale)
    return top.finish()


def selected(mean: Mapping[str, Tensor], k: int) -> dict[str, Tensor]:
    """The k best by definition: all above the k-th value, and the first ones that equal it."""
    flat = concatenated(mean)
    kth = flat.kthvalue(flat.numel() - k + 1).values
    above = (flat > kth).nonzero().view(-1)
    equal = (flat == kth).nonzero().view(-1)[: k - above.numel()]
    return split(torch.cat([above, equal]), mean)


def same_selection(expected: dict[str, Tensor]) -> Callable[[Callable[[], Any]], None]:
    return lambda run: require_same_indices(run(), expected)


def close(actual: Tensor, expected: Tensor) -> bool:
    return torch.allclose(actual, expected, rtol=1e-6, atol=1e-6)


def numel_of(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors.values())

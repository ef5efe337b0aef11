"""Stage 1: selecting the k largest of a stream, alone and fused with the accumulation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from saft_kernels import StreamingTopK

from ..baselines.topk import concatenated, split, topk
from ..checks import require_same_indices
from ..harness import (
    Contender,
    Figure,
    Outcome,
    measure,
    require,
    times_as_long,
    times_faster,
)
from ..memory import peak_memory
from ..models import Setting, candidates, make_task, workload

#: Example counts scale the gradients of batches.
SCALE = 16.0


def run(setting: Setting) -> Outcome:
    """Both on two distributions: what a model's gradients look like, and the textbook's."""
    work = workload(setting)
    k = work.masks["selected"].nnz
    torch.manual_seed(0)
    distributions = {
        "gradients": {n: SCALE * gradient for n, gradient in work.gradients.items()},
        "normal numbers": {n: torch.randn_like(g) for n, g in work.gradients.items()},
    }
    outcome = Outcome()
    for data, sums in distributions.items():
        outcome += _selection(data, sums, k, setting)
        outcome += _accumulation(data, sums, work.gradients, k, setting)
    outcome += _temporaries(work.numel, setting)
    return outcome


def _selection(data: str, mean: dict[str, Tensor], k: int, setting: Setting) -> Outcome:
    """Selecting from sums that are there already: every entry has to be read once."""
    expected = selected(mean, k)
    bytes_read = 4 * numel_of(mean)
    magnitude = concatenated(mean)
    contenders = [
        Contender("torch.topk", lambda: topk(magnitude, mean, k), same_selection(expected)),
        Contender(
            "StreamingTopK", lambda: _stream(mean, k), same_selection(expected), moves=bytes_read
        ),
    ]
    timings = measure(f"select from {data}", contenders, setting.kernels)
    what = f"streaming selection from {data} against torch.topk on the concatenated magnitudes"
    plain, ours = timings.values()
    return Outcome([plain, ours], [times_faster(what, plain, ours, bar=30)])


def _accumulation(
    data: str,
    sums: dict[str, Tensor],
    gradients: dict[str, Tensor],
    k: int,
    setting: Setting,
) -> Outcome:
    """The last batch of a selection: add its gradient, and find the k largest sums."""

    def add() -> None:
        for name, gradient in gradients.items():
            sums[name].add_(gradient, alpha=SCALE)

    def check_sums(run: Callable[[], Any]) -> Any:
        expected = {n: s + SCALE * gradients[n] for n, s in sums.items()}
        result = run()
        require(all(close(sums[n], s) for n, s in expected.items()), "the sums are wrong")
        return result

    def check_both(run: Callable[[], Any]) -> None:
        result = check_sums(run)
        require_same_indices(result, selected(sums, k))

    moves = 12 * numel_of(sums)
    contenders = [
        Contender("acc.add_(grad)", add, check_sums, moves=moves),
        Contender(
            "StreamingTopK.update(acc, grad)",
            lambda: _stream(sums, k, gradients, SCALE),
            check_both,
            moves=moves,
        ),
    ]
    timings = measure(f"accumulate a gradient, sums of {data}", contenders, setting.kernels)
    plain, fused = timings.values()
    what = f"accumulation fused with selection from {data} against acc.add_(grad) alone"
    return Outcome([plain, fused], [times_as_long(what, fused, plain, bar=1.3)])


def _temporaries(numel: int, setting: Setting) -> Outcome:
    arguments = {"model": setting.model, "density": setting.density}
    memory = peak_memory(f"{__name__}:fused_pass", **arguments)
    share = (memory.peak - memory.before) / (4 * numel)
    what = "all memory that the fused pass adds, in percent of D fp32 numbers"
    return Outcome(figures=[Figure(what, 100 * share, "%", bar=1.0, at_least=False)])


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

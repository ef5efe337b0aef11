"""How far test accuracy can fall behind training accuracy, by the number of trained values.

The paper has a bound in its Appendix A; what is here is not that one, word for word, but Occam's,
the plainest that grows with the number of trained parameters (Blumer et al. 1987; Shalev-Shwartz &
Ben-David 2014, "Understanding Machine Learning", Theorem 7.7): whatever can be described in b bits
once the pretrained model is known satisfies, with probability 1 - delta over n training images
drawn independently,

    |test accuracy - training accuracy| <= sqrt((b ln 2 + ln(2 / delta)) / (2 n)).

It holds for all such descriptions at once, and so for the one that training has found.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from saft_clip.experiment.cells import Contest
from saft_clip.experiment.protocols import OWN
from saft_clip.experiment.record import Record, Row, Run
from saft_clip.experiment.statistics import Estimate, estimate
from saft_clip.methods import find

#: The bound may fail with this probability.
DELTA = 0.05

#: Bits of a trained value.
_BITS = 32

#: Methods whose mask depends on the data: it is a part of the description.
_SELECTING = ("saft", "saft-fisher")


@dataclass(frozen=True)
class Gap:
    """What the bound says of a method, and what was measured.

    Attributes:
        model: its name in the plan.
        train: what it was trained on.
        method: its name in the plan.
        shots: training images per class.
        trained: values that it trains.
        bits: of the description.
        n: training images.
        measured: training accuracy minus test accuracy in distribution, over seeds.
        bound: on its absolute value; above 1 it says nothing.
    """

    model: str
    train: str
    method: str
    shots: int
    trained: int
    bits: float
    n: int
    measured: Estimate
    bound: float


def description_bits(method: str, trained: int, parameters: int) -> float:
    """Bits that tell what a method has trained, given the pretrained model.

    Args:
        method: of the registry.
        trained: number k of trained values, 32 bits each.
        parameters: number d of the model's; which k of them costs log2 of d over k.
    """
    which = _log2_choices(parameters, trained) if method in _SELECTING else 0.0
    return _BITS * trained + which


def _log2_choices(d: int, k: int) -> float:
    return (math.lgamma(d + 1) - math.lgamma(k + 1) - math.lgamma(d - k + 1)) / math.log(2)


def occam_bound(bits: float, n: int, delta: float = DELTA) -> float:
    """The largest gap that is to be expected of what ``bits`` bits describe, from ``n`` images."""
    return math.sqrt((bits * math.log(2) + math.log(2 / delta)) / (2 * n))


def gaps(record: Record) -> list[Gap]:
    """The bound and the measured gap of every method that trains something, for each data set."""
    runs: dict[tuple[Contest, int], list[Run]] = {}
    for run in record.runs:
        if find(run.cell.config.method).trains:
            runs.setdefault((run.cell.contest, run.cell.shots), []).append(run)
    found = [_gap(record, mine) for mine in runs.values()]
    return [gap for gap in found if gap is not None]


def _gap(record: Record, runs: list[Run]) -> Gap | None:
    cell, results = runs[0].cell, runs[0].results
    model, train, method = cell.contest
    bits = description_bits(cell.config.method, results["trained"], results["parameters"])
    rows = [
        row
        for row in record.rows
        if (row.model, row.train, row.method, row.shots) == (model, train, method, cell.shots)
        and row.alpha is None
    ]
    differences = list(_differences(rows))
    if not differences:
        return None
    n = min(row.n for row in rows if row.role == "train")
    return Gap(
        model, train, method, cell.shots, results["trained"], bits, n,
        estimate(differences), occam_bound(bits, n),
    )  # fmt: skip


def _differences(rows: Sequence[Row]) -> Iterator[float]:
    training = {row.seed: row.top1 for row in rows if row.role == "train"}
    for row in rows:
        if row.role in OWN and row.seed in training:
            yield training[row.seed] - row.top1

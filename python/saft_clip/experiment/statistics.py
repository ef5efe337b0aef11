"""Means with their errors, and whether a difference may be chance."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from saft_clip.domains.extras import require

#: Random draws of signs where there are too many to try them all.
_RESAMPLES = 9999


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds.

    Attributes:
        mean: of the values.
        error: its standard error, s / sqrt(n) with n - 1 in s; nan for one value.
        n: number of values.
    """

    mean: float
    error: float
    n: int


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and standard error of at least one value."""
    n = len(values)
    error = statistics.stdev(values) / math.sqrt(n) if n > 1 else math.nan
    return Estimate(statistics.fmean(values), error, n)


def harmonic_mean(a: float, b: float) -> float:
    """2ab / (a + b): of the accuracies on base and on new classes; 0 if both are 0."""
    return 2 * a * b / (a + b) if a + b else 0.0


def p_value(ours: Mapping[Any, float], theirs: Mapping[Any, float]) -> float | None:
    """Whether the mean of paired differences may be 0: a sign-flip permutation test, two-sided.

    Pairs are values with the same key (seed and data set). If neither method were better, each
    difference could as well have the other sign (Good 2005, "Permutation, Parametric and Bootstrap
    Tests of Hypotheses"). All signs are tried for up to 13 pairs, 9,999 random ones for more.

    It says whether a difference on *these* data sets would be seen with other seeds, too: a method
    that is better on some of them and worse on others has differences that are no chance. It does
    not say what would be found on other data sets, of which there are far fewer than pairs.

    Returns:
        The p-value; None if no two values can be paired.

    Raises:
        MissingExtraError: if SciPy is not installed.
    """
    stats = require("scipy.stats", "scipy", extra="lab", why="experiments")
    differences = np.array([ours[key] - theirs[key] for key in ours if key in theirs])
    if not len(differences):
        return None
    if len(differences) == 1 or not differences.any():
        return 1.0  # either sign is as far from 0
    found = stats.permutation_test(
        (differences,),
        np.mean,
        permutation_type="samples",
        n_resamples=_RESAMPLES,
        vectorized=True,
        rng=np.random.default_rng(0),
    )
    return float(found.pvalue)


def above(ours: Mapping[Any, float], theirs: Mapping[Any, float]) -> bool:
    """Whether the mean of the paired differences is above 0."""
    return math.fsum(ours[key] - theirs[key] for key in ours if key in theirs) > 0


def holm(p_values: Mapping[Any, float]) -> dict[Any, float]:
    """The p-values of several comparisons, corrected for their number (Holm 1979)."""
    corrected: dict[Any, float] = {}
    least = 0.0
    for rank, key in enumerate(sorted(p_values, key=lambda key: p_values[key])):
        least = max(least, min(1.0, (len(p_values) - rank) * p_values[key]))
        corrected[key] = least
    return corrected

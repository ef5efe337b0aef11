"""``saft finetune --density auto``: several densities are tried, validation images decide.

Each trial is a run of its own, in a folder below the run's, with the same images and seed as the
run itself, so that what was interrupted goes on where it was. What is tried and how one is chosen
follows the study in ``docs/study``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saft_clip.config import FinetuneConfig
from saft_clip.console import say, warn
from saft_clip.errors import ConfigError
from saft_clip.forms import Form, is_count, is_flag, is_positive, is_share, is_text, optional
from saft_clip.run_folder import TRIALS, RunFolder
from saft_kernels.errors import NonFiniteGradientError
from saft_kernels.mask import CooMask

#: What is tried, the sparsest first.
DENSITIES = (1e-3, 1e-2, 1e-1)

#: The density that ``--lr`` is meant for: SAFT's own.
_OF_LR = 1e-3


@dataclass(frozen=True, kw_only=True)
class DensityTrial:
    """One density, and how good it was.

    Attributes:
        density: share of the parameters.
        lr: learning rate it was tried with, see :func:`lr_for`.
        top1: accuracy on the validation images; None if training diverged.
        top1_stderr: its binomial standard error.
        images: that were validated on.
        error: why training diverged.
    """

    density: float
    lr: float
    top1: float | None = None
    top1_stderr: float | None = None
    images: int = 0
    error: str | None = None


#: How ``results.json`` holds the trials; see :func:`to_dicts`.
DENSITY_TRIALS: Form = [
    {
        **{"density": is_share, "lr": is_positive, "chosen": is_flag, "images": is_count},
        **{"top1": optional(is_share), "top1_stderr": optional(is_share)},
        "error": optional(is_text),
    }
]


def lr_for(density: float, lr: float) -> float:
    """The learning rate for a density, where ``lr`` is the one for a density of 0.001.

    AdamW moves every entry by about the learning rate, and so all of d entries by its product with
    the square root of d: with a learning rate that goes with the inverse of that root, every
    density moves the model equally far.
    """
    return lr * math.sqrt(_OF_LR / density)


def try_densities(
    config: FinetuneConfig, run: Callable[[FinetuneConfig], Mapping[str, Any]]
) -> list[DensityTrial]:
    """Fine-tune with each of :data:`DENSITIES`, and evaluate on validation images.

    Args:
        config: of the run whose density is to be chosen.
        run: carries out a run, or goes on with it, and returns its results.

    Returns:
        What was found, in the order of the densities.

    Raises:
        NonFiniteGradientError: if training diverged with every density.
        SaftError: whatever else stops a run.
    """
    trials: list[DensityTrial] = []
    for number, density in enumerate(DENSITIES, start=1):
        trial = trial_config(config, density)
        say(
            f"density {density:g}, learning rate {trial.lr:.3g}: trial {number} of "
            f"{len(DENSITIES)}, in {trial.output}"
        )
        try:
            after = next(x for x in run(trial)["evaluations"] if x["when"] == "after")
        except NonFiniteGradientError as error:
            warn(f"density {density:g}: {error}")
            trials.append(DensityTrial(density=density, lr=trial.lr, error=str(error)))
            last = error.with_traceback(None)  # whose frames would keep the trial's model
        else:
            trials.append(_found(density, trial.lr, after))
            say(f"density {density:g}: {_percent(trials[-1])} of the validation images are right")
    if all(trial.top1 is None for trial in trials):
        raise last
    return trials


def _found(density: float, lr: float, after: Mapping[str, Any]) -> DensityTrial:
    found = {name: after[name] for name in ("top1", "top1_stderr")}
    return DensityTrial(density=density, lr=lr, images=after["n"], **found)


def _percent(trial: DensityTrial) -> str:
    assert trial.top1_stderr is not None
    return f"{100 * _accuracy(trial):.1f} ± {100 * trial.top1_stderr:.1f}%"


def trial_config(config: FinetuneConfig, density: float) -> FinetuneConfig:
    """The settings of a trial: the run's, but for what is evaluated and kept."""
    folder = _folder(config, density)
    return config.changed(
        density=density,
        lr=lr_for(density, config.lr),
        output=str(folder),
        resume=RunFolder(folder).started(),
        eval_data=(config.val_data or config.train_data,),
        eval_split="val",
        eval_train=False,
        alphas=(),
        val_frequency=0,
        tensorboard=False,
    )


def _folder(config: FinetuneConfig, density: float) -> Path:
    return Path(config.output) / TRIALS / f"{density:g}"


def best(trials: Sequence[DensityTrial]) -> DensityTrial:
    """The most accurate on the validation images; of equals the sparsest."""
    return max(trials, key=lambda trial: (_accuracy(trial), -trial.density))


def _accuracy(trial: DensityTrial) -> float:
    return -1.0 if trial.top1 is None else trial.top1


def chosen_config(config: FinetuneConfig, trials: Sequence[DensityTrial]) -> FinetuneConfig:
    """The settings with the chosen density and its learning rate.

    Its mask is put into the run's folder: the run would select the same.
    """
    trial = best(trials)
    say(f"density {trial.density:g} is chosen, with the learning rate {trial.lr:.3g}")
    mask = Path(config.output) / "mask.safetensors"
    if not mask.exists():
        CooMask.load(_folder(config, trial.density) / mask.name).save(mask)
    return config.changed(density=trial.density, lr=trial.lr)


def to_dicts(trials: Sequence[DensityTrial]) -> Iterator[dict[str, Any]]:
    """For ``results.json``."""
    chosen = best(trials) if trials else None
    for trial in trials:
        yield {**vars(trial), "chosen": trial == chosen}


def no_validation_images(config: FinetuneConfig) -> ConfigError:
    """What to say where there is nothing to choose with."""
    return ConfigError(
        f"--density auto chooses on validation images, and {config.train_data} has no val split: "
        "give --val-data, or a density"
    )

"""Writes the tables and figures of README.md from the results beside it.

    python docs/study/summary.py

``NAME/results.csv``, ``NAME/trials.csv`` and ``NAME/densities.csv`` are what ``saft experiment``
wrote for ``NAME.yaml``.
"""

from __future__ import annotations

import csv
import json
import math
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent.parent))  # for bench, which is no package that is installed

from bench.readme_figures import Picture, standalone, themes  # noqa: E402
from bench.result_file import update_block  # noqa: E402
from saft_clip.auto_density import DENSITIES, DensityTrial, best  # noqa: E402
from saft_clip.experiment.protocols import OTHERS, OWN  # noqa: E402
from saft_clip.experiment.statistics import (  # noqa: E402
    Estimate,
    estimate,
    harmonic_mean,
    holm,
    p_value,
)
from saft_clip.figures import PLACEHOLDERS, figure, inline_svg  # noqa: E402
from saft_kernels.files import atomic_write  # noqa: E402

#: What was run on several bases.
BASES = ("scale", "large", "auto")

PAGE = HERE / "README.md"
FIGURES = HERE / "figures"

#: What was trained on, and everything else.
_BOTH = (OWN, OTHERS)
_EVERY = (*OWN, *OTHERS)

#: (seed, data) -> top-1 accuracy
Scores = Mapping[tuple[str, str], float]


@dataclass(frozen=True)
class Study:
    """What one experiment found, or several together.

    Attributes:
        rows: of ``results.csv``, without those on training images; ``alpha`` is empty in those of
            results, and a share in those along the way from the pretrained to the trained weights.
        trials: of ``trials.csv``.
        densities: of ``densities.csv``.
    """

    rows: list[dict[str, str]]
    trials: list[dict[str, str]]
    densities: list[dict[str, str]]

    @classmethod
    def load(cls, *names: str) -> Study:
        """Read the files of each."""
        rows, trials, densities = [], [], []
        for folder in (HERE / name for name in names):
            rows += _read(folder / "results.csv")
            if (folder / "trials.csv").exists():
                trials += _read(folder / "trials.csv")
            if (folder / "densities.csv").exists():
                densities += _read(folder / "densities.csv")
        return cls(
            [row for row in rows if row["role"] != "train"],
            [trial for trial in trials if trial["top1"]],  # others have diverged
            densities,
        )

    def values(self, column: str) -> list[str]:
        """The different values of a column, in order."""
        return list(dict.fromkeys(row[column] for row in self.rows))

    def scores(self, roles: Sequence[str], **where: str) -> Scores:
        """The accuracies of some rows; of results, unless another ``alpha`` is given."""
        where = {"alpha": ""} | where
        return {
            (row["seed"], f"{row['train']} {row['data']}"): float(row["top1"])
            for row in self.rows
            if row["role"] in roles and all(row[key] == value for key, value in where.items())
        }

    def mean(self, roles: Sequence[str], **where: str) -> Estimate:
        """Over data, then over seeds."""
        return estimate(self.per_seed(roles, **where))

    def per_seed(self, roles: Sequence[str], **where: str) -> list[float]:
        """Means over data; seeds in order."""
        per_seed = defaultdict(list)
        for (seed, _), top1 in self.scores(roles, **where).items():
            per_seed[seed].append(top1)
        return [sum(values) / len(values) for _, values in sorted(per_seed.items())]


def _read(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


# Tables -------------------------------------------------------------------------------------------


def table(heads: Sequence[str], lines: Iterator[Sequence[str]]) -> str:
    """Of Markdown, the first column to the left."""
    marks = ["---"] + ["---:"] * (len(heads) - 1)
    return "".join(f"| {' | '.join(line)} |\n" for line in [heads, marks, *lines])


def change(now: Estimate, before: Estimate) -> str:
    """In points, with the standard error over seeds."""
    error = f" ± {100 * now.error:.1f}" if now.n > 1 else ""
    return f"{100 * (now.mean - before.mean):+.1f}{error}"


def of_methods(study: Study, train: str) -> str:
    """Every method trained on one domain: changes from zero-shot, and OOD against full."""
    zero = {roles: study.mean(roles, method="zero-shot", train=train) for roles in _BOTH}
    methods = _by_others(study, train)
    against = _against_full(study, methods, train=train)

    def lines() -> Iterator[Sequence[str]]:
        for method in methods:
            own, other = (study.mean(roles, method=method, train=train) for roles in _BOTH)
            yield (
                method,
                change(own, zero[_BOTH[0]]),
                change(other, zero[_BOTH[1]]),
                _verdict(against.get(method)),
                settings_of(study, train, method),
            )

    heads = ["method", "in distribution", "shifted", "shifted, against full", "chosen settings"]
    return table(heads, lines())


def of_other_data(study: Study, train: str) -> str:
    """Every method trained on one domain: changes there, on letters, and on other digits."""
    letters = "builtin:letters"
    digits = [data for data in study.values("data") if data not in (train, letters)]
    methods = _by_others(study, train)
    against = _against_full(study, methods, train=train)

    def lines() -> Iterator[Sequence[str]]:
        for method in methods:
            cells = [
                change(*(_over(study, data, method=m) for m in (method, "zero-shot")))
                for data in ([train], [letters], digits)
            ]
            settings = settings_of(study, train, method)
            yield method, *cells, _verdict(against.get(method)), settings

    heads = ["method", "noisy digits", "letters", "other digits", "other data, against full"]
    return table([*heads, "chosen settings"], lines())


def _over(study: Study, names: Sequence[str], **where: str) -> Estimate:
    """The mean over these data, then over seeds."""
    per_seed = [study.per_seed(_EVERY, data=name, **where) for name in names]
    return estimate([sum(values) / len(values) for values in zip(*per_seed, strict=True)])


def of_new_classes(study: Study) -> str:
    """Every method trained on half of the classes, over all domains."""

    def lines() -> Iterator[Sequence[str]]:
        found = {method: _base_and_new(study, method) for method in study.values("method")}
        against = _against_full(study, list(found))
        for method, (base, new, harmonic) in sorted(found.items(), key=lambda x: -x[1][2].mean):
            yield method, *map(_percent, (base, new, harmonic)), _verdict(against.get(method))

    return table(["method", "base", "new", "harmonic mean", "new, against full"], lines())


def _base_and_new(study: Study, method: str) -> tuple[Estimate, Estimate, Estimate]:
    base, new = (study.per_seed(roles, method=method) for roles in _BOTH)
    both = [harmonic_mean(*pair) for pair in zip(base, new, strict=True)]
    return estimate(base), estimate(new), estimate(both)


def _percent(value: Estimate) -> str:
    error = f" ± {100 * value.error:.1f}" if value.error > 0 else ""
    return f"{100 * value.mean:.1f}{error}"


def of_ways(study: Study, train: str) -> str:
    """Accuracies on the way back to the pretrained weights."""
    alphas = sorted(set(study.values("alpha")) - {""}, key=float)

    def lines() -> Iterator[Sequence[str]]:
        for method in study.values("method"):
            where = {"method": method, "train": train}
            if not study.scores(OTHERS, alpha=alphas[0], **where):
                continue
            yield method, *(_accuracies(study, alpha=alpha, **where) for alpha in alphas)

    return table(["in distribution / shifted", *(f"alpha {float(a):g}" for a in alphas)], lines())


def _accuracies(study: Study, **where: str) -> str:
    own, other = (100 * study.mean(roles, **where).mean for roles in _BOTH)
    return f"{own:.1f} / {other:.1f}"


def of_shots(study: Study) -> str:
    """Accuracies over the number of training images; of the trained weights, then halfway."""
    shots = study.values("shots")

    def lines() -> Iterator[Sequence[str]]:
        for method in study.values("method"):
            for alpha in ("", "0.5"):
                where = {"method": method, "alpha": alpha}
                if study.scores(OTHERS, **where):
                    cells = (_accuracies(study, shots=number, **where) for number in shots)
                    yield f"{method}, alpha {alpha}" if alpha else method, *cells

    return table(["in distribution / shifted", *shots], lines())


def _by_others(study: Study, train: str) -> list[str]:
    methods = [m for m in study.values("method") if m != "zero-shot"]
    return sorted(methods, key=lambda m: -study.mean(OTHERS, method=m, train=train).mean)


def _against_full(
    study: Study, methods: Sequence[str], **where: str
) -> dict[str, tuple[float, float]]:
    """On other data: points above full fine-tuning, and p with Holm's correction."""
    full = study.scores(OTHERS, method="full", **where)
    scores = {m: study.scores(OTHERS, method=m, **where) for m in methods if m != "full"}
    p = holm({m: p_value(found, full) or 1.0 for m, found in scores.items()})
    return {
        m: (100 * sum(found[key] - full[key] for key in found) / len(found), p[m])
        for m, found in scores.items()
    }


def _verdict(against: tuple[float, float] | None) -> str:
    return "" if against is None else f"{against[0]:+.1f} (p = {against[1]:.2g})"


def settings_of(study: Study, train: str, method: str) -> str:
    """What the trials have chosen."""
    for trial in study.trials:
        if (trial["train"], trial["method"], trial["chosen"]) == (train, method, "yes"):
            return ", ".join(f"{k} {v:g}" for k, v in json.loads(trial["settings"]).items())
    return ""


#: The methods of ``scale.yaml`` that select, and their densities.
SPARSE = {"saft 0.01%": 1e-4, "saft 0.1%": 1e-3, "saft 1%": 1e-2, "saft 10%": 1e-1}

#: Those that ``--density auto`` chooses from.
AUTOMATIC = [name for name, density in SPARSE.items() if density in DENSITIES]


def of_bases(study: Study, train: str) -> str:
    """Every base trained on one domain: zero-shot accuracy, and changes in both places."""

    def lines() -> Iterator[Sequence[str]]:
        for model in study.values("model"):
            where = {"model": model, "train": train}
            zero = [study.mean(roles, method="zero-shot", **where) for roles in _BOTH]
            cells = [f"{100 * each.mean:.1f}" for each in zero]
            against = _against_full(study, list(SPARSE), **where)
            for method in ("full", *SPARSE):
                now = [study.mean(roles, method=method, **where) for roles in _BOTH]
                mark = _mark(*against.get(method, (0.0, 1.0)))
                own, other = (change(*pair) for pair in zip(now, zero, strict=True))
                cells.append(f"{own} / {other}{mark}")
            yield model, *cells

    heads = ["base", "zero-shot", "shifted", "full", *SPARSE]
    return table(heads, lines())


def _mark(difference: float, p: float) -> str:
    """Whether it is above or below full fine-tuning, beyond chance."""
    if p >= 0.05:
        return ""
    return " ↑" if difference > 0 else " ↓"


def of_shifts(study: Study, model: str, train: str) -> str:
    """One base, evaluated on each domain: zero-shot accuracy, and changes by some methods."""
    columns = [
        (method, alpha) for alpha in ("", "0.5") for method in ("full", "saft 0.1%", "saft 1%")
    ]

    def lines() -> Iterator[Sequence[str]]:
        where = {"model": model, "train": train}
        before = {
            data: study.mean(_EVERY, method="zero-shot", data=data, **where)
            for data in study.values("data")
        }
        for data, zero in sorted(before.items(), key=lambda item: -item[1].mean):
            trained = " (trained on)" if data == train else ""
            cells = [
                change(study.mean(_EVERY, method=m, alpha=a, data=data, **where), zero)
                for m, a in columns
            ]
            yield f"{data.removeprefix('builtin:')}{trained}", _percent(zero), *cells

    heads = [f"{method}, alpha {alpha}" if alpha else method for method, alpha in columns]
    return table(["evaluated on", "zero-shot", *heads], lines())


def of_rules(study: Study) -> str:
    """What comes of ways to choose a density, over all bases and both domains.

    Each density has the best of four learning rates. ``--density auto`` tries three densities at
    each of four learning rates, which are chosen from in the same way.
    """
    contests = [(m, t) for m in study.values("model") for t in study.values("train")]
    rules = {
        **{f"always {_share(name)}": lambda found, name=name: name for name in SPARSE},
        "the best on validation images": _best,
        "the sparsest within one standard error of it": _sparsest,
    }

    def lines() -> Iterator[Sequence[str]]:
        for name, rule in rules.items():
            picked = {c: rule(_validation(study, *c)) for c in contests}
            halfway = _outcome(study, picked, alpha="0.5")
            yield name, *_outcome(study, picked), _counted(picked.values()), *halfway
        auto = dict.fromkeys(contests, "auto")
        picked = Counter(float(d["density"]) for d in study.densities if d["chosen"])
        halfway = _outcome(study, auto, alpha="0.5")
        yield "`--density auto`", *_outcome(study, auto), _shares(picked), *halfway
        full, zero = (dict.fromkeys(contests, name) for name in ("full", "zero-shot"))
        yield "full", *_outcome(study, full), "", *_outcome(study, full, alpha="0.5")
        yield "zero-shot", *_outcome(study, zero), *[""] * 4

    counted = " / ".join(_share(name) for name in AUTOMATIC)
    heads = ["density", "in distribution", "shifted", "mean", f"{counted} chosen"]
    heads += [f"alpha 0.5: {head}" for head in heads[1:4]]
    return table(heads, lines())


def _share(name: str) -> str:
    return name.removeprefix("saft ")


def _validation(study: Study, model: str, train: str) -> dict[str, float]:
    """The best accuracy on validation images at each density."""
    found: dict[str, float] = {}
    for t in study.trials:
        if (t["model"], t["train"]) == (model, train) and t["method"] in AUTOMATIC:
            found[t["method"]] = max(found.get(t["method"], 0.0), float(t["top1"]))
    return found


#: Validation images of each trial.
_IMAGES = 300


def _best(found: Mapping[str, float]) -> str:
    """By the rule of ``--density auto``."""
    trials = {DensityTrial(density=SPARSE[n], lr=1.0, top1=top1): n for n, top1 in found.items()}
    return trials[best(list(trials))]


def _sparsest(found: Mapping[str, float]) -> str:
    top = max(found.values())
    least = top - math.sqrt(top * (1 - top) / _IMAGES)
    return next(name for name in AUTOMATIC if found[name] >= least)


def _outcome(study: Study, picked: Mapping[tuple[str, str], str], alpha: str = "") -> list[str]:
    means = [
        [study.mean(r, model=m, train=t, method=method, alpha=alpha).mean for r in _BOTH]
        for (m, t), method in picked.items()
    ]
    own, other = (100 * sum(values) / len(values) for values in zip(*means, strict=True))
    return [f"{own:.1f}", f"{other:.1f}", f"{(own + other) / 2:.1f}"]


def _shares(picked: Mapping[float, int]) -> str:
    """In percent: of all runs, each of which chooses for itself."""
    total = sum(picked.values())
    return " / ".join(f"{100 * picked[density] / total:.0f}%" for density in DENSITIES)


def _counted(picked: Sequence[str]) -> str:
    return " / ".join(str(list(picked).count(name)) for name in AUTOMATIC)


def of_rates(study: Study) -> str:
    """How good a learning rate is that follows from the best one for 0.1%."""
    tried = _tried(study)
    others = [name for name in SPARSE if name != "saft 0.1%"]
    exponents = {
        "the same": 0.0,
        "by the root: lr · √(0.001 / density)": 0.5,
        "lr · 0.001 / density": 1.0,
    }

    def lines() -> Iterator[Sequence[str]]:
        for name, exponent in exponents.items():
            cells = []
            for method in others:
                losses = [_loss(found, method, exponent) for found in tried.values()]
                known = [loss for loss in losses if loss is not None]
                missing = f" (of {len(known)} of {len(losses)})" if len(known) < len(losses) else ""
                cells.append(f"{100 * sum(known) / len(known):.1f}{missing}" if known else "–")  # noqa: RUF001
            yield name, *cells

    return table(["learning rate", *(f"at {_share(name)}" for name in others)], lines())


Tried = dict[str, dict[float, float]]


def _tried(study: Study) -> dict[tuple[str, str], Tried]:
    """(model, train) -> density -> learning rate -> accuracy on validation images."""
    found: dict[tuple[str, str], Tried] = defaultdict(lambda: defaultdict(dict))
    for t in study.trials:
        if t["method"] in SPARSE:
            lr = json.loads(t["settings"])["lr"]
            found[t["model"], t["train"]][t["method"]][lr] = float(t["top1"])
    return found


def _loss(found: Tried, method: str, exponent: float) -> float | None:
    """Accuracy below the best tried at that density; None if that learning rate was not tried."""
    sparsest = found["saft 0.1%"]
    anchor = max(sparsest, key=sparsest.__getitem__)
    wanted = anchor * (1e-3 / SPARSE[method]) ** exponent
    # Rates that were tried are a factor of three apart: 3 stands for the root of ten.
    near = [lr for lr in found[method] if 0.8 < lr / wanted < 1.25]
    return max(found[method].values()) - found[method][near[0]] if near else None


# Figures ------------------------------------------------------------------------------------------


def changes_figure(study: Study, train: str) -> str:
    """Two dots for each method: its change in distribution, and elsewhere."""
    methods = _by_others(study, train)[::-1]
    with figure(7.6, 0.27 * len(methods) + 1.0) as (drawing, axes):
        for roles, colour, label in zip(
            _BOTH, ("s2", "after"), ("in distribution", "mean of shifted"), strict=True
        ):
            zero = study.mean(roles, method="zero-shot", train=train).mean
            found = [study.mean(roles, method=m, train=train) for m in methods]
            axes.errorbar(
                [100 * (each.mean - zero) for each in found], range(len(methods)),
                xerr=[100 * each.error for each in found], fmt="o", markersize=5.5, capsize=2,
                color=PLACEHOLDERS[colour], label=label,
            )  # fmt: skip
        axes.axvline(0, color=PLACEHOLDERS["ink"], linewidth=1)
        axes.set_yticks(range(len(methods)), methods)
        axes.set_xlabel("change from zero-shot, in points (± standard error over five seeds)")
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=2)
        return inline_svg(drawing, "changes", "Change of accuracy from zero-shot, by method")


def way_figure(study: Study, train: str) -> str:
    """Accuracy here against elsewhere: each method's way from the pretrained weights."""
    alphas = sorted(set(study.values("alpha")) - {""}, key=float)
    shown = {
        "full": ("s2", "s"), "visual": ("s3", "^"), "l2sp": ("s4", "v"), "flyp": ("s5", "P"),
        "bitfit": ("bad", "X"), "saft": ("after", "o"), "saft-fisher": ("s1", "D"),
    }  # fmt: skip
    with figure(7.6, 4.4) as (drawing, axes):
        for method, (colour, marker) in shown.items():
            points = [
                [100 * study.mean(roles, method=method, train=train, alpha=alpha).mean
                 for roles in _BOTH]
                for alpha in alphas
            ]  # fmt: skip
            axes.plot(
                *zip(*points, strict=True), label=method, color=PLACEHOLDERS[colour],
                marker=marker, markersize=5.5, linewidth=1.4,
            )  # fmt: skip
        axes.annotate("zero-shot", points[0], (6, 6), textcoords="offset points")
        axes.set(xlabel="accuracy in distribution, %", ylabel="mean accuracy on other data, %")
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=4)
        return inline_svg(drawing, "way", "Accuracy here against elsewhere, by share of the way")


def shots_figure(study: Study) -> str:
    """Accuracy over the number of training images, in distribution and elsewhere."""
    shown = {
        "full": ("s2", "s"), "saft": ("after", "o"), "saft-fisher": ("s1", "D"),
        "lora": ("s4", "v"), "visual": ("s3", "^"), "zero-shot": ("before", ""),
    }  # fmt: skip
    shots = study.values("shots")
    with figure(8.4, 3.6, ncols=2) as (drawing, grid):
        titles = ("in distribution", "mean of shifted domains")
        for axes, roles, title in zip(grid, _BOTH, titles, strict=True):
            for method, (colour, marker) in shown.items():
                found = [study.mean(roles, method=method, shots=number) for number in shots]
                axes.errorbar(
                    range(len(shots)), [100 * each.mean for each in found],
                    yerr=[100 * each.error if each.n > 1 else 0 for each in found],
                    label=method, color=PLACEHOLDERS[colour], marker=marker, markersize=5,
                    linewidth=1.4, capsize=2,
                )  # fmt: skip
            axes.set_xticks(range(len(shots)), shots)
            axes.set(title=title, xlabel="training images per class")
        grid[0].set_ylabel("accuracy, %")
        drawing.legend(*grid[0].get_legend_handles_labels(), loc="outside upper left", ncols=6)
        return inline_svg(drawing, "shots", "Accuracy over the number of training images")


def bases_figure(study: Study, train: str) -> str:
    """A panel for each base: changes over the density, up to all parameters."""
    models = study.values("model")
    with figure(2.4 * len(models), 3.1, ncols=len(models)) as (drawing, grid):
        for axes, model in zip(grid, models, strict=True):
            for roles, colour, label in zip(
                _BOTH, ("s2", "after"), ("in distribution", "mean of shifted"), strict=True
            ):
                where = {"model": model, "train": train}
                zero = study.mean(roles, method="zero-shot", **where).mean
                found = [study.mean(roles, method=m, **where) for m in (*SPARSE, "full")]
                axes.errorbar(
                    [*SPARSE.values(), 1.0], [100 * (each.mean - zero) for each in found],
                    yerr=[100 * each.error for each in found], marker="o", markersize=5, capsize=2,
                    color=PLACEHOLDERS[colour], label=label,
                )  # fmt: skip
            axes.axhline(0, color=PLACEHOLDERS["ink"], linewidth=1)
            axes.set_xscale("log")
            axes.set_xticks([1e-4, 1e-3, 1e-2, 1e-1, 1], ["0.01", "0.1", "1", "10", "all"])
            axes.minorticks_off()
            axes.set(title=model, xlabel="% of the parameters")
        grid[0].set_ylabel("change from zero-shot, points")
        drawing.legend(*grid[0].get_legend_handles_labels(), loc="outside upper left", ncols=2)
        return inline_svg(drawing, "bases", "Change of accuracy over density, by pretrained model")


# The page -----------------------------------------------------------------------------------------


def blocks() -> dict[str, str]:
    """What stands between the markers of the page, by their name."""
    shift, cross, scale = Study.load("shift"), Study.load("cross-dataset"), Study.load(*BASES)
    noisy = "builtin:noisy"
    return {
        "noisy": of_methods(shift, noisy),
        "mnist": of_methods(shift, "builtin:mnist"),
        "new": of_new_classes(Study.load("base-to-new")),
        "cross": of_other_data(cross, noisy),
        "way": of_ways(cross, noisy),
        "shots": of_shots(Study.load("shots")),
        "bases-noisy": of_bases(scale, noisy),
        "bases-mnist": of_bases(scale, "builtin:mnist"),
        "large": of_methods(Study.load("large"), noisy),
        "shifts": of_shifts(scale, "tiny", noisy),
        "shifts-large": of_shifts(scale, "large", noisy),
        "rules": of_rules(scale),
        "rates": of_rates(scale),
    }


def pictures() -> list[Picture]:
    """The figures of the page."""
    shift, cross, scale = Study.load("shift"), Study.load("cross-dataset"), Study.load(*BASES)
    train = "builtin:noisy"
    return [
        Picture("changes", "Changes by method", changes_figure(shift, train)),
        Picture("way", "The way back to the pretrained weights", way_figure(cross, train)),
        Picture("shots", "Accuracy by number of images", shots_figure(Study.load("shots"))),
        Picture("bases", "Changes by base and density", bases_figure(scale, train)),
    ]


def markers(name: str) -> tuple[str, str]:
    """The lines around a block."""
    return f"<!-- {name}:begin -->", f"<!-- {name}:end -->"


def main() -> None:
    """Write all of them."""
    for name, text in blocks().items():
        update_block(PAGE, text, markers(name))
    FIGURES.mkdir(exist_ok=True)
    for picture in pictures():
        for theme, colours in themes().items():
            with atomic_write(FIGURES / f"{picture.name}-{theme}.svg") as temporary:
                temporary.write_text(standalone(picture.svg, colours), encoding="utf-8")


if __name__ == "__main__":
    main()

"""The page of the study says what its results say."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

STUDY = Path(__file__).parent.parent / "docs" / "study"
PAGE = (STUDY / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def summary():
    return runpy.run_path(str(STUDY / "summary.py"))


def plain(text):
    """Without what depends on the random signs that SciPy draws."""
    return re.sub(r" \(p = [^)]*\)| [↑↓]", "", text)


def test_the_tables_are_those_of_the_results(summary):
    blocks = summary["blocks"]()
    assert set(re.findall(r"<!-- ([\w-]+):begin -->", PAGE)) == blocks.keys()
    for name, text in blocks.items():
        begin, end = summary["markers"](name)
        assert plain(f"{begin}\n{text}{end}") in plain(PAGE), "run python docs/study/summary.py"


def test_every_figure_is_there_and_shown(summary):
    for picture in summary["pictures"]():
        for theme in ("light", "dark"):
            name = f"figures/{picture.name}-{theme}.svg"
            assert (STUDY / name).stat().st_size > 1000
            assert name in PAGE


def test_every_plan_has_its_results():
    """As many lines as the plan asks for: none has failed, none is missing."""
    from saft_clip.experiment.cells import final_cells, trial_cells
    from saft_clip.experiment.plan import Plan
    from saft_clip.experiment.record import read_plan

    _, _, not_run = PAGE.partition("## Not run yet")
    for file in STUDY.glob("*.yaml"):
        if file.name in not_run:
            continue
        plan, run = Plan.load(file), read_plan(STUDY / file.stem)
        assert run == plan, f"{file.name} is not what was run"
        chosen = {cell.contest: {} for cell in trial_cells(plan, Path())}
        cells = {(*c.contest, c.shots, c.seed) for c in final_cells(plan, Path(), chosen)}
        lines = (STUDY / file.stem / "results.csv").read_text().splitlines()[1:]
        assert len({tuple(line.split(",")[i] for i in range(5)) for line in lines}) == len(cells)

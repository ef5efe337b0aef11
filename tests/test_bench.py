"""The benchmarks' own logic, and every case on a tiny model. No times are judged here."""

from __future__ import annotations

import copy
import json
import random
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typer.testing import CliRunner

from bench import cli, correctness, limits, tables
from bench.bars import held_to
from bench.cases import (
    accumulate_topk,
    clip_finetune,
    clip_step,
    prompt_step,
    sampled_grad,
    sparse_adamw,
    step_account,
)
from bench.cli import app, measure_cases
from bench.environment import environment, watch_load
from bench.flops import Flops
from bench.harness import Contender, Effort, WrongResultError, measure, require
from bench.limits import Needs, buffer_bytes, buffers, last_level_cache
from bench.memory import load_work
from bench.models import (
    COLUMNS,
    ROWS,
    SMOKE,
    Setting,
    candidates,
    concentrated_mask,
    make_task,
    uniform_mask,
    workload,
)
from bench.outcome import Figure, Memory, MemoryUse, Outcome, Sweep, Timing, first_quartile
from bench.ratios import (
    _student,
    fitted_exponent,
    format_seconds,
    middle_mean,
    ratio,
    times_faster,
)
from bench.registry import CASES, Case, run_case
from bench.result_file import (
    BEGIN,
    END,
    ResultError,
    outcome_record,
    read_result,
    update_block,
    write_result,
)
from saft_kernels import CooMask, backends

pytestmark = pytest.mark.usefixtures("small_limits", "one_thread")

#: test_bench_gpu.py has the others.
ON_CPU = [name for name, case in CASES.items() if not case.on_gpu]

#: They share weights, gradients and masks with others.
SHARING = (
    "clip_step",
    "accumulate_topk",
    "gather_scatter",
    "sparse_adamw",
    "delta",
    "clip_select",
    "step_account",
)

TWO_ROUNDS = Effort(seconds=0.0, least=2, most=2, warm_up=1)


def timing(*seconds: float, **more: Any) -> Timing:
    return Timing("group", "name", list(seconds), list(seconds), **more)


def accept(run: Callable[[], Any]) -> None:
    run()


# Measuring ----------------------------------------------------------------------------------------


def test_wrong_result_is_refused_and_nothing_is_timed() -> None:
    runs = {"right": 0, "wrong": 0}

    def work(name: str) -> Callable[[], str]:
        def run() -> str:
            runs[name] += 1
            return name

        return run

    def check(run: Callable[[], Any]) -> None:
        require(run() == "right", "it is wrong")

    contenders = [Contender(name, work(name), check) for name in runs]
    with pytest.raises(WrongResultError, match=r"group: wrong is not timed: it is wrong"):
        measure("group", contenders, TWO_ROUNDS)
    assert runs == {"right": 1, "wrong": 1}


@pytest.mark.parametrize("calls", [0, 2])
def test_check_must_run_the_contender_once(calls: int) -> None:
    def check(run: Callable[[], Any]) -> None:
        for _ in range(calls):
            run()

    with pytest.raises(WrongResultError, match=f"ran it {calls} times, not once"):
        measure("group", [Contender("name", lambda: None, check)], TWO_ROUNDS)


def test_rounds_are_interleaved_shuffled_and_prepared() -> None:
    log: list[str] = []

    def contender(name: str) -> Contender:
        return Contender(name, lambda: log.append(name), accept, lambda: log.append(f"-{name}"))

    effort = Effort(seconds=0.0, least=12, most=12, warm_up=1)
    timings = measure("group", [contender(name) for name in "abc"], effort)
    assert [len(t.seconds) for t in timings.values()] == [12] * 3
    assert log[::2] == [f"-{name}" for name in log[1::2]]  # each run right after its preparation
    runs = log[1::2]
    rounds = ["".join(runs[i : i + 3]) for i in range(0, len(runs), 3)]
    assert len(rounds) == 1 + 1 + 12  # checked, warm-up, kept
    assert {"".join(sorted(order)) for order in rounds} == {"abc"}
    assert len(set(rounds)) > 3


def test_order_of_rounds_is_reproducible() -> None:
    def order(seed: int) -> list[str]:
        log: list[str] = []
        contenders = [Contender(n, lambda n=n: log.append(n), accept) for n in "abcd"]  # type: ignore[misc]
        measure("group", contenders, Effort(0.0, 5, 5), seed=seed)
        return log

    assert order(1) == order(1) != order(2)


def test_contenders_need_names_of_their_own() -> None:
    with pytest.raises(ValueError, match="two contenders"):
        measure("group", [Contender("same", lambda: None, accept)] * 2, TWO_ROUNDS)


def test_floor_is_the_time_of_a_copy_of_as_many_bytes() -> None:
    contenders = [
        Contender("light", lambda: None, accept, needs=Needs(10**6)),
        Contender("heavy", lambda: None, accept, needs=lambda: Needs(10**9)),
        Contender("unknown", lambda: None, accept),
    ]
    light, heavy, unknown = measure("group", contenders, TWO_ROUNDS).values()
    assert light.floor is not None
    assert heavy.floor == pytest.approx(1000 * light.floor)
    assert 1e-7 < light.floor < 1  # between 10 TB/s and 1 MB/s
    assert unknown.floor is None
    assert unknown.reached is None


def test_effort_bounds_the_rounds() -> None:
    effort = Effort(seconds=10, least=3, most=20)
    assert [effort.rounds(each) for each in (100, 1, 1e-6)] == [3, 10, 20]


def test_a_slow_checked_run_does_not_cost_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    def run() -> None:
        nonlocal now
        now += 0.01 if now else 1.0

    monkeypatch.setattr(time, "perf_counter", lambda: now)
    contenders = [Contender("slow at first", run, lambda run: run())]
    effort = Effort(seconds=0.4, least=2, most=30, warm_up=1)
    assert len(measure("group", contenders, effort)["slow at first"].seconds) == 30


# Statistics ---------------------------------------------------------------------------------------


def test_buffers_are_no_smaller_than_the_caches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert last_level_cache(tmp_path) == 0
    for cpu in range(4):  # two processors of two cores
        for level, size, shared in ((1, "48K", cpu), (2, "2048K", cpu), (3, "300M", cpu // 2)):
            folder = tmp_path / f"cpu{cpu}" / "cache" / f"index{level}"
            folder.mkdir(parents=True)
            for name, text in (("level", level), ("size", size), ("shared_cpu_list", shared)):
                (folder / name).write_text(f"{text}\n")
    assert last_level_cache(tmp_path) == 600 << 20
    source, target = buffers(torch.device("cpu"))
    assert source.nbytes == target.nbytes == buffer_bytes(torch.device("cpu"))
    for cache, least, size in ((600, 128, 600), (64, 128, 128)):
        monkeypatch.setitem(limits.BUFFER_BYTES, "cpu", least)
        monkeypatch.setattr(limits, "last_level_cache", lambda cache=cache: cache)
        assert buffer_bytes.__wrapped__(torch.device("cpu")) == size


def test_limits_are_held_to_first_quartiles() -> None:
    assert first_quartile([3.0]) == 3
    assert first_quartile([5.0, 1.0, 4.0, 2.0, 30.0]) == 2
    disturbed = timing(1.0, 1.1, 1.2, 9.0, 9.0)
    assert (disturbed.calm, disturbed.median) == (1.1, 1.2)
    assert timing(1.0, 1.1, 1.2, 9.0, 9.0, moves=11, bandwidth=100.0).reached == pytest.approx(0.1)


def test_ratio_of_times_and_its_interval() -> None:
    noise = random.Random(0).gauss
    slow = timing(*(noise(10, 0.5) for _ in range(40)))
    fast = timing(*(noise(2, 0.1) for _ in range(40)))
    value, low, high = ratio(slow, fast)
    assert value == pytest.approx(5, rel=0.02)
    assert low < 5 < high
    assert high - low < 0.5
    assert ratio(slow, fast) == (value, low, high)


@pytest.mark.parametrize("rounds", [2, 3, 7, 25])
def test_interval_covers_the_truth(rounds: int) -> None:
    """Also with few rounds, and where the noise only adds."""
    covered = 0
    for seed in range(200):
        draw = random.Random(seed)
        slow = timing(*(3 * (1 + draw.expovariate(8)) for _ in range(rounds)))
        fast = timing(*(1 + draw.expovariate(8) for _ in range(rounds)))
        _, low, high = ratio(slow, fast)
        covered += low <= 3 <= high
    assert covered >= 176  # of 200; 190 are expected of a 95 % interval, 100 of a plain bootstrap


def test_ratio_is_one_within_rounds() -> None:
    """A processor that is slow for some rounds, and what spoils one of them, count for nothing."""
    speeds = [1.0, 1.0, 2.1, 2.0, 2.2, 1.1, 2.0, 1.9]
    slow, fast = ([seconds * speed for speed in speeds] for seconds in (3.0, 2.0))
    assert ratio(timing(*slow), timing(*fast)) == pytest.approx((1.5, 1.5, 1.5))
    _, low, high = ratio(timing(*slow), timing(*reversed(fast)))  # other rounds say less
    assert high > 1.5 * low
    slow[4] *= 50
    assert ratio(timing(*slow), timing(*fast))[0] == pytest.approx(1.5)


def test_mean_of_the_middle_half() -> None:
    assert middle_mean([3.0]) == 3
    assert middle_mean([1.0, 2.0, 6.0]) == 3
    assert middle_mean([100.0, 2.0, 4.0, -100.0]) == 3
    assert middle_mean([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 80.0]) == 4.5


def test_exponent_is_one_within_rounds() -> None:
    speeds = [1.0, 2.0, 1.9, 1.0]
    timings = [timing(*(size**0.5 * speed for speed in speeds)) for size in (1, 4, 16)]
    assert fitted_exponent([1, 4, 16], timings) == pytest.approx((0.5, 0.5, 0.5))


def test_interval_grows_with_the_noise() -> None:
    def width(noise: float) -> float:
        draw = random.Random(0)
        slow, fast = (timing(*(draw.gauss(3, noise) for _ in range(20))) for _ in range(2))
        _, low, high = ratio(slow, fast)
        return high - low

    assert width(0.01) < 0.2 * width(0.1)


def test_students_t() -> None:
    assert _student(9) == pytest.approx(2.2622, abs=1e-3)
    assert _student(10) == pytest.approx(2.2281, abs=3e-3)
    assert _student(30) == pytest.approx(2.0423, abs=1e-3)
    assert _student(10**9) == pytest.approx(1.95996, abs=1e-4)
    with pytest.raises(ValueError, match="a single round"):
        ratio(timing(1.0), timing(2.0))


def test_ratio_resamples_rounds_so_that_common_disturbance_cancels() -> None:
    disturbance = [1.0, 5.0] * 10
    _, low, high = ratio(
        timing(*(6 * d for d in disturbance)), timing(*(2 * d for d in disturbance))
    )
    assert (low, high) == pytest.approx((3.0, 3.0))


def test_figures_against_their_bars() -> None:
    thirty = times_faster("it", timing(30, 30), timing(1, 1))
    assert held_to("selection/gradients", thirty).verdict == "PASS"
    assert held_to("adamw/dense/selected", thirty).verdict == "MISS"
    assert held_to("adamw/state", Figure("it", 20.1, "bytes")).verdict == "MISS"
    assert Figure("it", 1.4, "", bar=1.3, at_least=False).verdict == "MISS"
    assert Figure("it", float("nan"), "", bar=1.3, at_least=False).verdict == "MISS"
    assert Figure("it", 1.4, "").verdict == ""


@pytest.mark.parametrize(
    ("low", "high", "at_least", "verdict"),
    [
        (28, 31, True, "UNCLEAR"),
        (28, 29.9, True, "MISS"),
        (30, 34, True, "PASS"),
        (29, 31, False, "UNCLEAR"),
        (28, 30, False, "PASS"),
        (30.1, 34, False, "MISS"),
    ],
)
def test_no_verdict_inside_the_noise(low: float, high: float, at_least: bool, verdict: str) -> None:
    value = (low + high) / 2
    assert Figure("it", value, "", low, high, bar=30, at_least=at_least).verdict == verdict


def test_fitted_exponent() -> None:
    sizes = [1.0, 2.0, 4.0, 8.0]
    draw = random.Random(0)
    squares = [timing(*(size**2 * draw.gauss(1, 0.02) for _ in range(20))) for size in sizes]
    exponent, low, high = fitted_exponent(sizes, squares)
    assert low < 2 < high
    assert exponent == pytest.approx(2, abs=0.02)
    assert 0 < high - low < 0.1


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (12.34, "12.3 s"),
        (1.0, "1.00 s"),
        (0.4321, "432 ms"),
        (0.0015, "1.50 ms"),
        (2e-7, "0.200 µs"),
    ],
)
def test_format_seconds(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


def test_load_of_other_programs_is_a_share() -> None:
    with watch_load() as load:
        sum(range(10**6))
    assert load.others is None or 0 <= load.others <= 1
    assert load.average is not None


# Cases --------------------------------------------------------------------------------------------


@pytest.fixture
def memory_of_this_process(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Runs the work whose memory is asked for here, which is faster; the functions asked for."""
    return measure_memory_here(monkeypatch)


def measure_memory_here(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    asked: list[str] = []

    def stand_in(function: str, **arguments: Any) -> Memory:
        asked.append(function)
        load_work(function, json.loads(json.dumps(arguments)))()
        return Memory(peak=1 << 20)

    for case in (accumulate_topk, clip_finetune, clip_step):
        monkeypatch.setattr(case, "peak_memory", stand_in)
    return asked


#: What the command line can set of a setting and a case can ignore.
OPTIONS = ("model", "pretrained", "images", "prompts", "density", "dtype")


class Watched(Setting):
    """A setting that knows what a case has read of it."""

    read: ClassVar[set[str]] = set()
    small = property(lambda self: True)  # asks for small sizes, whatever the model

    def __getattribute__(self, name: str) -> Any:
        # A copy with changes reads everything, and means nothing by it.
        if name in OPTIONS and sys._getframe(1).f_globals["__name__"] != "dataclasses":
            Watched.read.add(name)
        return super().__getattribute__(name)

    def __hash__(self) -> int:  # a cache that looks at all of it means nothing by it, either
        return id(self)

    def __eq__(self, other: object) -> bool:
        return self is other


@pytest.mark.parametrize("name", [name for name in ON_CPU if name != "clip_step"])
@pytest.mark.usefixtures("no_figures")
def test_case_runs_on_a_tiny_model_and_says_what_it_ignores(
    name: str, memory_of_this_process: list[str]
) -> None:
    run_on_a_tiny_model(name)


def run_on_a_tiny_model(name: str) -> Outcome:
    """Run a case, and look at its record and at what it reads of its setting."""
    case, outcomes = CASES[name], []

    def run(setting: Setting) -> Outcome:
        outcomes.append(case.run(setting))
        return outcomes[0]

    Watched.read.clear()
    with nothing_shared_changes() if name in SHARING else nullcontext():
        record = run_case(replace(case, run=run), Watched(**vars(SMOKE)))
    assert record["refused"] is None
    assert record["left_out"] is None
    assert record["figures"]
    assert record["timings"]
    json.dumps(record, allow_nan=False)
    assert set(OPTIONS) - Watched.read <= set(CASES[name].fixed)
    assert ("model" in Watched.read) != ("model" in CASES[name].fixed)
    return outcomes[0]


def test_what_a_case_has_of_its_own_does_not_reach_it() -> None:
    case = Case("a", "case", lambda setting: Outcome(), fixed=("model", "images", "dtype"))
    asked = replace(SMOKE, images=7, prompts=8, dtype="bf16")
    own = case.own(asked)
    assert (own.images, own.dtype, own.prompts) == (16, "fp32", 8)
    assert own.small
    assert case.ignored(asked) == ["model", "batch", "dtype"]
    assert case.ignored(Setting(prompts=8)) == []


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("accumulate_topk", "bf16"),
        ("gather_scatter", "fp16"),
        ("sparse_adamw", "fp16"),
        ("sampled_grad", "bf16"),
        ("delta", "bf16"),
    ],
)
def test_operations_run_in_16_bits(
    name: str, dtype: str, memory_of_this_process: list[str]
) -> None:
    record = run_case(CASES[name], replace(SMOKE, dtype=dtype))
    assert record["refused"] is None
    assert record["timings"]


def test_training_steps_run_with_weights_of_16_bits(memory_of_this_process: list[str]) -> None:
    record = run_case(CASES["clip_step"], replace(SMOKE, dtype="bf16"))
    assert record["refused"] is None
    assert {timing["group"] for timing in record["timings"]} == {
        "training step in amp_bf16, 4 images and 4 prompts"
    }


def test_backend_and_threads_are_those_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str | None, int]] = []

    def look(setting: Setting) -> Outcome:
        seen.append((backends.requested_backend(), torch.get_num_threads()))
        return Outcome()

    before = backends.requested_backend(), torch.get_num_threads()
    case = Case("look", "a case", look)
    run_case(case, SMOKE)
    run_case(case, replace(SMOKE, backend="reference", threads=3))
    assert seen == [before, ("reference", 3)]
    assert (backends.requested_backend(), torch.get_num_threads()) == before


def test_reference_is_a_backend_that_can_be_measured() -> None:
    record = run_case(CASES["gather_scatter"], replace(SMOKE, backend="reference"))
    assert record["refused"] is None
    assert record["timings"]


def test_models_of_timm_take_training_steps(memory_of_this_process: list[str]) -> None:
    record = run_case(CASES["clip_step"], replace(SMOKE, model="test_vit"))
    assert record["refused"] is None
    assert {timing["name"] for timing in record["timings"]} >= {clip_step.FULL, clip_step.SAMPLED}


@pytest.mark.parametrize("name", ["encode_prompts", "prompt_step"])
def test_models_without_a_text_tower_are_left_out(name: str) -> None:
    record = run_case(CASES[name], replace(SMOKE, model="test_vit"))
    assert "test_vit is none" in record["left_out"]
    assert not record["timings"]


@contextmanager
def nothing_shared_changes() -> Iterator[None]:
    """Whatever runs within leaves what cases share as it was."""
    work = workload(SMOKE)
    before = {n: p.detach().clone() for n, p in work.task.model.named_parameters()}
    gradients = {n: g.clone() for n, g in work.gradients.items()}
    yield
    for name, param in work.task.model.named_parameters():
        assert torch.equal(param, before[name]), name
        assert param.grad is None
    for name, gradient in work.gradients.items():
        assert torch.equal(gradient, gradients[name]), name
    assert work.masks["uniform"] == uniform_mask(work.task.model, SMOKE.density)


@pytest.fixture(scope="module")
def whole_steps() -> Outcome:
    """Of all ways to take a training step: a minute's work."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        measure_memory_here(monkeypatch)
        return run_on_a_tiny_model("clip_step")


def test_rows_say_what_a_method_trains(whole_steps: Outcome) -> None:
    noted = [f.what for f in whole_steps.figures if f.what.endswith(" measured")]
    left_out = {what.removesuffix(" measured") for what in noted}
    assert left_out <= {clip_step.ADAMW_8BIT}  # whose library few have
    timed = {timing.name for timing in whole_steps.timings}
    assert timed == clip_step.WAYS.keys() - left_out
    bf16 = {timing.name for timing in whole_steps.timings if "amp_bf16" in timing.group}
    assert bf16 == set(clip_step.HELD_IN_BF16)
    for row in (*whole_steps.timings, *whole_steps.memory):
        assert row.covers == clip_step.WAYS[row.name].covers


def test_sampled_steps_are_held_to_their_rivals(whole_steps: Outcome) -> None:
    """To the faster LoRA, and to index-and-hook with the same mask."""
    outcome = whole_steps
    held = [f for f in outcome.figures if f.check.endswith("/lora")]
    assert [figure.bar for figure in held] == [1.0] * 6  # three masks, two precisions
    for precision in ("fp32", "amp_bf16"):
        group = f"training step in {precision}, 4 images and 4 prompts"
        times = {t.name: t.calm for t in outcome.timings if t.group == group}
        fastest = min(clip_step.OTHERS["lora"], key=times.__getitem__)
        assert sum(f.what.endswith(f"{precision}: {name} against {fastest}")
                   for f in held for name in clip_step.ALL_SAMPLED) == 3  # fmt: skip
    held = [f for f in outcome.figures if f.check.endswith("/index-and-hook")]
    assert len(held) == 6
    for figure in held:
        mask = figure.check.split("/")[2]
        assert figure.what.count(f"{mask} mask") == 2, figure.what
    assert [use.name for use in outcome.memory].count(clip_step.LORA) == 1


def test_broken_kernel_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    original = sparse_adamw.sparse_adamw_

    def no_decay(*arguments: Any, weight_decay: float, **options: Any) -> None:
        original(*arguments, weight_decay=0.0, **options)

    monkeypatch.setattr(sparse_adamw, "sparse_adamw_", no_decay)
    record = run_case(CASES["sparse_adamw"], SMOKE)
    assert "not where one AdamW step leads" in record["refused"]
    assert not record["timings"]
    assert not record["figures"]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_wrong_moments_are_refused(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    original = sparse_adamw.sparse_adamw_

    def other_beta(*arguments: Any, **options: Any) -> None:
        original(*arguments, betas=(0.9, 0.998), **options)

    monkeypatch.setattr(sparse_adamw, "sparse_adamw_", other_beta)
    record = run_case(CASES["sparse_adamw"], replace(SMOKE, dtype=dtype))
    assert "its second moments are wrong" in record["refused"]


def test_weights_too_coarse_for_a_step_are_refused_if_their_exact_values_stay(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    original = sparse_adamw.sparse_adamw_

    def forgetful(*arguments: Any, master: Tensor, **options: Any) -> None:
        original(*arguments, master=master.clone(), **options)

    monkeypatch.setattr(sparse_adamw, "sparse_adamw_", forgetful)
    record = run_case(CASES["sparse_adamw"], replace(SMOKE, dtype="bf16"))
    assert "its exact values are not where one AdamW step leads" in record["refused"]


def test_write_outside_the_mask_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    original = sparse_adamw.sparse_adamw_

    def careless(params: Any, *arguments: Any, **options: Any) -> None:
        original(params, *arguments, **options)
        params[0].data.view(-1)[:64] += 1e-12  # too little to be seen by a tolerance

    monkeypatch.setattr(sparse_adamw, "sparse_adamw_", careless)
    assert "changed outside the mask" in run_case(CASES["sparse_adamw"], SMOKE)["refused"]


def test_wrong_selection_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class OneShort(accumulate_topk.StreamingTopK):
        def finish(self) -> Any:
            chosen = super().finish()
            first = next(iter(chosen))
            chosen[first] = chosen[first][:-1]
            return chosen

    monkeypatch.setattr(accumulate_topk, "StreamingTopK", OneShort)
    assert "are selected" in run_case(CASES["accumulate_topk"], SMOKE)["refused"]


def test_what_has_no_bar_can_be_left_out(memory_of_this_process: list[str]) -> None:
    outcome = clip_step.run(replace(SMOKE, bars_only=True))
    measured = {each.name for each in (*outcome.timings, *outcome.memory)}
    assert measured == set(clip_step.HELD)
    assert len(memory_of_this_process) == len(clip_step.HELD)


@pytest.mark.parametrize("chunk", [7, 20])
def test_padded_step_in_chunks_has_the_gradients_of_one_batch(chunk: int) -> None:
    task = make_task("saft-tiny", 4, 20)
    model: Any = copy.deepcopy(task.model)
    images = F.normalize(model.encode_image(task.images), dim=-1)
    classes = F.normalize(model.encode_text(task.tokens.flatten(0, 1)), dim=-1)
    loss = F.cross_entropy(model.logit_scale.exp() * images @ classes.T, task.labels)
    loss.backward()
    params = candidates(model)
    expected = {name: p.grad for name, p in params.items() if p.grad is not None}

    padded = prompt_step.PaddedStep(task, chunk)
    padded.find_classes()
    torch.testing.assert_close(padded.classes, classes.detach())
    value, gradients = prompt_step.watch(padded.step, padded.model)
    assert value == pytest.approx(loss.item(), rel=1e-6)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6, msg=name)
    assert all(param.grad is None for param in padded.model.parameters())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda loss: 1.01 * loss, "its loss is"),
        (lambda loss: 1.01 * loss - 0.01 * loss.detach(), "the gradient of .* differs"),
    ],
)
def test_packed_step_with_another_loss_is_refused(
    change: Callable[[Tensor], Tensor], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = prompt_step.sampled

    def wrong(model: nn.Module, mask: Any, loss: Callable[[nn.Module], Tensor]) -> Any:
        return original(model, mask, lambda model: change(loss(model)))

    monkeypatch.setattr(prompt_step, "sampled", wrong)
    assert re.search(reason, run_case(CASES["prompt_step"], SMOKE)["refused"])


def test_bar_of_the_prompt_step_is_for_the_lower_bound() -> None:
    figures = prompt_step.run(SMOKE).figures
    assert [figure.bar for figure in figures] == [4, None] * 2
    for bound, both in zip(figures[::2], figures[1::2], strict=True):
        assert "lower bound" in bound.what
        assert bound.value < both.value


@pytest.mark.parametrize(
    ("speeds", "value", "note"),
    [
        ([20, 2, 0.5], 10**-1.5, "interpolated between 0.01 and 0.1"),
        ([20, 2, 1.5], 0.1, "above 0.1"),
        ([0.9, 0.5, 0.4], 0.001, "below 0.001"),
    ],
)
def test_crossover_is_interpolated_on_logarithms(
    speeds: list[float], value: float, note: str
) -> None:
    figure = sampled_grad.crossover([0.001, 0.01, 0.1], speeds)
    assert figure.value == pytest.approx(value)
    assert figure.note == note


@pytest.mark.parametrize(
    ("few", "many", "right", "verdict"),
    [
        ([0.5, 0.5], [2.0, 2.0], 2, "PASS"),
        ([0.5, 2.0], [0.5, 2.0], 2, "PASS"),  # nobody knows
        ([2.0, 2.0], [2.0, 2.0], 1, "MISS"),
        ([0.5, 0.5], [0.5, 0.5], 1, "MISS"),
    ],
)
def test_automatic_choice_is_wrong_where_it_is_surely_slower(
    few: list[float], many: list[float], right: int, verdict: str
) -> None:
    densities = [sampled_grad.CROWDED, 3 * sampled_grad.CROWDED]
    figure = sampled_grad.automatic_choice(
        densities, [timing(*few), timing(*many)], timing(1.0, 1.0)
    )
    assert (figure.value, figure.verdict) == (right, verdict)


def test_growth_of_the_sampled_gradient_is_held_to_its_bar() -> None:
    figures = sampled_grad.run(SMOKE).figures
    growth = [figure for figure in figures if figure.check.startswith("sampled/growth")]
    assert [figure.bar for figure in growth] == [1.1] * 2


def test_same_gradients_are_those_at_the_selected_entries() -> None:
    expected = {"a": torch.tensor([1.0, -2.0, 3.0]), "b": torch.tensor([1e-9, 0.0])}
    mask = CooMask({"a": torch.tensor([0, 2], dtype=torch.int32)}, {"a": torch.Size([3])})
    rounded = {name: gradient * (1 + 1e-5) for name, gradient in expected.items()}
    correctness.require_same_gradients(rounded, expected)
    correctness.require_same_gradients({"a": torch.tensor([1.0, 0.0, 3.0])}, expected, mask)
    with pytest.raises(WrongResultError, match="other parameters"):
        correctness.require_same_gradients(rounded, expected, mask)
    for wrong in ([1.1, 0.0, 3.0], [1.0, 0.0, float("nan")]):
        with pytest.raises(WrongResultError, match="'a' differs"):
            correctness.require_same_gradients({"a": torch.tensor(wrong)}, expected, mask)


def test_concentrated_mask_has_as_many_entries_in_few_rows_and_columns() -> None:
    model = nn.Sequential(nn.Conv2d(3, 40, 5), nn.Linear(200, 100))
    mask, uniform = concentrated_mask(model, 1e-2), uniform_mask(model, 1e-2)
    counts = [{name: index.numel() for name, index in each.items()} for each in (mask, uniform)]
    assert counts[0] == counts[1]
    for name, width in (("0.weight", 75), ("1.weight", 200)):
        rows, columns = mask[name] // width, mask[name] % width
        assert len(columns.unique()) <= COLUMNS * width
        assert len(rows.unique()) <= ROWS * len(model.get_parameter(name))


def test_operations_of_attention_are_counted() -> None:
    q = torch.randn(2, 4, 30, 8, requires_grad=True)
    flops = Flops()
    with flops.counting():
        F.scaled_dot_product_attention(q, q, q).sum().backward()
    product = 2 * 2 * 4 * 30 * 30 * 8
    assert (flops.dense, flops.sampled) == (product * (2 + 5), 0)


def test_step_account_leaves_no_kernel_out() -> None:
    outcome = step_account.run(SMOKE)
    shares = [f for f in outcome.figures if f.what.startswith("share of one step in fp32")]
    assert len(shares) == 2 * (len(step_account.LINES) + 2)
    for half in (shares[: len(shares) // 2], shares[len(shares) // 2 :]):
        assert sum(figure.value for figure in half) == pytest.approx(100, abs=10)  # medians
        assert any("sampled products" in f.what and f.value > 0 for f in half)


def test_step_account_says_what_its_phases_need() -> None:
    forward, backward, optimizer = step_account.run(SMOKE).timings[:3]
    weights = sum(param.nbytes for param in candidates(workload(SMOKE).task.model).values())
    for phase in (forward, backward):
        assert phase.moves == weights
        assert phase.flops > 0
        assert min(phase.cpu_seconds) > 0
        assert phase.floor is not None
    assert backward.flops > forward.flops
    assert optimizer.moves is not None
    assert 0 < optimizer.moves < weights


# Reports ------------------------------------------------------------------------------------------

PARTS = {"weights": 10 << 20, "state": 2 << 20, "gradients": 3 << 20, "activations": 5 << 20}


@pytest.fixture
def result(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A result with one case that ran and one that was refused."""
    outcome = Outcome(
        [timing(0.2, 0.4, moves=150, flops=10, bandwidth=1e3, rate=1e3, covers="half of it")],
        [Figure("speed", 31.5, "times faster", 30.2, 32.9, bar=30, note="3.15 s against 100 ms")],
        [Sweep("group", "ours", "tokens", [1.0, 2.0], ["name", "name"], 1.0, (1.0, 2.0))],
        [MemoryUse("group", "name", peak=30 << 20, **PARTS)],
    )

    def refuse(setting: Setting) -> Outcome:
        raise WrongResultError("group: other is not timed: it is wrong")

    one = Case("one", "a case", lambda setting: outcome, fixed=("images", "dtype"))
    monkeypatch.setitem(CASES, "one", one)
    monkeypatch.setitem(CASES, "two", Case("two", "another", refuse))
    measured = measure_cases(["one", "two"], Setting(), None)
    for case in measured["cases"].values():  # whatever else runs beside the tests
        case["load"]["others"] = 0.0
    return measured


def test_report_shows_figures_bars_floors_and_refusals(result: dict[str, Any]) -> None:
    lines = tables.markdown(result).splitlines()
    assert (
        "| speed | 31.5 (30.2 to 32.9) times faster | 3.15 s against 100 ms | ≥ 30 | PASS |"
        in lines
    )
    row = "| group | name | half of it | 300 ms | 250 ms to 350 ms | 300 ms |"
    assert f"{row} 0.00015 MB | 1e-08 G | 150 ms | 60% |" in lines
    assert "| group | name | 30 MiB | 10 MiB | 2 MiB | 3 MiB | 5 MiB | 10 MiB |" in lines
    assert "**two was refused:** group: other is not timed: it is wrong" in lines
    assert result["environment"]["commit"][:12] in lines[0]
    assert "ViT-B-16 (random weights, fp32, 16 images, 16 prompts" in lines[0]
    assert lines[2].endswith("what of the above does not change them: one (batch, dtype).")


def test_report_marks_what_was_measured_on_a_busy_machine(result: dict[str, Any]) -> None:
    result["cases"]["one"]["load"]["others"] = 0.5
    text = tables.markdown(result)
    assert "Other programs used up to 50% of the processors" in text
    assert "† Measured while other programs used more than 10%" in text
    assert "| speed † |" in text
    assert "| group † |" in text
    for case in result["cases"].values():
        case["load"]["others"] = 0.01
    assert "†" not in tables.markdown(result)


def test_result_file_round_trip(result: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    write_result(file, result)
    again = read_result(file)
    assert tables.markdown(again) == tables.markdown(result)
    assert again["setting"] == json.loads(json.dumps(asdict(Setting())))
    for key in ("processor", "instruction_set", "threads", "torch", "commit", "load_average"):
        assert key in again["environment"]


def test_environment_names_what_multiplies_and_how_threads_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("KMP_BLOCKTIME", "0")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    found = environment()
    assert "KMP_BLOCKTIME=0 " in str(found["openmp"])
    assert "OMP_NUM_THREADS=3" in str(found["openmp"])
    assert torch.backends.mkl.is_available() == str(found["blas"]).startswith("mkl 2")
    assert found["timm"] == version("timm")
    assert found["peft"] == version("peft")
    assert re.fullmatch(r"not installed|[0-9.]+.*", str(found["bitsandbytes"]))


def test_a_case_is_measured_again_among_the_others(result: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    result["environment"] |= {"date": "2001-02-03T04:05", "commit": "old"}
    nothing: dict[str, Any] = outcome_record(Outcome()) | {"refused": None, "left_out": None}
    result["cases"] = {name: {**nothing, "load": case["load"]}
                       for name, case in result["cases"].items()}  # fmt: skip
    write_result(file, result)
    again = measure_cases(["one"], Setting(), file)
    assert again == read_result(file)
    assert list(again["cases"]) == ["one", "two"]
    assert len(again["cases"]["one"]["figures"]) == 1
    assert again["cases"]["two"]["commit"] == "old"
    assert "2001-02-03" in tables.markdown(again)
    assert " and old" in tables.markdown(again)


@pytest.mark.parametrize(
    ("part", "key", "value", "said"),
    [
        ("setting", "model", "RN50", "model (RN50 against ViT-B-16)"),
        ("setting", "density", 0.5, "density (0.5 against 0.001)"),
        ("environment", "processor", "abacus", "processor (abacus against "),
        ("environment", "torch", "1.0", "torch (1.0 against "),
        ("environment", "blas", None, "blas (not recorded against "),
    ],
)
def test_a_kept_result_of_something_else_is_not_destroyed(
    part: str, key: str, value: Any, said: str, result: dict[str, Any], tmp_path: Path
) -> None:
    file = tmp_path / "result.json"
    result[part][key] = value
    if value is None:
        del result[part][key]
    write_result(file, result)
    before = file.read_bytes()
    done = CliRunner().invoke(app, ["run", "one", "--output", str(file)])
    assert isinstance(done.exception, ResultError)
    assert f"{file} holds a result with other {said}" in str(done.exception)
    assert "name another file with --output, or remove that one" in str(done.exception)
    assert file.read_bytes() == before


@pytest.mark.parametrize("text", ["# README", '{"format": "saft-bench", "version": 1}'])
def test_what_is_no_result_is_not_destroyed(
    text: str, result: dict[str, Any], tmp_path: Path
) -> None:
    file = tmp_path / "file"
    file.write_text(text)
    done = CliRunner().invoke(app, ["run", "one", "--output", str(file)])
    assert isinstance(done.exception, ResultError)
    assert "exists and is no result of saft-bench version 2; name another" in str(done.exception)
    assert file.read_text() == text


def test_cases_with_other_efforts_stay_and_say_so(result: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    measure_cases(["one", "two"], Setting(), file)
    again = measure_cases(["one"], Setting(bars_only=True, steps=TWO_ROUNDS), file)
    efforts = {name: case["efforts"] for name, case in again["cases"].items()}
    assert [efforts[name]["bars_only"] for name in ("one", "two")] == [True, False]
    assert [efforts[name]["steps"]["least"] for name in ("one", "two")] == [2, 7]


def test_results_are_kept_by_what_was_measured(
    result: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def where(*, gpu: bool = False) -> dict[str, Any]:
        return {**result["environment"], **({"gpu": "Tensor 9"} if gpu else {})}

    monkeypatch.setattr(cli, "RESULTS", tmp_path)
    monkeypatch.setattr(cli, "environment", where)
    monkeypatch.setitem(CASES, "gpu", Case("gpu", "", lambda setting: Outcome(), on_gpu=True))
    for name in ("one", "gpu"):
        done = CliRunner().invoke(app, ["run", name, "--keep"])
        assert done.exit_code == (name == "gpu"), done.exception  # no GPU is described in a table
    release = result["environment"]["saft_kernels"]
    files = {path.name: list(read_result(path)["cases"]) for path in tmp_path.iterdir()}
    assert files.pop(f"tensor-9-{release}.json") == ["gpu"]
    assert list(files.values()) == [["one"]]


@pytest.mark.parametrize("options", [["--smoke"], ["--output", "other.json"]])
def test_keeping_goes_with_whole_results_only(options: list[str]) -> None:
    done = CliRunner().invoke(app, ["run", "delta", "--keep", *options])
    assert isinstance(done.exception, ResultError)
    assert "leave out --keep, or --smoke and --output" in str(done.exception)


def test_update_rewrites_the_block_and_nothing_else(result: dict[str, Any], tmp_path: Path) -> None:
    file, readme = tmp_path / "result.json", tmp_path / "README.md"
    write_result(file, result)
    readme.write_text(f"before\n{BEGIN}\nold figures\n{END}\nafter\n")
    for _ in range(2):
        done = CliRunner().invoke(app, ["report", str(file), "--update", str(readme)])
        assert done.exit_code == 0, done.output
        text = readme.read_text()
        assert text == f"before\n{BEGIN}\n{tables.markdown(result)}{END}\nafter\n"


@pytest.mark.parametrize("text", ["no markers", f"{END} {BEGIN}", BEGIN])
def test_update_needs_both_markers(text: str, tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(text)
    with pytest.raises(ResultError, match="no place for the report"):
        update_block(readme, "new")
    assert readme.read_text() == text


@pytest.mark.parametrize("text", ["", "[]", '{"format": "saft-bench", "version": 99}'])
def test_other_files_are_no_results(text: str, tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    file.write_text(text)
    with pytest.raises(ResultError, match=r"result\.json"):
        read_result(file)


# Command line -------------------------------------------------------------------------------------


def test_list_names_every_case() -> None:
    done = CliRunner().invoke(app, ["list"])
    assert done.exit_code == 0
    assert [line.split()[0] for line in done.output.splitlines()] == list(CASES)


def test_run_prints_the_report_keeps_the_result_and_fails_on_a_refusal(
    result: dict[str, Any], tmp_path: Path
) -> None:
    file = tmp_path / "result.json"
    done = CliRunner().invoke(app, ["run", "one", "--smoke", "--output", str(file)])
    assert done.exit_code == 0, done.output
    assert "| 31.5 (30.2 to 32.9) times faster |" in done.output
    assert list(read_result(file)["cases"]) == ["one"]
    assert CliRunner().invoke(app, ["run", "two", "--smoke"]).exit_code == 1


def test_result_that_could_not_be_kept_is_not_measured(
    result: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(setting: Setting) -> Outcome:
        raise AssertionError("it was measured")

    monkeypatch.setitem(CASES, "one", Case("one", "a case", fail))
    done = CliRunner().invoke(app, ["run", "one", "--output", str(tmp_path / "no" / "r.json")])
    assert isinstance(done.exception, ResultError)
    assert "no is no folder" in str(done.exception)


def test_options_that_a_case_ignores_are_said(result: dict[str, Any]) -> None:
    arguments = ["run", "one", "--batch", "8", "--dtype", "fp32", "--density", "0.5"]
    done = CliRunner().invoke(app, arguments)
    said = "one has sizes or types of its own, which --batch cannot change"
    assert said in " ".join(done.stderr.split())
    assert "of its own" not in CliRunner().invoke(app, ["run", "one"]).stderr


def test_unknown_case_is_one_sentence() -> None:
    done = CliRunner().invoke(app, ["run", "nothing"])
    assert isinstance(done.exception, ResultError)
    assert "there is no case 'nothing'; choose among accumulate_topk" in str(done.exception)


def test_smoke_run_does_not_take_a_size(result: dict[str, Any]) -> None:
    done = CliRunner().invoke(app, ["run", "one", "--smoke", "--batch", "8"])
    assert isinstance(done.exception, ResultError)
    assert "leave out --smoke, or --model" in str(done.exception)

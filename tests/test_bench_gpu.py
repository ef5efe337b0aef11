"""The GPU benchmark's logic, on the CPU: every contender checked, the timer under a fake clock."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from bench import cli as command
from bench import environment, roofline
from bench.allocations import TrainingWork
from bench.cases import gpu
from bench.harness import Contender, Effort, measure
from bench.memory import MeasurementError, load_work
from bench.models import SMOKE, Setting, candidates
from bench.outcome import Memory, Outcome
from bench.registry import CASES, Case, run_case
from bench.result_file import read_result
from bench.tables import markdown
from bench.timers import CPU, CudaTimer
from saft_kernels import backends, ops

pytestmark = pytest.mark.usefixtures("small_limits", "one_thread")

#: What the work whose memory was asked for ran on.
BACKENDS: list[str | None] = []


def in_this_process(function: str, **arguments: Any) -> Memory:
    """Divides the memory of the work as the process of its own would, which takes longer."""
    work = load_work(function, json.loads(json.dumps(arguments)))
    assert isinstance(work, TrainingWork)
    BACKENDS.append(backends.requested_backend())
    work()
    split = work.split()
    return Memory(peak=split.held, **asdict(split))


#: The CPU in the place of a GPU; its "graphs" are calls.
PLACE = gpu.Place(
    torch.device("cpu"), ("cpu",), CPU, CPU, capture=lambda work: work, memory=in_this_process
)


def operation_of(name: str) -> str:
    """The operation of a contender, as for the layer that is modelled."""
    name = re.sub(r"(, CUDA graph)? \(cpu\)$", "", name)
    small, real = gpu.SMALL_TOKENS, roofline.TOKENS
    for ours, theirs in zip(small, real, strict=True):
        name = name.replace(f" {ours} tokens", f" {theirs:,} tokens")
    return name


# The case -----------------------------------------------------------------------------------------


def everything(setting: Setting) -> Outcome:
    outcome = gpu.operations_at(PLACE, setting)
    outcome += gpu.choices_at(PLACE, setting)
    outcome += gpu.steps_at(PLACE, setting)
    return outcome


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    """All of the cases, once; they leave what is shared as it was."""
    work = gpu.workload(SMOKE)
    weights = [param.detach().clone() for param in work.task.model.parameters()]
    gradients = [gradient.clone() for gradient in work.gradients.values()]
    case = Case("gpu", "on the CPU", everything)
    record = run_case(case, SMOKE)
    assert all(map(torch.equal, work.task.model.parameters(), weights))
    assert all(map(torch.equal, work.gradients.values(), gradients))
    return record


def test_every_contender_gives_the_right_result(record: dict[str, Any]) -> None:
    assert record["refused"] is None


def test_everything_that_is_modelled_is_measured(record: dict[str, Any]) -> None:
    measured = {operation_of(timing["name"]) for timing in record["timings"]}
    assert set(roofline.OPERATIONS) <= measured


def test_operations_are_compared_with_their_baselines(record: dict[str, Any]) -> None:
    compared = {f["what"] for f in record["figures"] if f["unit"] == "times faster"}
    for operation in roofline.OPERATIONS.values():
        if operation.baseline is not None:
            assert any(
                operation_of(what.partition(" against ")[0]) == operation.name
                and operation_of(what.partition(" against ")[2]) == operation.baseline
                for what in compared
            ), operation.name
    assert any("CUDA graph" in what for what in compared)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_what_the_cost_model_chooses_stands_beside_what_is_faster(
    record: dict[str, Any], dtype: str
) -> None:
    for kind, densities in gpu.DENSITIES.items():
        for density in densities:
            what = f"packing included, {kind} mask of density {density:g}, 20 tokens, {dtype}"
            tiles, sampled = (f for f in record["figures"] if f["what"].endswith(what))
            assert re.search("; chosen: (tiles|entries)$", tiles["note"])
            assert re.search("; chosen: (dense|sampled)$", sampled["note"])


@pytest.mark.parametrize("precision", ["fp32", "amp_bf16"])
def test_training_steps_of_every_mode(record: dict[str, Any], precision: str) -> None:
    group = f"training step in {precision}, 4 images and 4 prompts"
    steps = [timing for timing in record["timings"] if timing["group"] == group]
    names = [timing["name"] for timing in steps]
    for mode in ("dense", "streamed", "sampled"):
        assert f"SparseAdamW, {mode} gradients, uniform mask (cpu)" in names
    assert gpu.FULL in names
    memory = {use["name"]: use for use in record["memory"] if use["group"] == group}
    assert list(memory) == names
    numel = sum(p.numel() for p in candidates(gpu.workload(SMOKE).task.model).values())
    floor, full, dense = (memory[n] for n in (gpu.clip_step.FLOOR, gpu.FULL, f"{gpu.DENSE} (cpu)"))
    assert floor["state"] < 0.1 * full["state"]
    assert full["state"] == pytest.approx(8 * numel, rel=0.01)
    assert 0 < dense["state"] < 0.5 * full["state"]
    what = f"peak memory below full fine-tuning's in {precision}"
    figures = [figure for figure in record["figures"] if figure["what"].startswith(what)]
    assert len(figures) == len(names) - 1


def test_memory_is_that_of_the_backend(record: dict[str, Any]) -> None:
    """A process of its own gets it from this one."""
    assert ["cpu"] * 2 * len(gpu.OURS | gpu.THEIRS) == BACKENDS


@pytest.mark.parametrize(
    ("free", "reserved", "processes"), [(80, 20, 2), (141, 20, 4), (24, 20, 1), (80, None, 1)]
)
def test_memory_is_measured_in_as_many_processes_as_fit(
    free: int, reserved: int | None, processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free << 30, free << 30))
    memory = Memory(peak=1, reserved=reserved and reserved << 30)
    assert gpu._at_once(torch.device("cuda"), memory) == processes
    assert gpu._at_once(torch.device("cpu"), memory) == 1


def test_timings_say_what_must_move(record: dict[str, Any]) -> None:
    for timing in record["timings"]:
        if "finish" not in timing["name"]:
            assert timing["moves"] > 0, timing["name"]


@pytest.mark.parametrize(
    ("operation", "part", "reason"),
    [
        ("gather", gpu._gather, "other values than those at the indices"),
        ("sampled_grad", gpu._weight_gradients, "not the gradient"),
        ("pack_columns", gpu._weight_gradients, "other columns"),
        ("sampled_embedding_grad", gpu._embedding, "not the gradient"),
    ],
)
def test_wrong_kernel_is_refused(
    operation: str,
    part: Callable[..., Outcome],
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    right = getattr(ops, operation)
    monkeypatch.setattr(ops, operation, lambda *a, **options: right(*a, **options) + 1)
    work = () if part in (gpu._weight_gradients, gpu._embedding) else (gpu.workload(SMOKE),)
    case = Case("gpu", "", lambda setting: part(PLACE, *work, setting))
    assert reason in run_case(case, SMOKE)["refused"]


def test_wrong_low_precision_step_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The exact values may be right and the weights not their roundings."""

    def forgetful(params: Any, *arguments: Any, **options: Any) -> None:
        kept = [param.clone() for param in params]
        ops.sparse_adamw_(params, *arguments, **options)
        for param, before in zip(params, kept, strict=True):
            param.copy_(before)

    monkeypatch.setattr(gpu.sparse_adamw, "sparse_adamw_", forgetful)
    case = Case(
        "gpu", "", lambda setting: gpu._optimizer(PLACE, gpu.workload(SMOKE), "bf16", setting)
    )
    setting = replace(SMOKE, density=1e-2)
    assert "is not its exact value, rounded" in run_case(case, setting)["refused"]


def test_nothing_runs_in_tf32_and_settings_come_back() -> None:
    products, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn
    before = products.allow_tf32, convolutions.allow_tf32
    try:
        products.allow_tf32, convolutions.allow_tf32 = True, True
        with gpu.full_precision():
            assert (products.allow_tf32, convolutions.allow_tf32) == (False, False)
        assert (products.allow_tf32, convolutions.allow_tf32) == (True, True)
    finally:
        products.allow_tf32, convolutions.allow_tf32 = before


# The GPU's clock and memory, faked ----------------------------------------------------------------


class FakeGpu:
    """A stream in which work takes time, and a host that asks for it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.host = self.done = 0.0
        self.log: list[str] = []
        fake = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                fake.log.append("record")
                self.at = fake.done = max(fake.done, fake.host)

            def query(self) -> bool:
                return self.at <= fake.host

            def elapsed_time(self, end: Event) -> float:
                return 1e3 * (end.at - self.at)

        def synchronize(device: Any = None) -> None:
            fake.log.append("synchronize")
            fake.host = max(fake.host, fake.done)

        def sleep(cycles: int) -> None:
            fake.log.append("sleep")
            fake.work(cycles / CudaTimer._CYCLES)

        for name, value in {"Event": Event, "synchronize": synchronize, "_sleep": sleep}.items():
            monkeypatch.setattr(torch.cuda, name, value)

    def work(self, seconds: float, host: float = 0.0) -> None:
        """Ask for a kernel, which takes the host some time."""
        self.host += host
        self.done = max(self.done, self.host) + seconds


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    return FakeGpu(monkeypatch)


DEVICE = torch.device("cuda", 0)


def test_head_start_hides_the_host(fake: FakeGpu) -> None:
    """Ten kernels of 1 us take 10 us, although Python asks for one every 20 us."""
    timer = CudaTimer(DEVICE)
    seconds, _ = timer.time(lambda: [fake.work(1e-6, host=2e-5) for _ in range(10)])
    assert seconds == pytest.approx(1e-5)
    assert fake.log == ["synchronize", "sleep", "record", "record", "synchronize"]
    assert timer.head_start == 1e-3


def test_without_a_head_start_the_host_counts(fake: FakeGpu) -> None:
    timer = CudaTimer(DEVICE, head_start=0)
    seconds, _ = timer.time(lambda: [fake.work(1e-6, host=2e-5) for _ in range(10)])
    assert seconds == pytest.approx(10 * 2e-5 + 1e-6)
    assert "sleep" not in fake.log


def test_head_start_grows_until_it_suffices(fake: FakeGpu) -> None:
    timer = CudaTimer(DEVICE)

    def slow_host() -> None:
        for _ in range(10):
            fake.work(1e-6, host=1e-3)

    times = [timer.time(slow_host)[0] for _ in range(6)]
    assert timer.head_start == 1.6e-2
    assert times[0] > 8e-3
    assert times[-1] == pytest.approx(1e-5)


def test_head_start_is_bounded(fake: FakeGpu) -> None:
    """Work that waits for the GPU itself would make it grow forever."""
    timer = CudaTimer(DEVICE)

    def waits() -> None:
        fake.work(1e-6)
        torch.cuda.synchronize()

    for _ in range(12):
        timer.time(waits)
    assert timer.head_start == CudaTimer.LONGEST


def test_measuring_waits_for_the_gpu_when_it_counts_rounds(fake: FakeGpu) -> None:
    contender = Contender("it", lambda: fake.work(3e-6), lambda run: run())
    effort = Effort(seconds=0.0, least=3, most=3, warm_up=0)
    timings = measure("group", [contender], effort, timer=CudaTimer(DEVICE))
    assert timings["it"].seconds == pytest.approx([3e-6] * 3)
    assert fake.log[:2] == ["synchronize", "synchronize"]  # after its preparation and its check


def test_graph_is_captured_after_a_run_on_another_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []

    class Stream:
        def __init__(self, name: str = "side") -> None:
            self.name = name

        def wait_stream(self, other: Stream) -> None:
            log.append(f"{self.name} waits for {other.name}")

    class Block:
        def __init__(self, what: Any) -> None:
            self.what = "capture" if isinstance(what, Graph) else "side"

        def __enter__(self) -> None:
            log.append(f"{self.what}:")

        def __exit__(self, *error: object) -> None:
            log.append("end")

    class Graph:
        def replay(self) -> None:
            log.append("replay")

    names = {"Stream": Stream, "stream": Block, "graph": Block, "CUDAGraph": Graph,
             "current_stream": lambda: Stream("current")}  # fmt: skip
    for name, value in names.items():
        monkeypatch.setattr(torch.cuda, name, value)
    replay = gpu.captured(lambda: log.append("work"))
    replay()
    assert log == [
        "side waits for current", "side:", "work", "end", "current waits for side",
        "capture:", "work", "end", "replay",
    ]  # fmt: skip


# Without and with a GPU ---------------------------------------------------------------------------


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize(
    "arguments", [["gpu"], ["run", "gpu_steps"], ["run", "gather_scatter", "gpu_operations"]]
)
def test_without_a_gpu_it_says_so_at_once(arguments: list[str]) -> None:
    done = CliRunner().invoke(command.app, arguments)
    assert isinstance(done.exception, MeasurementError)
    assert str(done.exception).startswith("there is no GPU to measure on: torch")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_command_fails_in_one_sentence() -> None:
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-m", "bench", "gpu"], cwd=root, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("error: there is no GPU to measure on")
    assert "Traceback" not in done.stderr


def test_gpu_is_measured_only_when_asked_for() -> None:
    on_gpu = ["gpu_operations", "gpu_choices", "gpu_steps"]
    assert [name for name, case in CASES.items() if case.on_gpu] == on_gpu
    assert command._choose(None) == [name for name in CASES if name not in on_gpu]
    assert command._choose(["gpu_steps"]) == ["gpu_steps"]


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU as far as its description goes."""
    properties = SimpleNamespace(name="NVIDIA H100 80GB HBM3", total_memory=80 << 30, uuid="12-34")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    works = {name: backends.BackendStatus(name, name == "triton", "") for name in backends.GPU}
    monkeypatch.setattr(backends, "backend_status", works.__getitem__)


@pytest.mark.usefixtures("pretended")
def test_result_says_which_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    run = subprocess.run

    def answer(arguments: list[str], **options: Any) -> Any:
        if arguments[0] != "nvidia-smi":
            return run(arguments, **options)
        assert arguments[-1] == "--id=GPU-12-34"
        return SimpleNamespace(stdout="575.51.03, 1980 MHz, 2619 MHz, 700.00 W\n")

    monkeypatch.setattr(environment.subprocess, "run", answer)
    found = environment.environment(gpu=True)
    assert found["gpu"] == "NVIDIA H100 80GB HBM3"
    assert found["gpu_memory"] == "80 GiB"
    assert found["gpu_backends"] == "triton"
    assert (found["driver"], found["largest_sm_clock"]) == ("575.51.03", "1980 MHz")
    assert (found["largest_memory_clock"], found["power_limit"]) == ("2619 MHz", "700.00 W")
    assert command._file_name(found) == f"nvidia-h100-80gb-hbm3-{found['saft_kernels']}.json"


@pytest.mark.usefixtures("pretended")
def test_gpu_without_nvidias_program(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(arguments: list[str], **options: Any) -> Any:
        raise FileNotFoundError(arguments[0])

    monkeypatch.setattr(environment.subprocess, "run", missing)
    assert environment.gpu_environment()["driver"] == "unknown"


@pytest.mark.usefixtures("pretended")
def test_gpu_without_kernels_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        backends, "backend_status", lambda name: backends.BackendStatus(name, False, "too old")
    )
    with pytest.raises(MeasurementError, match=r"no kernels for this GPU.*cuda: too old"):
        gpu.gpu()


@pytest.mark.usefixtures("pretended")
def test_command_keeps_the_result_under_the_gpus_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    on_gpu = ["gpu_operations", "gpu_choices", "gpu_steps"]
    for name in on_gpu:
        case = Case(name, "a case", lambda setting: Outcome(), on_gpu=True)
        monkeypatch.setitem(CASES, name, case)
    monkeypatch.setattr(command, "RESULTS", tmp_path)
    done = CliRunner().invoke(command.app, ["gpu"])
    assert done.exit_code == 0, done.output
    (file,) = tmp_path.iterdir()
    assert file.name.startswith("nvidia-h100-80gb-hbm3-")
    result = read_result(file)
    assert list(result["cases"]) == on_gpu
    for name, code in (("gpu_steps", 0), ("gather_scatter", 2), ("gpu", 2)):
        done = CliRunner().invoke(command.app, ["gpu", name])
        assert done.exit_code == code
        assert code == 0 or "gpu_operations, gpu_choices, gpu_steps" in done.output
    assert "on NVIDIA H100 80GB HBM3 (driver " in markdown(result)
    assert (result["setting"]["model"], result["setting"]["density"]) == ("ViT-B-16", 1e-3)
    assert roofline.measured_gpu(result).name == "H100"

"""``python -m saft_kernels`` and the choice of backends."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from saft_kernels import backends, ops
from saft_kernels.__main__ import main, sections
from saft_kernels.errors import BackendUnavailableError

INDICES = torch.tensor([0], dtype=torch.int32)

USE = "import torch; from saft_kernels import ops; ops.gather(torch.zeros(3), torch.tensor([0]))"


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_report_names_versions_build_and_every_backend(capsys):
    assert main() == 0
    printed = capsys.readouterr().out
    assert f"torch{'':22} {torch.__version__.split('+')[0]}" in printed
    assert backends.cpu_isa() in printed
    report = sections()
    assert set(report["Backends"]) == set(backends.BACKENDS)
    assert report["Backends"]["cpu"].startswith("works")
    assert ("works" in report["Backends"]["triton"]) == torch.cuda.is_available()
    assert report["Build"]["torch stable ABI"] == "2.11 and later"


@pytest.mark.parametrize("isa", backends.cpu_isas())
def test_environment_forces_the_instruction_set(isa):
    program = "from saft_kernels import backends; print(backends.cpu_isa())"
    assert run("-c", program, SAFT_CPU_ISA=isa).stdout.strip() == isa


def test_unknown_instruction_set_is_an_error():
    failed = run("-c", USE, SAFT_CPU_ISA="mmx")
    assert "BackendUnavailableError: CPU instruction set 'mmx'" in failed.stderr
    assert "baseline" in failed.stderr


@pytest.mark.parametrize("wrong", [{"SAFT_CPU_ISA": "mmx"}, {"SAFT_BACKEND": "tpu"}])
def test_the_report_comes_also_where_the_environment_asks_for_too_much(wrong):
    (asked,) = wrong.values()
    failed = run("-m", "saft_kernels", **wrong)
    assert failed.returncode == 1
    assert "Backends" in failed.stdout
    assert f"Error: {'CPU' if asked == 'mmx' else 'there'}" in failed.stdout
    assert "Traceback" not in failed.stderr


@pytest.mark.parametrize("content", [None, b"no library"])
def test_a_library_that_cannot_be_loaded_is_not_replaced_by_the_usual_one(tmp_path, content):
    library = tmp_path / "other.so"
    if content is not None:
        library.write_bytes(content)
    said = (
        f"the compiled library {library} {'could not be loaded' if content else 'does not exist'}"
    )
    failed = run("-c", USE, SAFT_LIBRARY=str(library))
    assert f"BackendUnavailableError: there are no kernels for tensors on cpu (cpu: {said}" in (
        failed.stderr
    )
    report = run("-m", "saft_kernels", SAFT_LIBRARY=str(library))
    assert report.returncode == 1
    assert f"SAFT_LIBRARY{'':16}{library}" in report.stdout
    assert ("unset SAFT_LIBRARY" in report.stdout) == (content is None)


def test_another_library_is_named(tmp_path):
    library = tmp_path / "other.so"
    library.symlink_to(backends.LIBRARY)
    report = run("-m", "saft_kernels", SAFT_LIBRARY=str(library))
    assert report.returncode == 0
    assert f"compiled library{'':12}{library}" in report.stdout


def test_sanitizers_are_said_loudly(monkeypatch):
    assert "SANITIZERS" not in sections()["Build"]
    info = {**backends.build_info(), "sanitizers": "address,undefined"}
    monkeypatch.setattr(backends, "build_info", lambda: info)
    assert sections()["Build"]["SANITIZERS"] == "address,undefined: slow, for tests only"


def test_environment_chooses_the_backend():
    program = "from saft_kernels import backends; print(backends.requested_backend())"
    assert run("-c", program, SAFT_BACKEND="reference").stdout.strip() == "reference"


@pytest.mark.parametrize("name", ["triton", "cuda", "tpu"])
def test_unavailable_backend_is_an_error_and_never_a_fallback(name):
    if name != "tpu" and backends.backend_status(name).available:
        pytest.skip(f"{name} works here")
    with pytest.raises(BackendUnavailableError, match=name), backends.use_backend(name):
        pass
    failed = run("-c", USE, SAFT_BACKEND=name)
    assert f"BackendUnavailableError: the{'re is no' if name == 'tpu' else ''}" in failed.stderr
    assert f"backend {name!r}" in failed.stderr


def test_backend_for_another_device_is_an_error():
    with (
        backends.use_backend("cpu"),
        pytest.raises(BackendUnavailableError, match="meta"),
    ):
        ops.gather(torch.empty(3, device="meta"), INDICES)


def test_device_without_kernels_is_an_error():
    with pytest.raises(BackendUnavailableError, match="no kernels for tensors on meta"):
        ops.gather(torch.empty(3, device="meta"), INDICES)


def test_choices_end_with_their_block():
    before = backends.requested_backend(), backends.cpu_isa()
    with backends.use_backend("reference"), backends.use_cpu_isa("baseline"):
        assert backends.requested_backend() == "reference"
        assert backends.cpu_isa() == "baseline"
    assert (backends.requested_backend(), backends.cpu_isa()) == before


def test_missing_library_is_said_clearly(tmp_path, monkeypatch):
    monkeypatch.setattr(backends, "_load_error", f"the compiled library {tmp_path} does not exist")
    with pytest.raises(BackendUnavailableError, match="does not exist"):
        ops.gather(torch.zeros(3), INDICES)
    with backends.use_backend("reference"):
        assert ops.gather(torch.ones(3), INDICES).item() == 1
    assert main() == 1


# A GPU that is not there --------------------------------------------------------------------------

CUDA = torch.device("cuda", 0)


@pytest.fixture
def gpu(monkeypatch):
    """A function that makes torch see a GPU of a compute capability, and a build for some."""

    def see(
        capability,
        built="13.0: sm_80 sm_90, PTX of compute_90",
        cuda="13.0",
        triton=True,
        driver=13000,
    ):
        info = {**backends.build_info(), "cuda": built}
        monkeypatch.setattr(backends, "build_info", lambda: info)
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(torch.ops.saft_kernels, "cuda_driver", lambda: driver)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "imagined GPU")
        if not triton:
            monkeypatch.setattr(backends, "_triton_obstacle", lambda: "triton is not installed")
        backends._gpu_obstacles.clear()

    yield see
    backends._gpu_obstacles.clear()


def test_a_gpu_is_served_by_what_was_compiled_for_it(gpu):
    gpu((9, 0))
    assert backends.resolve(CUDA) == "cuda"
    assert backends.backend_status("cuda").reason.endswith("on imagined GPU")


@pytest.mark.parametrize(
    "built",
    ["off (nvcc not found)", "13.0: sm_90, PTX of compute_90"],
)
def test_triton_serves_a_gpu_for_which_nothing_was_compiled(gpu, built):
    gpu((8, 0), built)
    assert backends.resolve(CUDA) == "triton"
    with pytest.raises(BackendUnavailableError, match=r"'cuda' was asked for: (the lib|GPU 0 is)"):
        backends.use_backend("cuda").__enter__()


@pytest.mark.parametrize(
    ("driver", "built", "served"),
    [(12080, "13.0", "triton"), (13000, "13.2", "cuda"), (13020, "13.0", "cuda"),
     (12080, "12.4", "cuda"), (14010, "13.0", "cuda")],
)  # fmt: skip
def test_compiled_kernels_need_a_driver_of_their_cuda(gpu, driver, built, served):
    gpu((9, 0), f"{built}: sm_90, PTX of compute_90", driver=driver)
    assert backends.resolve(CUDA) == served
    assert backends.backend_status("cuda").available == (served == "cuda")


def test_a_driver_that_is_too_old_is_said_clearly(gpu, monkeypatch):
    gpu((9, 0), driver=12080)
    said = r"supports CUDA 12\.8, .* CUDA 13\.0 or later; install a newer .*SAFT_BACKEND=triton"
    with pytest.raises(BackendUnavailableError, match=said):
        backends.use_backend("cuda").__enter__()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # torch needs a newer one too
    assert "supports CUDA 12.8" in backends.backend_status("cuda").reason
    assert backends.backend_status("triton").reason == "torch sees no GPU"
    assert sections()["GPUs"] == {"none": "torch sees no GPU"}


def test_the_library_asks_the_driver_that_is_here():
    works = backends.backend_status("cuda").available
    assert torch.ops.saft_kernels.cuda_driver() >= (12_000 if works else 0)


def test_the_interpreter_leaves_a_gpu_to_what_was_compiled(gpu, monkeypatch):
    gpu((9, 0))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert backends.resolve(CUDA) == "cuda"
    assert backends.resolve(torch.device("cpu")) == "cpu"
    with backends.use_backend("triton"):
        assert backends.resolve(torch.device("cpu")) == "triton"
        with pytest.raises(BackendUnavailableError, match="tensors are on cuda"):
            backends.resolve(CUDA)


def test_triton_serves_amd(gpu):
    gpu((9, 4), cuda=None)
    assert backends.resolve(CUDA) == "triton"


def test_a_gpu_that_nothing_serves_is_an_error_with_every_reason(gpu):
    gpu((8, 0), "off (nvcc not found)", triton=False)
    with pytest.raises(BackendUnavailableError, match=r"cuda: .*nvcc not found; triton: triton is"):
        backends.resolve(CUDA)


def test_the_choice_between_gpu_backends_can_be_forced(gpu):
    gpu((9, 0))
    with backends.use_backend("triton"):
        assert backends.resolve(CUDA) == "triton"
        with pytest.raises(BackendUnavailableError, match="tensors are on cpu"):
            backends.resolve(torch.device("cpu"))
    with backends.use_backend("cpu"), pytest.raises(BackendUnavailableError, match="on cuda"):
        backends.resolve(CUDA)


# The environment asks for a whole program --------------------------------------------------------

IMPORT = """
import torch

def refuse(*_):
    raise AssertionError("a GPU was looked at")

for name in ("_lazy_init", "is_available", "device_count", "current_device",
             "get_device_capability", "get_device_name"):
    setattr(torch.cuda, name, refuse)
import saft_kernels
assert not torch.cuda.is_initialized()
"""


@pytest.fixture
def whole_program():
    """A function that does what importing the package with this ``SAFT_BACKEND`` does."""
    with pytest.MonkeyPatch.context() as patch:

        def ask(name):
            patch.setattr(backends, "_requested", None)
            patch.setattr(backends, "_by_environment", False)
            patch.setenv("SAFT_BACKEND", name)
            backends._apply_environment()

        yield ask


@pytest.mark.parametrize("asked", ["", "cpu", "cuda", "triton", "reference"])
def test_importing_looks_at_no_gpu(asked):
    done = run("-c", IMPORT, SAFT_BACKEND=asked)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", backends.GPU)
def test_a_gpu_backend_of_the_environment_leaves_cpu_tensors_to_the_cpu(gpu, whole_program, name):
    gpu((9, 0))
    whole_program(name)
    assert backends.requested_backend() == name
    assert backends.resolve(CUDA) == name
    assert backends.resolve(torch.device("cpu")) == "cpu"
    assert ops.gather(torch.ones(3), INDICES).item() == 1
    with pytest.raises(BackendUnavailableError, match="tensors are on meta"):
        backends.resolve(torch.device("meta"))
    with (
        backends.use_backend(name),
        pytest.raises(BackendUnavailableError, match="tensors are on cpu"),
    ):
        backends.resolve(torch.device("cpu"))
    assert backends.resolve(torch.device("cpu")) == "cpu"


def test_cpu_tensors_do_not_initialise_cuda(gpu, whole_program, monkeypatch):
    gpu((9, 0))
    for name in ("is_available", "current_device", "get_device_capability"):
        monkeypatch.setattr(torch.cuda, name, None)
    whole_program("cuda")
    assert backends.resolve(torch.device("cpu")) == "cpu"


def test_a_gpu_that_does_not_fit_the_environment_is_an_error_when_it_is_used(
    gpu, whole_program, monkeypatch
):
    gpu((7, 5))
    properties = SimpleNamespace(name="imagined GPU", major=7, minor=5)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    whole_program("cuda")
    assert backends.resolve(torch.device("cpu")) == "cpu"
    with pytest.raises(BackendUnavailableError, match="'cuda' was asked for: GPU 0 is sm_75"):
        backends.resolve(CUDA)
    assert main() == 1


def test_the_interpreter_serves_cpu_tensors_of_a_whole_program(whole_program, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    whole_program("triton")
    assert backends.resolve(torch.device("cpu")) == "triton"
    with pytest.raises(BackendUnavailableError, match="tensors are on cuda"):
        backends.resolve(CUDA)


def test_the_cpu_of_the_environment_does_not_serve_a_gpu(gpu, whole_program):
    gpu((9, 0))
    whole_program("cpu")
    with pytest.raises(BackendUnavailableError, match="'cpu' was asked for"):
        backends.resolve(CUDA)


@pytest.mark.parametrize(
    ("name", "called"),
    [(None, "saft_kernels"), ("cuda", "saft_kernels"), ("triton", "saft_triton")],
)
@pytest.mark.parametrize("by_environment", [False, True])
def test_the_choice_does_not_break_the_graph_of_compiled_code(
    gpu, whole_program, monkeypatch, name, called, by_environment
):
    """Once it was made outside of it, as ``attach`` and optimizers do."""
    gpu((9, 0))
    graphs = []

    def record(graph, inputs):
        graphs.append({str(node.target) for node in graph.graph.nodes})
        return lambda *_: (torch.zeros(1, 1, 16),)

    @torch.compile(fullgraph=True, backend=record)
    def pack(x, columns):
        return backends.kernels(backends.resolve(CUDA)).pack_columns(x, columns, None)

    if by_environment:
        whole_program(name or "")
    with nullcontext() if by_environment else backends.use_backend(name):
        backends.kernels(backends.resolve(CUDA))
        monkeypatch.undo()  # whoever looks again sees no GPU
        pack(torch.ones(16, 1), INDICES)
    torch._dynamo.reset()
    assert f"{called}.pack_columns" in graphs[0]


@pytest.mark.parametrize(
    ("capability", "runs"),
    [((7, 5), False), ((8, 0), True), ((8, 9), True), ((9, 0), True), ((10, 0), False),
     ((12, 0), True), ((12, 1), True), ((13, 0), True)],
)  # fmt: skip
def test_machine_code_serves_its_generation_and_ptx_all_later_ones(capability, runs):
    built = "13.0: sm_80 sm_90 sm_120, PTX of compute_120"
    assert backends.runs_on(built, *capability) == runs


def test_machine_code_of_other_gpus_does_not_run_on_tegra():
    built = "13.0: sm_80 sm_86 sm_100, PTX of compute_120"
    assert not any(backends.runs_on(built, *tegra) for tegra in [(7, 2), (8, 7), (10, 1), (11, 0)])
    assert backends.runs_on(built, 8, 9)
    assert backends.runs_on(built, 10, 3)
    assert backends.runs_on("13.0: sm_87, PTX of compute_87", 8, 7)
    assert not backends.runs_on("13.0: sm_87, PTX of compute_90", 8, 9)
    assert backends.runs_on("13.0: sm_80, PTX of compute_80", 8, 7)

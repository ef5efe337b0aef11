"""What ``make test-gpu`` runs: all that runs kernels on a GPU, and nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import mark_gpu

pytest_plugins = "pytester"

TESTS = Path(__file__).parent

_PARAMETRISED = """
import pytest

@pytest.fixture(params=["cpu-generic", "cuda-gpu", "triton-gpu", "triton-sm80"])
def device(request): ...

def test_fixture(device): ...

@pytest.mark.parametrize("device", ["cpu-generic", "triton-gpu"], indirect=True)
def test_indirect(device): ...

@pytest.mark.parametrize(("device", "mode"), [("cuda-gpu", "dense")], indirect=["device"])
def test_mode(device, mode): ...

@pytest.mark.parametrize("names", [("cpu-generic", "cuda-gpu"), ("cpu-generic",)], ids="+".join)
def test_turns(names): ...

@pytest.mark.parametrize("gpu", ["cuda-sm80", "gpu", 80, None])
def test_gpu_by_name_only(gpu): ...

def test_gpu(): ...
"""


def test_marked_are_the_tests_given_an_implementation_on_a_gpu(pytester: pytest.Pytester) -> None:
    pytester.makeini("[pytest]\nmarkers = gpu")
    items = pytester.getitems(_PARAMETRISED)
    mark_gpu(items, ["cuda-gpu", "triton-gpu"])
    assert [item.name for item in items if item.get_closest_marker("gpu")] == [
        "test_fixture[cuda-gpu]",
        "test_fixture[triton-gpu]",
        "test_indirect[triton-gpu]",
        "test_mode[cuda-gpu-dense]",
        "test_turns[cpu-generic+cuda-gpu]",
    ]
    mark_gpu(others := pytester.getitems(_PARAMETRISED), [])
    assert not any(item.get_closest_marker("gpu") for item in others)


_GPU_IS_THERE = """
import torch
from saft_kernels import backends

torch.cuda.is_available = lambda: True
backends.backend_status = lambda name: backends.BackendStatus(name, name == "triton", "")
"""

FILES = ["test_gpu.py", "test_gather_scatter.py", "test_attach_gpu.py", "test_bench_gpu.py"]


def test_collected_where_there_is_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gpu_is_there.py").write_text(_GPU_IS_THERE)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *filter(None, sys.path)]))
    options = ["-p", "gpu_is_there", "-p", "no:xdist", "-p", "no:cacheprovider"]
    files = [str(TESTS / name) for name in FILES]
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-m", "gpu", *options]
    done = subprocess.run(
        [*command, *files], cwd=TESTS.parent, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = [line for line in done.stdout.splitlines() if "::" in line]
    counts = {name: sum(f"/{name}::" in line for line in found) for name in FILES}
    assert counts.pop("test_bench_gpu.py") == 0
    assert all(count > 10 for count in counts.values())
    others = [line for line in found if "/test_gpu.py::" not in line]
    assert all("triton-gpu" in line for line in others)
    assert any("/test_gpu.py::test_a_backend_runs_here" in line for line in found)

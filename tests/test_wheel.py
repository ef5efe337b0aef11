"""The wheel, as a stranger gets it: installed into a clean environment, far from this checkout."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

SMOKE_TEST = """
import copy, sys, torch
import saft_kernels
from saft_kernels import CooMask, SparseAdamW, SparseDelta, select
from saft_kernels.backends import backend_status

assert saft_kernels.__file__.startswith(sys.prefix), saft_kernels.__file__
assert backend_status("cpu").available, backend_status("cpu")
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
base = copy.deepcopy(model.state_dict())
batches = [(torch.randn(6, 8), torch.randint(4, (6,))) for _ in range(3)]
loss = lambda model, batch: torch.nn.functional.cross_entropy(model(batch[0]), batch[1])
mask = select(model, loss, batches, density=0.05)
optimizer = SparseAdamW(model, mask, lr=1e-2, gradients="streamed")
for batch in batches:
    optimizer.zero_grad()
    loss(model, batch).backward()
    optimizer.step()
delta = SparseDelta.capture(model, mask, base=base)
delta.save("delta.safetensors")
fresh = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
fresh.load_state_dict(base)
loaded = SparseDelta.load("delta.safetensors")
loaded.apply_(fresh)
trained = model.state_dict()
assert all(torch.equal(value, trained[name]) for name, value in fresh.state_dict().items())
loaded.revert_(fresh)
assert all(torch.equal(value, base[name]) for name, value in fresh.state_dict().items())
print("smoke test passed")
"""


@dataclass
class Installed:
    """A clean virtual environment with the wheel in it."""

    wheel: Path
    python: Path

    def run(self, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(self.python), "-I", *arguments],
            cwd=cwd,
            capture_output=True,
            text=True,
            check=False,
        )


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    folder = tmp_path_factory.mktemp("wheel")
    pip = ["-m", "pip", "--disable-pip-version-check"]
    build = [*pip, "wheel", "-q", "--no-build-isolation", "--no-deps", "-w", str(folder), str(ROOT)]
    subprocess.run([sys.executable, *build], check=True, cwd=folder)
    (wheel,) = folder.glob("*.whl")
    environment = folder / "environment"
    venv.create(environment, with_pip=False, symlinks=True)
    python = environment / "bin" / "python"
    site = Path(
        subprocess.run(
            [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()
    )
    # The dependencies are those of this environment, without a second copy of torch. Editable
    # installs are not followed from here: .pth files work in real site folders only.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    install = [*pip, "--python", str(python), "install", "-q", "--no-deps", str(wheel)]
    subprocess.run([sys.executable, *install], check=True, cwd=folder)
    return Installed(wheel, python)


def test_one_wheel_serves_every_python(installed):
    name = installed.wheel.name
    assert name.startswith("saft_kernels-0.1.0-py3-none-linux_"), name


def test_wheel_holds_all_packages_and_one_library_and_no_libtorch(installed):
    names = zipfile.ZipFile(installed.wheel).namelist()
    assert [n for n in names if ".so" in n] == ["saft_kernels/libsaft_kernels.so"]
    sources = {
        "saft_kernels": ROOT / "saft_kernels",
        "saft_clip": ROOT / "python/saft_clip",
        "saft_bench": ROOT / "bench",
    }
    for package, source in sources.items():
        modules = {f"{package}/{path.relative_to(source)}" for path in source.rglob("*.py")}
        assert modules == {n for n in names if n.startswith(f"{package}/") and n.endswith(".py")}
    assert {"saft_kernels/py.typed", "saft_clip/py.typed"} <= set(names)
    assert any(n.startswith("saft_clip/assets/") and n.endswith(".safetensors") for n in names)
    assert any(n.startswith("saft_clip/templates/") for n in names)
    assert any(n.startswith("saft_bench/templates/") for n in names)
    top = {n.split("/")[0] for n in names}
    assert top == {*sources, "saft_kernels-0.1.0.dist-info"}


def test_wheel_works_outside_the_checkout(installed, tmp_path):
    done = installed.run("-c", SMOKE_TEST, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "smoke test passed"


def test_diagnostics_and_command_work_outside_the_checkout(installed, tmp_path):
    doctor = installed.run("-m", "saft_kernels", cwd=tmp_path)
    assert doctor.returncode == 0, doctor.stderr
    assert "works: compiled" in doctor.stdout
    saft = subprocess.run(
        [installed.python.parent / "saft", "--help"], cwd=tmp_path, capture_output=True, text=True
    )
    assert saft.returncode == 0, saft.stderr
    assert "finetune" in saft.stdout


def test_benchmarks_work_outside_the_checkout(installed, tmp_path):
    command = [installed.python.parent / "saft", "bench"]
    listed = subprocess.run([*command, "list"], cwd=tmp_path, capture_output=True, text=True)
    assert listed.returncode == 0, listed.stderr
    assert "sampled_grad" in listed.stdout
    file = tmp_path / "bench-results" / "smoke.json"  # where results are sought
    file.parent.mkdir()
    asked = ["run", "gather_scatter", "--smoke", "--output", file]
    ran = subprocess.run([*command, *asked], cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    page = subprocess.run([*command, "report"], cwd=tmp_path, capture_output=True, text=True)
    assert page.returncode == 0, page.stderr
    assert file.with_suffix(".html").exists()


def needed_from_elsewhere(library: Path) -> set[str]:
    """The undefined symbols of a library, without their versions."""
    nm = shutil.which("nm")
    assert nm, "nm comes with every C++ compiler"
    listed = subprocess.run(
        [nm, "-D", "--undefined-only", library], check=True, capture_output=True, text=True
    ).stdout
    return {line.split()[-1] for line in listed.splitlines()}


def test_library_uses_stable_symbols_only(installed, tmp_path):
    zipfile.ZipFile(installed.wheel).extract("saft_kernels/libsaft_kernels.so", tmp_path)
    symbols = needed_from_elsewhere(tmp_path / "saft_kernels" / "libsaft_kernels.so")
    torch_shims = {s for s in symbols if s.startswith(("aoti_torch_", "torch_"))}
    assert "torch_parallel_for" in torch_shims
    runtime = {s for s in symbols if "@GLIBC" in s or "@CXXABI" in s or "@GCC" in s}
    weak = {"__gmon_start__", "_ITM_deregisterTMCloneTable", "_ITM_registerTMCloneTable"}
    unstable = symbols - torch_shims - runtime - weak
    assert not unstable, unstable


def test_torch_package_is_not_named_as_a_path(installed, tmp_path):
    zipfile.ZipFile(installed.wheel).extract("saft_kernels/libsaft_kernels.so", tmp_path)
    dynamic = subprocess.run(
        ["readelf", "-d", tmp_path / "saft_kernels" / "libsaft_kernels.so"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert "RPATH" not in dynamic
    assert "RUNPATH" not in dynamic
    assert "[libtorch_cpu.so]" in dynamic
    assert "libpython" not in dynamic

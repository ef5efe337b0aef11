"""What ``make bench`` times is what the cases have, and is checked."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench import test_operations as operations
from bench.cases import sampled_grad
from bench.models import SMOKE

pytestmark = pytest.mark.usefixtures("small_limits", "one_thread")

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(operations, "SETTING", SMOKE)
    monkeypatch.setattr(sampled_grad, "SIZES", sampled_grad.SMALL_SIZES)
    operations.contenders_of.cache_clear()
    yield
    operations.contenders_of.cache_clear()


@pytest.mark.parametrize("operation", operations.OPERATIONS)
def test_every_contender_is_timed(operation: str) -> None:
    assert tuple(operations.contenders_of(operation)) == operations.CONTENDERS[operation]


def test_every_operation_has_its_contenders() -> None:
    assert operations.OPERATIONS.keys() == operations.CONTENDERS.keys()


def test_pytest_benchmark_runs_them(tmp_path: Path) -> None:
    """On a tiny model, as ``make bench`` does on a real one."""
    (tmp_path / "conftest.py").write_text(
        "from bench import test_operations as operations\n"
        "from bench.cases import sampled_grad\n"
        "from bench.models import SMOKE\n"
        "operations.SETTING, operations.ROUNDS = SMOKE, 2\n"
        "sampled_grad.SIZES = sampled_grad.SMALL_SIZES\n"
    )
    (tmp_path / "test_them.py").write_text("from bench.test_operations import test_operation\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)]
    # pytest-benchmark stands back where it believes itself in a worker of xdist.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    count = sum(map(len, operations.CONTENDERS.values()))
    assert f"{count} passed" in done.stdout
    assert "benchmark 'optimizer step'" in done.stdout

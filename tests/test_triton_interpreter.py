"""The Triton kernels in Triton's interpreter: the operations' own tests, in fp32 and fp64.

An independent look at the kernels: the simulator runs what the compiler made of them, the
interpreter what they say. It must be switched on before triton is imported, so the tests run in a
process of their own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent


@pytest.mark.parametrize("operation", ["gather_scatter", "sampled_grad"])
def test_operation(operation):
    command = [
        sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider",
        str(TESTS / f"test_{operation}.py"), "-k", "not opcheck and not slow",
    ]  # fmt: skip
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    environment.pop("PYTEST_XDIST_WORKER", None)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "passed" in done.stdout

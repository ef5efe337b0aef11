"""Fixtures that several test files share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from saft_kernels import backends

#: Every implementation of the operations that runs here; the specification itself is not one of
#: them.
IMPLEMENTATIONS = [f"cpu-{isa}" for isa in backends.cpu_isas()]


@pytest.fixture(params=IMPLEMENTATIONS)
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Runs the test once per implementation; its device."""
    kind, isa = request.param.split("-")
    with backends.use_backend(kind), backends.use_cpu_isa(isa):
        yield torch.device(kind)


@contextmanager
def number_of_threads(count: int) -> Iterator[None]:
    """Let torch use ``count`` threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.fixture(params=[1, 2, 7])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """Runs the test with several numbers of threads."""
    with number_of_threads(request.param):
        yield request.param


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Tiny models run many times faster on one thread, above all where cores are shared."""
    with number_of_threads(1):
        yield

"""Fixtures that several test files share."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch

import simulated
from bench import limits
from kernel_coverage import EveryKernelRuns
from saft_kernels import backends

CPU = [f"cpu-{isa}" for isa in backends.cpu_isas()]
GPU = [
    f"{name}-gpu"
    for name in backends.GPU
    if torch.cuda.is_available() and backends.backend_status(name).available
]

#: Every implementation of the operations that runs here; the specification itself is not one of
#: them. GPU backends run on a GPU if there is one (``make test-gpu``), else on a simulated one; a
#: run under Triton's interpreter (test_triton_interpreter.py) has only that.
IMPLEMENTATIONS = (
    ["triton-interpreted"] if backends.interpreting() else [*CPU, *(GPU or simulated.names())]
)

#: The interpreter computes with NumPy, which has no bf16 and rounds fp16 in its own way.
_NOT_INTERPRETED = {torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2}

#: The interpreter takes a second for what the simulator, which runs all cases, does in a blink.
_INTERPRETED_CASES = 1


def pytest_configure(config: pytest.Config) -> None:
    """Where the kernels are run by the simulator, a run of all tests must run all of them."""
    if not GPU and not backends.interpreting():
        config.pluginmanager.register(EveryKernelRuns(simulated.kernels), "every-kernel-runs")


@pytest.hookimpl(tryfirst=True)  # before -m looks at the marks
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark what runs on a GPU; under the interpreter, keep what it can run, and a part of that."""
    mark_gpu(items, GPU)
    if not backends.interpreting():
        return
    kept = set(_thinned(item for item in items if _can_be_interpreted(item)))
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]


def pytest_collection_finish(session: pytest.Session) -> None:
    """Let garbage collections, of which benchmarks make many, pass over all that stays."""
    gc.collect()
    gc.freeze()


def _can_be_interpreted(item: pytest.Item) -> bool:
    values = item.callspec.params if hasattr(item, "callspec") else {}
    return "device" in values and not _NOT_INTERPRETED & _dtypes(values.values())


def _thinned(items: Iterable[pytest.Item]) -> Iterator[pytest.Item]:
    """Of every test at most :data:`_INTERPRETED_CASES`, the first and the last among them."""
    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for each in cases.values():
        last, count = len(each) - 1, min(len(each), _INTERPRETED_CASES)
        yield from {each[i * last // max(count - 1, 1)]: None for i in range(count)}


def mark_gpu(items: Iterable[pytest.Item], names: Sequence[str]) -> None:
    """Mark the tests that run kernels on a GPU: those given one of these implementations.

    Args:
        items: all tests; other tests that need a GPU mark themselves (test_gpu.py).
        names: of the implementations on a GPU.
    """
    for item in items:
        values = item.callspec.params.values() if hasattr(item, "callspec") else ()
        given = itertools.chain(*(v if isinstance(v, (list, tuple)) else [v] for v in values))
        if any(isinstance(value, str) and value in names for value in given):
            item.add_marker("gpu")


def _dtypes(values: Iterable[Any]) -> set[torch.dtype]:
    return {value for value in values if isinstance(value, torch.dtype)}


@contextmanager
def implementation(name: str) -> Iterator[torch.device]:
    """Run the operations inside the block on the named implementation; its device."""
    kind, variant = name.split("-")
    if name in GPU or variant == "interpreted":
        with backends.use_backend(kind):
            yield torch.device("cuda", torch.cuda.current_device()) if GPU else torch.device("cpu")
    elif kind == "cpu":
        with backends.use_backend(kind), backends.use_cpu_isa(variant):
            yield torch.device("cpu")
    else:
        with simulated.use(kind, variant):
            yield torch.device("cpu")


@pytest.fixture(params=IMPLEMENTATIONS)
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Runs the test once per implementation; its device."""
    with implementation(request.param) as device:
        yield device


def operations(device: torch.device) -> Any:
    """The operations of the implementation in use for a device, as torch knows them."""
    return backends.kernels(backends.resolve(device))


@contextmanager
def number_of_threads(count: int) -> Iterator[None]:
    """Let torch use ``count`` threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.fixture(params=[1, 2, 7], ids="threads{}".format)
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """Runs the test with several numbers of threads."""
    with number_of_threads(request.param):
        yield request.param


@pytest.fixture(scope="module")
def small_limits() -> Iterator[None]:
    """Benchmarks copy and multiply what is as small as all else in tests, to know the machine."""
    kept = (limits.buffer_bytes, limits.buffers, limits.matrices)
    with pytest.MonkeyPatch.context() as patch:
        for kind in limits.BUFFER_BYTES:
            patch.setitem(limits.BUFFER_BYTES, kind, 1 << 20)
            patch.setitem(limits.MATRIX_SIZE, kind, 256)
        patch.setattr(limits, "last_level_cache", lambda: 0)
        for function in kept:
            function.cache_clear()
        yield
    for function in kept:
        function.cache_clear()


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports of runs without pictures, which take longer than a tiny run; test_report has them."""
    for name in ("accuracy_figure", "curves_figure", "blocks_figure"):
        monkeypatch.setattr(f"saft_clip.figures.{name}", lambda *_: "<svg></svg>")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Tiny models run many times faster on one thread, above all where cores are shared."""
    with number_of_threads(1):
        yield

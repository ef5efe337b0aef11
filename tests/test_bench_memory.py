"""What the benchmarks say that memory is for: steps whose every byte can be counted by hand."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.testing._internal.two_tensor import TwoTensor

from bench.allocations import (
    Allocated,
    Allocations,
    Kind,
    Split,
    TrainingWork,
    count_allocations,
)
from bench.baselines import Method, Step, step_of
from bench.baselines.index_and_hook import index_and_hook
from bench.cases import clip_step
from bench.memory import ALLOCATOR, MeasurementError, peak_memory, watch
from bench.models import SMOKE, candidates, make_task, uniform_mask
from bench.outcome import Memory
from bench.registry import applied
from saft_kernels import CooMask, attach, backends

pytestmark = pytest.mark.usefixtures("small_limits", "one_thread")

CPU = torch.device("cpu")

WIDTH, LAYERS = 128, 3
MATRIX = 4 * WIDTH * WIDTH  # bytes

#: A loss, and the gradient of the loss.
SCALARS = 8


def size_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors, each memory once."""
    return sum(
        {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values()
    )


def chain_of_layers() -> nn.Module:
    """Weights and nothing else, much larger than what passes through."""
    return nn.Sequential(*[nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)])


def scattered_mask(model: nn.Module, count: int = 64) -> CooMask:
    """As many entries of every matrix, not of one row or column."""
    flat = (torch.arange(count) * (WIDTH + 3)).int()
    return CooMask.from_indices(model, {name: flat for name, _ in model.named_parameters()})


def trained(
    method: Method, model: nn.Module, mask: CooMask | None = None, rows: int = 1
) -> TrainingWork:
    """Work whose state is there."""
    batch = torch.randn(rows, WIDTH)
    mask = scattered_mask(model) if mask is None else mask
    step = method(model, mask, lambda model: model(batch).square().sum())
    step()
    return TrainingWork(step, model, getattr(step, "optimizer", None), [batch])


def full(model: nn.Module, mask: CooMask, loss: Callable[[nn.Module], Tensor]) -> Step:
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    return step_of(optimizer, model, loss)


def compact(model: nn.Module, mask: CooMask, loss: Callable[[nn.Module], Tensor]) -> Step:
    """Sampled gradients of leaves that torch's AdamW trains."""
    optimizer = torch.optim.AdamW(attach(model, mask).parameters())
    return step_of(optimizer, model, loss)


# Following storages -------------------------------------------------------------------------------


def followed(work: Callable[[], Any], *held: Tensor, device: torch.device = CPU) -> Split:
    """The split of some work, with tensors that were there as weights."""
    seen = Allocations(device)
    seen.hold(Kind.WEIGHTS, held)
    with seen:
        work()
    return seen.at_peak()


def test_what_is_freed_counts_no_more() -> None:
    x = torch.ones(1000)
    split = followed(lambda: x.exp().exp().exp(), x)
    assert split == Split(4000, 0, 0, 2 * 4000)
    assert split.held == 12000


def test_what_is_saved_for_backward_counts() -> None:
    x = torch.ones(1000, requires_grad=True)
    split = followed(lambda: x.exp().exp().exp().sum().backward(), x)
    # Three results, and the gradient of one of them. What is in x.grad at last was not there yet.
    assert split.activations == 4 * 4000 + SCALARS
    assert split.gradients == 0


def test_views_and_changes_in_place_are_no_memory() -> None:
    x = torch.ones(1000)

    def work() -> None:
        y = x.view(10, 100).t()[3:]
        y.add_(1).mul_(y.detach())
        x.expand(7, 1000)
        torch.add(x, 1, out=x)

    assert followed(work, x) == Split(4000, 0, 0, 0)


def test_two_tensors_of_one_storage_count_once() -> None:
    x = torch.ones(1000)
    assert followed(lambda: None, x, x[:10], x.view(10, 100)).weights == 4000


def test_empty_tensors_are_no_memory() -> None:
    assert followed(lambda: torch.empty(0)).held == 0


def test_storage_that_grows_is_followed() -> None:
    x, y = torch.ones(1000), torch.empty(0)
    y.resize_(10)
    split = followed(lambda: torch.add(x, 1, out=y.resize_(0)), x, y)
    assert split.weights == 8000


def test_what_was_there_unsaid_is_state() -> None:
    x, kept = torch.ones(1000), torch.ones(500)
    split = followed(lambda: x[:500].mul_(kept), x)
    assert (split.weights, split.state, split.activations) == (4000, 2000, 0)


def test_new_tensors_of_numbers_were_not_there_before() -> None:
    split = followed(lambda: torch.tensor([1.0, 2.0]) + 1)
    assert split == Split(0, 0, 0, 16)


def test_memory_of_a_sparse_tensor_is_its_indices_and_values() -> None:
    table = nn.Embedding(100, 50, sparse=True)
    tokens = torch.tensor([3, 5, 3])
    split = followed(lambda: table(tokens).exp().sum().backward(), table.weight, tokens)
    values = 3 * 4 * 50
    # While it is followed, autograd copies the values, which it would take over otherwise.
    assert split.gradients - 3 * 8 in (values, 2 * values)


@pytest.mark.filterwarnings("ignore:Sparse (CS[RC]|invariant)")
@pytest.mark.parametrize("make", [torch.sparse_csr_tensor, torch.sparse_csc_tensor])
def test_memory_of_compressed_rows_is_in_three_parts(make: Callable[..., Tensor]) -> None:
    matrix = make(torch.arange(101), torch.arange(100), torch.ones(100), (100, 100))
    assert followed(lambda: None, matrix).weights == 8 * (101 + 100) + 4 * 100


def test_memory_of_a_wrapper_is_that_of_its_parts() -> None:
    pair = TwoTensor(torch.ones(1000), torch.ones(1000))
    split = followed(lambda: pair + 1, pair)
    assert (split.weights, split.activations) == (8000, 8000)


def test_only_the_device_counts() -> None:
    layer, x = nn.Linear(100, 100, device="meta"), torch.ones(1000)

    def work() -> None:
        layer(torch.ones(1, 100, device="meta")).sum().backward()
        x.exp()

    split = followed(work, x, *layer.parameters(), device=torch.device("meta"))
    assert split.weights == split.gradients == 4 * (100 * 100 + 100)
    assert 400 <= split.activations < 4000


def test_leaf_that_is_no_parameter_has_no_gradient_of_training() -> None:
    layer = nn.Linear(100, 10).requires_grad_(False)
    x = torch.ones(1, 100, requires_grad=True)
    assert followed(lambda: layer(x).sum().backward(), *layer.parameters()).gradients == 0


def test_all_allocations_are_counted() -> None:
    x = torch.ones(1000)
    assert count_allocations(lambda: x.exp().exp().view(10, 100).neg_(), CPU) == Allocated(8000, 2)


# Training steps -----------------------------------------------------------------------------------


def test_adamw_has_gradients_of_everything_and_two_moments() -> None:
    model = chain_of_layers()
    split = trained(full, model).split()
    row = 4 * WIDTH
    assert split.weights == split.gradients == LAYERS * MATRIX
    assert split.state == 2 * LAYERS * MATRIX + 4 * LAYERS  # and step counts
    assert split.activations <= 4 * row + SCALARS  # where the last gradient is made


def test_activations_of_many_tokens_are_the_layers_inputs() -> None:
    model, batch = chain_of_layers(), torch.randn(4096, WIDTH)
    split = TrainingWork(lambda: model(batch).exp().sum().backward(), model, batch=[batch]).split()
    # Every layer's input; the last one's output, and its exponential or its gradient.
    assert split.activations - (LAYERS + 2) * batch.nbytes in range(SCALARS + 1)
    assert split.gradients in (0, MATRIX)


def test_streamed_gradients_are_one_layers_at_a_time() -> None:
    model = chain_of_layers()
    mask = scattered_mask(model)
    split = trained(clip_step.streamed, model, mask).split()
    nnz = mask.nnz
    assert split.weights == LAYERS * MATRIX
    assert split.state == 12 * nnz + 4 * LAYERS
    assert split.gradients == 4 * nnz + MATRIX  # compact ones of all layers, and a whole one


def test_sampled_gradients_are_compact() -> None:
    model = chain_of_layers()
    mask = scattered_mask(model)
    work = trained(clip_step.sampled, model, mask)
    split = work.split()
    nnz = mask.nnz
    assert size_of(t for t in work.state() if t not in set(model.parameters())) == (
        12 * nnz + 4 * LAYERS
    )
    assert split.weights == LAYERS * MATRIX
    assert 12 * nnz < split.state < 32 * nnz  # plans too
    assert 4 * nnz <= split.gradients <= 4 * nnz + 4 * nnz // LAYERS


def test_compact_parameters_are_state() -> None:
    model = chain_of_layers()
    mask = scattered_mask(model)
    split = trained(compact, model, mask).split()
    nnz = mask.nnz
    assert split.weights == LAYERS * MATRIX
    assert 4 * nnz + 8 * nnz < split.state < 4 * nnz + 32 * nnz
    assert split.gradients <= 4 * nnz


def test_state_that_nobody_tells_of_is_found() -> None:
    model = chain_of_layers()
    mask = scattered_mask(model)
    work = trained(index_and_hook, model, mask)
    assert work.optimizer is None
    split = work.split()
    nnz = mask.nnz
    assert split.weights == LAYERS * MATRIX
    assert split.state == (8 + 4 + 8) * nnz + 4 * LAYERS  # int64 indices, values, moments, steps
    assert MATRIX <= split.gradients <= MATRIX + 4 * nnz


def test_frozen_model_has_neither_gradients_nor_state() -> None:
    model = chain_of_layers().requires_grad_(False)
    batch = torch.ones(1, WIDTH)

    def step() -> None:
        model(batch.detach().requires_grad_()).sum().backward()

    split = TrainingWork(step, model, batch=[batch]).split()
    assert (split.weights, split.gradients, split.state) == (LAYERS * MATRIX, 0, 0)


def test_gradients_that_stay_are_gradients() -> None:
    model = chain_of_layers()

    def accumulating(model: nn.Module, mask: CooMask, loss: Callable[[nn.Module], Tensor]) -> Step:
        def step() -> Tensor:
            value = loss(model)
            value.backward()
            return value

        return step

    split = trained(accumulating, model).split()
    assert split.gradients == LAYERS * MATRIX
    assert split.activations > MATRIX  # what is being added
    assert split.state == 0


def test_state_that_a_hook_of_backward_writes_is_no_gradient() -> None:
    model = chain_of_layers()
    batch = torch.ones(1, WIDTH)
    optimizer = torch.optim.SGD(model.parameters(), momentum=0.9)

    def hook(param: Tensor) -> None:
        gradient, param.grad = param.grad, None
        optimizer.state[param]["momentum_buffer"].mul_(0.9).add_(gradient)

    for param in model.parameters():
        optimizer.state[param]["momentum_buffer"] = torch.zeros_like(param)
        param.register_post_accumulate_grad_hook(hook)
    split = TrainingWork(lambda: model(batch).sum().backward(), model, optimizer, [batch]).split()
    assert split.state == LAYERS * MATRIX
    assert split.gradients == MATRIX


def test_casts_of_autocast_are_activations() -> None:
    model = chain_of_layers()
    batch = torch.randn(1, WIDTH)

    def loss(model: nn.Module) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(batch).float().square().sum()

    step = full(model, scattered_mask(model), loss)
    step()
    split = TrainingWork(step, model, batch=[batch]).split()
    assert split.weights == LAYERS * MATRIX
    assert split.state == 2 * LAYERS * MATRIX + 4 * LAYERS
    assert split.activations >= MATRIX // 2
    assert split.held > 3 * LAYERS * MATRIX


@pytest.mark.parametrize("method", [full, clip_step.streamed, clip_step.sampled, index_and_hook])
def test_steps_are_alike_and_leave_nothing_behind(method: Method) -> None:
    work = trained(method, chain_of_layers())
    assert work.split() == work.split()


# A model ------------------------------------------------------------------------------------------


@cache
def tiny_mask() -> CooMask:
    return uniform_mask(make_task("saft-tiny", 2, 2).model, SMOKE.density)


def tiny_work(name: str, folder: Path, **more: Any) -> TrainingWork:
    """A step of the tiny model, as the case measures it."""
    file = folder / "mask.safetensors"
    tiny_mask().save(file)
    return clip_step.steps(name, str(file), "saft-tiny", 4, 4, **more)


def tiny_split(name: str, folder: Path) -> tuple[Split, int, int]:
    """It; the number of parameters that are trained if all are; that of selected entries."""
    work = tiny_work(name, folder)
    numel = sum(param.numel() for param in candidates(work.model).values())
    work()
    split = work.split()
    assert split.weights == size_of(work.weights())  # as it is after the step
    return split, numel, tiny_mask().nnz


def test_full_fine_tuning_has_eight_bytes_of_state_per_parameter(tmp_path: Path) -> None:
    split, numel, _ = tiny_split(clip_step.FULL, tmp_path)
    assert split.state == pytest.approx(8 * numel, rel=1e-2)
    assert numel < split.gradients <= 4 * numel


def test_streaming_has_twelve_bytes_of_state_per_entry(tmp_path: Path) -> None:
    split, numel, nnz = tiny_split(clip_step.STREAMED, tmp_path)
    assert split.state == pytest.approx(12 * nnz, rel=1e-2)
    # One layer's and the compact ones; the largest layer is most of this model.
    assert 4 * nnz < split.gradients < 4 * numel


def test_sampling_has_twelve_bytes_of_state_per_entry_and_plans(tmp_path: Path) -> None:
    split, _, nnz = tiny_split(clip_step.SAMPLED, tmp_path)
    assert 12 * nnz < split.state < 28 * nnz
    assert 4 * nnz <= split.gradients < 5 * nnz


def test_indexing_and_hooking_has_twenty(tmp_path: Path) -> None:
    split, _, nnz = tiny_split(clip_step.INDEX_AND_HOOK, tmp_path)
    assert split.state == pytest.approx(20 * nnz, rel=1e-2)


def test_lora_has_adapters_among_its_weights(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    split, numel, _ = tiny_split(clip_step.LORA, tmp_path)
    plain, _, _ = tiny_split(clip_step.FLOOR, tmp_path)
    adapters = split.weights - plain.weights
    assert 0 < adapters < numel
    assert split.state == pytest.approx(2 * adapters, rel=0.05)


def test_floor_has_neither_gradients_nor_state(tmp_path: Path) -> None:
    split, numel, _ = tiny_split(clip_step.FLOOR, tmp_path)
    assert split.gradients == 0
    assert split.state < 1e-3 * numel  # constants of the loss


@pytest.mark.parametrize(
    "name", [clip_step.FULL, clip_step.STREAMED, clip_step.SAMPLED, clip_step.FLOOR]
)
def test_torchs_profiler_sees_the_same_peak(name: str, tmp_path: Path) -> None:
    """It counts in the allocator, where looking changes nothing; to the byte on torch 2.14."""
    work = tiny_work(name, tmp_path)
    work()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work.step()
    assert profiler.profiler is not None
    events: Any = profiler.profiler.kineto_results
    changes = [event for event in events.events() if event.name() == "[memory]"]
    changes.sort(key=lambda event: event.start_ns())
    grown = max(accumulate(event.nbytes() for event in changes))
    split = work.split()
    before = split.weights + split.state + size_of(work.batch)
    if name in (clip_step.STREAMED, clip_step.SAMPLED):
        before += 4 * tiny_mask().nnz  # the compact gradient
    assert split.held - before == pytest.approx(grown, rel=1e-3)


# Processes ----------------------------------------------------------------------------------------


def allocate(megabytes: int) -> Callable[[], object]:
    """Work for :func:`peak_memory`: it fills and frees a tensor."""
    return lambda: torch.ones(megabytes << 18).sum()


def train(megabytes: int) -> TrainingWork:
    """Work for it: full fine-tuning of one layer."""
    layer = nn.Linear(1 << 10, megabytes << 8, bias=False)
    batch = torch.ones(1, 1 << 10)
    unused = CooMask.from_indices(layer, {"weight": torch.tensor([0])})
    step = full(layer, unused, lambda layer: layer(batch).sum())
    return TrainingWork(step, layer, getattr(step, "optimizer", None), [batch])


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> str:
    """Lets a process find the functions of this file; its name."""
    root, folder = Path(__file__).parent.parent, Path(__file__).parent
    monkeypatch.setenv("PYTHONPATH", ":".join(map(str, (folder, root, root / "python"))))
    return Path(__file__).stem


def test_peak_memory_sees_what_is_freed_again(here: str) -> None:
    memory = peak_memory(f"{here}:allocate", megabytes=64)
    assert 64 << 20 <= memory.peak - memory.before < 80 << 20
    assert memory.allocator == "malloc, MALLOC_MMAP_THRESHOLD_=65536"
    assert (memory.weights, memory.allocations, memory.rest) == (None, None, None)


def test_peak_of_training_is_divided(here: str) -> None:
    memory = peak_memory(f"{here}:train", megabytes=32)
    size = 32 << 20
    assert (memory.weights, memory.gradients) == (size, size)
    assert memory.state == 2 * size + 4
    assert memory.activations is not None
    assert memory.rest is not None
    # The process grew by what came after the set-up, and there was a process before.
    assert -(1 << 20) < memory.peak - memory.before - 3 * size < 24 << 20
    assert 0 < memory.rest < memory.before
    assert 4 * size + 4 + memory.activations + memory.rest == memory.peak


def tell() -> Callable[[], object]:
    """Work that says what it runs on, in the only way there is."""
    raise RuntimeError(f"backend {backends.requested_backend()}, {torch.get_num_threads()} threads")


@pytest.mark.parametrize(("backend", "threads"), [("reference", 3), (None, 1)])
def test_process_runs_on_what_this_one_does(
    here: str, backend: str | None, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAFT_BACKEND", "cpu")
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    setting = replace(SMOKE, backend=backend, threads=threads)
    said = f"backend {backend}, {threads} threads"
    with applied(setting), pytest.raises(MeasurementError, match=said):
        peak_memory(f"{here}:tell")


def test_failing_work_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    given_back: list[str] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: given_back.append("GPU memory"))
    with pytest.raises(MeasurementError, match=r"bench\.memory:nothing could not be measured"):
        peak_memory("bench.memory:nothing")
    assert given_back == ["GPU memory"]  # which the process may have needed


def test_four_steps_are_taken_and_the_third_is_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ALLOCATOR:
        monkeypatch.delenv(name, raising=False)
    modes: list[int] = []
    step = lambda: modes.append(torch._C._len_torch_dispatch_stack())  # noqa: E731
    memory = watch(TrainingWork(step, chain_of_layers()))
    assert modes == [0, 0, 1, 0]
    assert memory.weights == LAYERS * MATRIX
    assert memory.allocator == "malloc"  # of this process, which was told nothing
    assert Memory(**json.loads(json.dumps(asdict(memory)))) == memory


def test_gpu_is_asked_for_its_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its tensors are the fake's; those of the CPU are not the GPU's."""
    log: list[str] = []
    fakes = {
        "synchronize": None,
        "reset_peak_memory_stats": None,
        "memory_allocated": 1000,
        "max_memory_allocated": 5000,
        "max_memory_reserved": 8192,
        "get_allocator_backend": "native",
        "memory_stats": None,
    }
    stats = iter([{}, {"allocated_bytes.all.allocated": 700, "allocation.all.allocated": 7}])

    def fake(name: str, value: Any) -> Callable[[], Any]:
        def function() -> Any:
            log.append(name)
            return next(stats) if name == "memory_stats" else value

        return function

    for name, value in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake(name, value))
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    step = lambda: log.append("step")  # noqa: E731
    memory = watch(TrainingWork(step, chain_of_layers(), device=torch.device("cuda")))
    assert [entry for entry in log if entry != "get_allocator_backend"] == [
        "synchronize", "reset_peak_memory_stats", "memory_allocated", "step", "step", "synchronize",
        "max_memory_allocated", "max_memory_reserved", "step",
        "memory_stats", "step", "memory_stats",
    ]  # fmt: skip
    assert (memory.before, memory.peak, memory.reserved) == (1000, 5000, 8192)
    assert memory.allocator == "torch.cuda native, expandable_segments:True"
    assert (memory.weights, memory.rest) == (0, 5000)
    assert (memory.allocated, memory.allocations) == (700, 7)


def test_steps_are_set_up_on_a_device(tmp_path: Path) -> None:
    work = tiny_work(clip_step.FLOOR, tmp_path, device="meta")
    tensors = [*work.weights(), *work.batch]
    assert {t.device.type for t in tensors} == {work.device.type} == {"meta"}

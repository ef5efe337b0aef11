"""What only a GPU can show: streams, CUDA graphs, synchronisation, a whole run like the CPU's.

The operations' own tests run on a GPU too where there is one (fixture ``device``); both carry the
mark ``gpu``, and are what ``make test-gpu`` runs.
"""

from __future__ import annotations

import copy
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench.cases.gpu import captured
from conftest import GPU
from saft_clip.config import FinetuneConfig
from saft_clip.methods.base import FROZEN, prompt_loss
from saft_clip.models import load_model
from saft_clip.prompts import class_prompts
from saft_clip.train import finetune
from saft_kernels import (
    CooMask,
    SparseAdamW,
    SparseDelta,
    StreamingTopK,
    attach,
    backends,
    ops,
    select,
    sparse_adamw_,
)
from saft_kernels.delta import DeltaSwap
from saft_kernels.fingerprint import same_bits
from saft_kernels.plan import EmbeddingPlan, LinearPlan
from small_deltas import DTYPES, assert_same_bits, make_base, make_mask, tuned_pair
from tolerances import assert_close
from training import (
    MODES,
    assert_unselected_unchanged,
    make_optimizer,
    small_mask,
    small_model,
    snapshot,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

#: Cycles that a stream is kept busy for: some tenths of a second.
_LONG = 400_000_000


@pytest.fixture(params=GPU or ["no-gpu"])
def cuda(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Runs the test with each backend that runs on the GPU; the GPU."""
    with backends.use_backend(request.param.split("-")[0]):
        yield torch.device("cuda", torch.cuda.current_device())
        torch.cuda.synchronize()


@pytest.fixture(autouse=True)
def _full_precision() -> Iterator[None]:
    """No TF32, so that the CPU gives the same up to the order of sums."""
    settings = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [each.allow_tf32 for each in settings]
    for each in settings:
        each.allow_tf32 = False
    yield
    for each, allowed in zip(settings, before, strict=True):
        each.allow_tf32 = allowed


def test_a_backend_runs_here() -> None:
    reasons = {name: backends.backend_status(name).reason for name in backends.GPU}
    assert GPU, f"torch sees a GPU, but no backend runs on it: {reasons}"


# CUDA graphs --------------------------------------------------------------------------------------


class AdamW:
    """A step over two tensors, with everything it changes."""

    def __init__(self, device: torch.device, dtype: torch.dtype, *, compact: bool) -> None:
        generator = torch.Generator().manual_seed(3)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        sizes, counts = (70_000, 900), (5_000, 30)
        self.params = [normal(size).to(device, dtype) for size in sizes]
        self.indices = [
            torch.randperm(size, generator=generator)[:count].sort().values.int().to(device)
            for size, count in zip(sizes, counts, strict=True)
        ]
        self.grads: Any = [normal(size).to(device, dtype) for size in sizes]
        if compact:
            self.grads = normal(sum(counts)).to(device)
        self.m, self.v = (torch.zeros(sum(counts), device=device) for _ in range(2))
        self.step = torch.zeros(2, device=device)
        pairs = list(zip(self.params, self.indices, strict=True))
        exact = torch.cat([param[index.long()] for param, index in pairs]).float()
        self.master = None if dtype == torch.float32 else exact
        self.flat, self.bounds = ops.end_to_end(self.indices)
        self.lr = torch.tensor(1e-2, device=device)

    def __call__(self) -> None:
        sparse_adamw_(
            self.params, self.grads, self.flat, self.m, self.v, self.step,
            bounds=self.bounds, lr=self.lr, weight_decay=0.1, master=self.master,
        )  # fmt: skip

    def outcome(self) -> list[Tensor]:
        state = [self.m, self.v, self.step, *self.params]
        return state if self.master is None else [*state, self.master]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("compact", [True, False])
def test_replayed_step_is_the_eager_one(
    cuda: torch.device, dtype: torch.dtype, compact: bool
) -> None:
    eager, replayed = (AdamW(cuda, dtype, compact=compact) for _ in range(2))
    replay = captured(replayed)  # which takes one step
    eager()
    for lr in (1e-2, 2e-3, 5e-4):
        for each in (eager, replayed):
            each.lr.fill_(lr)
        eager()
        replay()
    assert replayed.step.tolist() == [4, 4]
    for actual, expected in zip(replayed.outcome(), eager.outcome(), strict=True):
        assert torch.equal(actual, expected)


def test_replayed_gather_and_scatter(cuda: torch.device) -> None:
    dense = torch.randn(50_000, device=cuda)
    target = torch.zeros_like(dense)
    indices = torch.randperm(50_000)[:3_000].sort().values.int().to(cuda)
    values = torch.zeros(3_000, device=cuda)

    def work() -> None:
        values.copy_(ops.gather(dense, indices))
        ops.scatter_(target, indices, values)

    replay = captured(work)
    for _ in range(3):
        dense.normal_()
        replay()
        assert torch.equal(values, dense[indices.long()])
        assert torch.equal(target[indices.long()], values)
    assert int(target.count_nonzero()) <= 3_000


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_replayed_sampled_gradient(cuda: torch.device, dtype: torch.dtype) -> None:
    x, dy = (torch.randn(300, width, device=cuda).to(dtype) for width in (80, 120))
    flat = torch.randperm(80 * 120)[:500].sort().values.to(cuda)
    columns, *rest, _ = LinearPlan.of(80, flat).tensors()
    result = torch.zeros(500, device=cuda)

    def work() -> None:
        result.copy_(ops.sampled_grad(ops.pack_columns(x, columns), dy, *rest))

    replay = captured(work)
    for _ in range(2):
        x.normal_()
        dy.normal_()
        eager = ops.sampled_grad(ops.pack_columns(x, columns), dy, *rest)
        replay()
        assert torch.equal(result, eager)
        exact = (dy.double().t() @ x.double()).view(-1)[flat]
        torch.testing.assert_close(result.double(), exact, rtol=1e-4, atol=1e-4 * 300**0.5)


def test_replayed_embedding_gradient(cuda: torch.device) -> None:
    """Its tokens are sorted by torch, in the graph too: each replay has others."""
    tokens = torch.randint(30, (5_000,), device=cuda)
    dy = torch.randn(5_000, 60, device=cuda)
    flat = torch.randperm(30 * 60)[:500].sort().values.to(cuda)
    plan = EmbeddingPlan.of(60, flat).tensors()
    result = torch.zeros(500, device=cuda)

    def work() -> None:
        result.copy_(ops.sampled_embedding_grad(tokens, dy, *plan))

    replay = captured(work)
    for _ in range(2):
        tokens.random_(30)
        dy.normal_()
        eager = ops.sampled_embedding_grad(tokens, dy, *plan)
        replay()
        assert torch.equal(result, eager)
        dense = torch.zeros(30, 60, dtype=torch.float64, device=cuda)
        exact = dense.index_add_(0, tokens, dy.double()).view(-1)[flat]
        torch.testing.assert_close(result.double(), exact, rtol=1e-4, atol=1e-3)


def test_replayed_accumulation(cuda: torch.device) -> None:
    """The sums of a selection, whose launches depend on nothing that the GPU finds."""
    acc, grad = torch.zeros(100_000, device=cuda), torch.randn(100_000, device=cuda)
    top = StreamingTopK(500, device=cuda, keys=["a"], total=100_000)
    replay = captured(lambda: top.update("a", acc, grad, final=False))
    for _ in range(3):
        replay()
    torch.testing.assert_close(acc, 4 * grad)


def test_unknown_indices_cannot_be_captured(cuda: torch.device) -> None:
    dense, indices = torch.randn(100, device=cuda), torch.arange(50, device=cuda)
    graph = torch.cuda.CUDAGraph()
    with (
        pytest.raises(RuntimeError, match="run the step once before capturing it"),
        torch.cuda.graph(graph),
    ):
        ops.gather(dense, indices)
    torch.cuda.synchronize()


# Streams ------------------------------------------------------------------------------------------


@contextmanager
def busy_null_stream() -> Iterator[Callable[[], bool]]:
    """Keeps the null stream busy; yields a function that tells whether it still is."""
    torch.cuda.synchronize()
    done = torch.cuda.Event()
    torch.cuda._sleep(_LONG)
    done.record(torch.cuda.default_stream())
    yield lambda: not done.query()
    torch.cuda.synchronize()


def every_operation(device: torch.device) -> Callable[[], list[Tensor]]:
    """All operations on some tensors, known from a first run; what they give."""
    adamw = AdamW(device, torch.bfloat16, compact=False)
    x, dy = torch.randn(100, 40, device=device), torch.randn(100, 60, device=device)
    flat = torch.randperm(40 * 60)[:200].sort().values.to(device)
    columns, *rest, _ = LinearPlan.of(40, flat).tensors()
    tokens = torch.randint(30, (100,), device=device)
    entries = torch.randperm(30 * 60)[:90].sort().values.to(device)
    plan = EmbeddingPlan.of(60, entries)
    acc, grad = torch.zeros(90_000, device=device), torch.randn(90_000, device=device)
    kept = torch.arange(0, 90_000, 7, device=device)

    def run() -> list[Tensor]:
        adamw()
        gathered = ops.gather(grad, kept)
        ops.scatter_(acc, kept, gathered)
        top = StreamingTopK(300, device=device, keys=["a"], total=90_000)
        top.update("a", acc, grad)
        return [
            *adamw.outcome(),
            gathered,
            acc,
            ops.sampled_grad(ops.pack_columns(x, columns), dy, *rest),
            ops.sampled_embedding_grad(tokens, dy, *plan.tensors()),
        ]

    return run


def twins(device: torch.device) -> list[Callable[[], list[Tensor]]]:
    """Two times the same operations on tensors of their own, which have run once."""
    runs = []
    for _ in range(2):
        torch.manual_seed(0)
        runs.append(every_operation(device))
        runs[-1]()
    torch.cuda.synchronize()
    return runs


def test_work_goes_to_the_current_stream(cuda: torch.device) -> None:
    """A stream of torch's does not wait for the null stream, unless a launch goes there."""
    here, there = twins(cuda)
    here()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        there()  # this stream gets its memory
    with busy_null_stream() as is_busy:
        with torch.cuda.stream(side):
            found = there()
        side.synchronize()
        assert is_busy(), "something has waited for the null stream, or ran there"
    for actual, wanted in zip(found, here(), strict=True):
        assert torch.equal(actual, wanted)


def test_two_streams_do_not_disturb_each_other(cuda: torch.device) -> None:
    runs, streams = twins(cuda), [torch.cuda.Stream() for _ in range(2)]
    results: list[list[Tensor]] = [[], []]
    for _ in range(5):
        for i, (run, stream) in enumerate(zip(runs, streams, strict=True)):
            with torch.cuda.stream(stream):
                results[i] = run()
    torch.cuda.synchronize()
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_training_on_another_stream(cuda: torch.device) -> None:
    """Backward hooks run in threads of autograd's, on the stream of the forward pass."""
    model = small_model().to(cuda)
    twin = copy.deepcopy(model)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        train(model, "streamed")
    torch.cuda.current_stream().wait_stream(stream)
    train(twin, "streamed")
    for name, param in model.named_parameters():
        assert_close(param, twin.get_parameter(name), "adamw_trajectory")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_other_gpu_than_the_current_one(cuda: torch.device) -> None:
    other = torch.device("cuda", (torch.cuda.current_device() + 1) % torch.cuda.device_count())
    for result in every_operation(other)():
        assert result.device == other
    assert torch.cuda.current_device() == cuda.index
    own, there = small_model().to(cuda), small_model().to(other)
    for model in (own, there):
        train(model, "sampled")
    for name, param in there.named_parameters():
        assert_close(param.to(cuda), own.get_parameter(name), "adamw_trajectory")


# Synchronisation ----------------------------------------------------------------------------------


@contextmanager
def no_synchronisation() -> Iterator[None]:
    """Raises where the host would wait for the GPU."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def train(model: nn.Module, mode: str, steps: int = 4, *, watched: bool = False) -> None:
    """Some steps; if ``watched``, all but the first two may not wait for the GPU."""
    optimizer = make_optimizer(model, mode)
    tokens = torch.arange(12, device=next(model.parameters()).device)
    for step in range(steps):
        with no_synchronisation() if watched and step >= 2 else nullcontext():
            model(tokens).square().mean().backward()
            optimizer.clip_grad_norm_(1.0)
            optimizer.step()
            optimizer.zero_grad()
    optimizer.detach()


def test_synchronisation_would_be_noticed(cuda: torch.device) -> None:
    number = torch.ones((), device=cuda)
    with pytest.raises(RuntimeError), no_synchronisation():
        number.item()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_waits_for_nothing(cuda: torch.device, mode: str, dtype: torch.dtype) -> None:
    train(small_model(dtype).to(cuda), mode, watched=True)


def test_other_optimizers_wait_for_nothing(cuda: torch.device) -> None:
    model = small_model().to(cuda)
    tokens = torch.arange(12, device=cuda)
    with attach(model, small_mask(model)) as sparse:
        optimizer = torch.optim.SGD(sparse.parameters(), lr=0.1)
        for step in range(4):
            with no_synchronisation() if step >= 2 else nullcontext():
                model(tokens).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()


def test_selecting_waits_for_nothing(cuda: torch.device) -> None:
    """In 50 updates; from time to time a selection looks for gradients that are not finite."""
    acc, grad = torch.randn(2, 40_000, device=cuda).unbind()
    top = StreamingTopK(100, device=cuda, keys=list(range(51)))
    top.update(0, acc, grad)  # kernels are loaded
    with no_synchronisation():
        for key in range(1, 51):
            top.update(key, acc, grad)
    assert sum(index.numel() for index in top.finish().values()) == 100


# Like the CPU -------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_training_is_the_cpus(cuda: torch.device, mode: str) -> None:
    own, other = small_model(), small_model().to(cuda)
    before, mask = snapshot(own), small_mask(own)
    with backends.use_backend("cpu"):
        train(own, mode, steps=10)
    train(other, mode, steps=10)
    other = other.cpu()
    assert_unselected_unchanged(other, before, mask)
    for name, param in other.named_parameters():
        assert_close(param, own.get_parameter(name), "adamw_trajectory")


class TinyClip:
    """The built-in CLIP on a device, with a batch."""

    def __init__(self, device: torch.device) -> None:
        clip = load_model("saft-tiny", device=device)
        self.model = clip.model
        for name, param in self.model.named_parameters():
            param.requires_grad_(name not in FROZEN)
        prompts = class_prompts(["one", "two", "three"], ["a photo of {}."], clip.tokenizer)
        self.tokens = prompts.to(device)
        size: Any = self.model.visual.image_size
        height, width = (size, size) if isinstance(size, int) else size
        generator = torch.Generator().manual_seed(5)
        images = torch.randn(12, 3, height, width, generator=generator)
        labels = torch.randint(3, (12,), generator=generator)
        self.batches = list(
            zip(images.to(device).split(4), labels.to(device).split(4), strict=True)
        )

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        return prompt_loss(model, *batch, self.tokens, "fp32")

    def select(self) -> CooMask:
        return select(self.model, self.loss, self.batches, density=1e-2, exclude=list(FROZEN))


@pytest.mark.usefixtures("one_thread")
def test_tiny_clip_selects_and_trains_as_on_the_cpu(cuda: torch.device) -> None:
    with backends.use_backend("cpu"):
        own = TinyClip(torch.device("cpu"))
        expected = own.select()
    other = TinyClip(cuda)
    base = {name: value.clone() for name, value in other.model.state_dict().items()}
    mask = other.select()
    require_same_selection(own, expected, mask)

    def fine_tune(clip: TinyClip) -> list[float]:
        optimizer = SparseAdamW(clip.model, expected, lr=1e-4, gradients="sampled")
        losses = []
        for batch in clip.batches * 2:
            loss = clip.loss(clip.model, batch)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        optimizer.detach()
        return losses

    with backends.use_backend("cpu"):
        wanted = fine_tune(own)
    assert fine_tune(other) == pytest.approx(wanted, rel=1e-3)
    delta = SparseDelta.capture(other.model, expected, base=base)
    other.model.load_state_dict(base)
    delta.apply_(other.model)
    delta.revert_(other.model)
    for name, value in other.model.state_dict().items():
        assert torch.equal(value, base[name]), name


def tuned_on_the_cpu(
    dtype: torch.dtype = torch.float32,
) -> tuple[nn.Module, nn.Module, SparseDelta]:
    """A base, what it was tuned to, and the delta."""
    with backends.use_backend("cpu"):
        return tuned_pair(dtype)


def on_cpu(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).cpu()


@pytest.mark.parametrize("dtype", DTYPES)
def test_deltas_change_what_they_change_on_the_cpu(
    cuda: torch.device, dtype: torch.dtype, tmp_path: Path
) -> None:
    base, tuned, delta = tuned_on_the_cpu(dtype)
    model = make_base(dtype).to(cuda)
    delta.apply_(model)
    assert_same_bits(on_cpu(model), tuned)
    there = copy.deepcopy(base).to(cuda)  # a backend that was asked for serves no others
    again = SparseDelta.capture(model, make_mask(model), there, {"note": "a test"})
    again.save(tmp_path / "again.safetensors")
    delta.save(tmp_path / "delta.safetensors")
    files = [(tmp_path / f"{name}.safetensors").read_bytes() for name in ("again", "delta")]
    assert files[0] == files[1]
    delta.revert_(model)
    assert_same_bits(on_cpu(model), base)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_delta_from_a_file_on_the_gpu(cuda: torch.device, tmp_path: Path, alpha: float) -> None:
    base, _, delta = tuned_on_the_cpu()
    delta.scale(alpha).save(tmp_path / "delta.safetensors")
    loaded = SparseDelta.load(tmp_path / "delta.safetensors")
    model, own = make_base().to(cuda), make_base()
    loaded.apply_(model)
    with backends.use_backend("cpu"):
        delta.scale(alpha).apply_(own)
    assert_same_bits(on_cpu(model), own)
    states = base.to(cuda).state_dict()
    loaded.apply_(states)
    for name, value in model.state_dict().items():
        assert same_bits(value.cpu(), states[name].cpu()).all(), name


def test_one_model_on_the_gpu_takes_on_many_deltas(cuda: torch.device) -> None:
    base, tuned, delta = tuned_on_the_cpu()
    half = delta.scale(0.5)
    with backends.use_backend("cpu"):
        halfway = make_base()
        half.apply_(halfway)
    known = [(base, None), (tuned, delta), (halfway, half)]
    model = make_base().to(cuda)
    swap = DeltaSwap(model)
    for i in (1, 2, 1, 0, 2, 2, 0, 1):
        expected, wanted = known[i]
        swap.to(wanted)
        assert_same_bits(on_cpu(model), expected)


NONE = torch.empty(0, dtype=torch.int32)


def require_same_selection(own: TinyClip, expected: CooMask, mask: CooMask) -> None:
    """The same entries, but for those whose gradients differ from the last one by rounding only."""
    sums: dict[str, Tensor] = {}
    for batch in own.batches:
        own.model.zero_grad()
        own.loss(own.model, batch).backward()
        for name, param in own.model.named_parameters():
            if param.grad is not None:
                sums[name] = sums.get(name, torch.zeros(())) + len(batch[1]) * param.grad
    own.model.zero_grad()
    last = min(float(sums[n].view(-1)[i.long()].abs().min()) for n, i in expected.items())
    assert mask.nnz == expected.nnz
    for name in {*mask, *expected}:
        chosen, wanted = (set(dict(m.items()).get(name, NONE).tolist()) for m in (mask, expected))
        for entry in chosen ^ wanted:
            size = float(sums[name].view(-1)[entry].abs())
            assert size == pytest.approx(last, rel=1e-3), (name, entry)


def test_whole_run_on_the_gpu(cuda: torch.device, tmp_path: Path) -> None:
    """``saft finetune --device cuda``, its checkpoints and its report, to the same accuracy."""
    accuracies = {}
    for device in ("cpu", "cuda"):
        config = FinetuneConfig(
            train_data="builtin:mnist", eval_data=("builtin:mnist",), output=str(tmp_path / device),
            model="saft-tiny", shots=2, epochs=2, lr=1e-4, precision="fp32", augment=False,
            device=device,
        )  # fmt: skip
        backend = "cpu" if device == "cpu" else backends.requested_backend()
        with backends.use_backend(backend):
            results = finetune(config).results
        (after,) = (line for line in results["evaluations"] if line["when"] == "after")
        accuracies[device] = after["top1"]
    assert accuracies["cuda"] == pytest.approx(accuracies["cpu"], abs=0.02)
    deltas = [SparseDelta.load(tmp_path / d / "delta.safetensors") for d in ("cpu", "cuda")]
    assert deltas[0].nnz == deltas[1].nnz


# NVIDIA's checker ---------------------------------------------------------------------------------

_WORKLOAD = """
import sys
import torch
from saft_kernels import backends
from test_gpu import every_operation
with backends.use_backend(sys.argv[1]):
    run = every_operation(torch.device("cuda"))
    run()
torch.cuda.synchronize()
"""


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_sanitizer_has_nothing_to_say(cuda: torch.device, tool: str) -> None:
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not on PATH")
    backend = backends.requested_backend() or ""
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    command = [sanitizer, "--tool", tool, "--error-exitcode", "9", "--kernel-name-exclude",
               "kernel_substring=at::", sys.executable, "-c", _WORKLOAD, backend]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": path, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, f"{done.stdout[-4000:]}{done.stderr[-4000:]}"

"""Sampled mode inside ``torch.compile``: one graph, and the same gradients."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from saft_kernels import CooMask, SparseAdamW, attach, ops, reference, select
from saft_kernels.attach import Sampled
from saft_kernels.errors import OptimizerError
from saft_kernels.sampled_parameter import SampledParameter
from test_attach import CASES, Case, scattered_mask
from tolerances import assert_close
from training import backward, loss_of, small_mask, small_model, snapshot

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _forget_graphs() -> Iterator[None]:
    yield
    torch._dynamo.reset()


def compiled(function: Any, **options: Any) -> Any:
    """One graph or an error. It runs without a C++ compiler, with the bits of eager mode."""
    return torch.compile(function, backend="aot_eager", fullgraph=True, **options)


def take_gradients(sparse: Sampled) -> dict[str, Tensor]:
    found = {n: v.grad for n, v in sparse.named_parameters() if v.grad is not None}
    for values in sparse.parameters():
        values.grad = None
    return found


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name


#: What needs a forward pass before all its plans are made, or its warnings given.
PLANNED_LATE = {"RN50", "MultiheadAttention"}


@pytest.mark.filterwarnings("ignore:the gradient of")
@pytest.mark.parametrize("name", ["ViT-B-32", "RN50", "MultiheadAttention", "GPT-2", "BERT"])
def test_a_model_is_one_graph_with_the_gradients_of_eager_mode(name: str) -> None:
    case: Case = CASES[name]()
    mask = scattered_mask(case.model)
    with attach(case.model, mask) as sparse:
        if name in PLANNED_LATE:
            case.loss()
        torch.manual_seed(1)
        compiled(case.run)(case.model).backward()
        gradients = take_gradients(sparse)
        case.loss().backward()
        assert len(gradients) > 3
        assert_same(gradients, take_gradients(sparse))


def test_an_unplanned_use_breaks_only_the_first_graph_and_loses_no_gradient() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(6, 4))

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(x @ self.weight)  # a "weight" is planned as F.linear has it

    torch.manual_seed(0)
    model, x = Odd(), torch.randn(3, 6)
    with attach(model, CooMask.from_indices(model, {"weight": torch.tensor([1, 8])})) as sparse:
        torch.compile(model, backend="aot_eager")(x).sum().backward()
        gradients = take_gradients(sparse)
        model(x).sum().backward()
        assert_same(gradients, take_gradients(sparse))
        torch._dynamo.reset()
        compiled(model)(x).sum().backward()
        assert_same(take_gradients(sparse), gradients)


@pytest.mark.parametrize("mode", ["attach", "SparseAdamW"])
def test_training_a_compiled_model_gives_the_same_bits(mode: str) -> None:
    weights = []
    for wrap in (lambda model: model, compiled):
        model = small_model()
        mask, before = small_mask(model), snapshot(model)
        options = {"lr": 1e-2, "weight_decay": 0.1}
        optimizer: Any
        if mode == "attach":
            optimizer = torch.optim.AdamW(attach(model, mask).parameters(), **options)
        else:
            optimizer = SparseAdamW(model, mask, gradients="sampled", **options)
        run = wrap(model)
        for step in range(6):
            optimizer.zero_grad()
            backward(run, step)
            optimizer.step()
            with torch.no_grad():
                loss_of(run, step)
        for name, param in model.named_parameters():
            if name not in mask:
                assert torch.equal(param, before[name])
        weights.append(snapshot(model))
        assert isinstance(model.head.weight, SampledParameter)
        assert not model.head.weight._saft_entry.crowded
        assert not torch.equal(model.head.weight, before["head.weight"])
    assert_same(*weights)


def test_autocast_and_checkpointing_compile() -> None:
    torch.manual_seed(0)
    blocks = nn.ModuleList(nn.Sequential(nn.Linear(20, 20), nn.Tanh()) for _ in range(3))
    x = torch.randn(5, 20)

    def run() -> Tensor:
        out = x
        with torch.autocast("cpu", torch.bfloat16):
            for block in blocks:
                out = checkpoint(block, out, use_reentrant=False)
        return out.float().square().sum()

    with attach(blocks, select(blocks, density=0.05, score="random")) as sparse:
        run().backward()
        assert not sparse.streamed
        expected = take_gradients(sparse)
        assert len(expected) > 3
        compiled(run)().backward()
        assert_same(take_gradients(sparse), expected)


def test_autocast_may_choose_the_dense_product_in_compiled_code_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    crowded = frozenset({torch.bfloat16})
    monkeypatch.setattr("saft_kernels.entry._crowded_in", lambda *_: crowded)
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 4)), torch.randn(5, 20)
    mask = select(model, density=0.05, score="random")
    graphs: list[Any] = []

    def train(run: Any, dtype: torch.dtype | None) -> dict[str, Tensor]:
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            run(x).float().square().sum().backward()
        return take_gradients(sparse)

    with attach(model, mask) as sparse:
        run = torch.compile(model, backend=lambda g, _: graphs.append(g) or g, fullgraph=True)
        for _ in range(2):
            for dtype in (None, torch.bfloat16, torch.float16):
                expected = train(model, dtype)
                assert_same(train(run, dtype), expected)
                rounded = expected["0.weight"].bfloat16().float()  # as dense gradients are
                assert torch.equal(expected["0.weight"], rounded) == (dtype in crowded)
        assert len(graphs) == 3  # one for each type


@pytest.mark.parametrize("what", ["values", "weight"])
def test_changes_by_hand_need_update_before_compiled_code(what: str) -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(6, 4), torch.randn(3, 6)
    loaded = {"weight": torch.randn(4, 6), "bias": torch.randn(4)}
    mask = CooMask.from_indices(model, {"weight": torch.tensor([1, 8])})
    run = compiled(model)
    with attach(model, mask) as sparse:
        run(x).sum().backward()
        (values,) = sparse.parameters()
        with torch.no_grad():
            if what == "values":
                values.add_(1)
            else:
                model.load_state_dict(loaded)
        with pytest.raises(OptimizerError, match=r"'weight' was changed by hand.*update_\(\)"):
            run(x).sum().backward()
        sparse.update_()
        output = run(x)
        output.sum().backward()
        assert torch.equal(output, model(x))
        if what == "weight":
            assert torch.equal(values, ops.gather(loaded["weight"], mask["weight"]))


def test_changes_that_agree_need_nothing() -> None:
    model, x = nn.Linear(6, 4), torch.randn(3, 6)
    with attach(model, CooMask.from_indices(model, {"weight": torch.tensor([1, 8])})) as sparse:
        run = compiled(model)
        for tensor in (*sparse.parameters(), model.weight):
            tensor.detach().copy_(tensor.detach().clone())
        run(x).sum().backward()


def test_a_model_that_is_dropped_in_sampled_mode_is_freed() -> None:
    model = nn.Linear(6, 4)
    sparse = attach(model, CooMask.from_indices(model, {"weight": torch.tensor([1, 8])}))
    torch.optim.SGD(sparse.parameters(), lr=0.1).step()
    model(torch.randn(3, 6)).sum().backward()
    alive = [weakref.ref(model), weakref.ref(sparse), weakref.ref(model.weight)]
    del model, sparse
    gc.collect()
    assert [each() for each in alive] == [None, None, None]


def test_an_embedding_that_is_the_last_layer_too_is_one_graph() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens = nn.Embedding(30, 8)

        def forward(self, tokens: Tensor) -> Tensor:
            return F.linear(self.tokens(tokens).tanh(), self.tokens.weight)

    torch.manual_seed(0)
    model, tokens = Tied(), torch.randint(30, (20,))
    mask = CooMask.from_indices(model, {"tokens.weight": torch.arange(1, 240, 11)})
    model(tokens).square().sum().backward()
    expected = reference.gather(model.tokens.weight.grad, mask["tokens.weight"])
    with attach(model, mask) as sparse:
        compiled(model)(tokens).square().sum().backward()
        assert_close(next(sparse.parameters()).grad, expected, "sampled_grad")

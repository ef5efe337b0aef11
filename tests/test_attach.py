"""Sampled mode: real architectures get the dense gradient at every index, and are left as found."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import open_clip
import pytest
import timm
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from allocations import Allocations
from saft_kernels import CooMask, SparseAdamW, attach, ops, reference, sampled_parameter, select
from saft_kernels.errors import OptimizerError
from saft_kernels.sampled_parameter import SampledParameter
from tolerances import assert_close
from training import backward, loss_of, small_mask, small_model, snapshot

pytestmark = pytest.mark.usefixtures("one_thread")

# Architectures ------------------------------------------------------------------------------------


@dataclass
class Case:
    """A model in double precision, where gradients that cancel to zero do not hide mistakes."""

    model: nn.Module
    run: Callable[[nn.Module], Tensor]

    def loss(self) -> Tensor:
        torch.manual_seed(1)  # dropout
        return self.run(self.model)


def weighted(*outputs: Tensor) -> Tensor:
    """A loss that treats no two output elements alike."""
    total = torch.zeros((), dtype=torch.float64)
    for out in outputs:
        weights = torch.linspace(0.5, 1.5, out.numel(), dtype=torch.float64).view(out.shape)
        total = total + (out.double() * weights).sum() + out.double().square().sum()
    return total


def clip(name: str, depth: int = 2, image_size: int = 64, **changes: Any) -> Case:
    """An open_clip model with its own kinds of layers, fewer of them, and small images."""
    torch.manual_seed(0)
    config = copy.deepcopy(open_clip.get_model_config(name))
    vision, text = config["vision_cfg"], config["text_cfg"]
    vision["image_size"] = image_size
    if isinstance(vision.get("layers"), int):
        vision["layers"] = depth
    text["layers"], text["vocab_size"] = depth, 500
    if "multimodal_cfg" in config:
        config["multimodal_cfg"]["layers"] = depth
    vision.update(changes)
    kind = open_clip.CoCa if "multimodal_cfg" in config else open_clip.CLIP
    if config.pop("custom_text", False) and kind is open_clip.CLIP:
        kind = open_clip.CustomTextCLIP
    with small_timm_models(depth, image_size):
        model = kind(**config)
    if kind is open_clip.CoCa:  # open_clip 3.3 leaves it uninitialised
        nn.init.normal_(model.text_decoder.text_projection, std=0.02)
    images = torch.randn(2, 3, image_size, image_size, dtype=torch.float64)
    tokens = torch.randint(1, 499, (3, text.get("context_length", 77)))
    tokens[:, 9] = 499

    def run(model: Any) -> Tensor:
        if isinstance(model, open_clip.CoCa):
            return weighted(*(model(images, tokens[:2])[k] for k in ("logits", "image_features")))
        return weighted(model.encode_image(images), model.encode_text(tokens))

    return Case(model.double(), run)


@contextmanager
def small_timm_models(depth: int, image_size: int) -> Iterator[None]:
    """Let the towers that open_clip takes from timm be as small as its own."""
    create = timm.create_model
    sizes = {"depth": depth, "img_size": image_size}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timm, "create_model", lambda name, **rest: create(name, **{**rest, **sizes}))
        yield


def attention() -> Case:
    """torch's own, with one input, with two, and with three, batched, masked, learned, and not."""
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {
            "one": nn.MultiheadAttention(8, 2, batch_first=True),
            "two": nn.MultiheadAttention(8, 2, add_bias_kv=True),
            "three": nn.MultiheadAttention(8, 2, kdim=6, vdim=5, batch_first=True),
        }
    )
    model.register_parameter("queries", nn.Parameter(torch.randn(12, 8)))
    model.register_parameter("bias", nn.Parameter(torch.randn(12, 12)))
    x, y = torch.randn(2, 12, 8).double(), torch.randn(2, 12, 8).double()
    single = x[0]  # not batched
    k, v = torch.randn(2, 12, 6).double(), torch.randn(2, 12, 5).double()
    mask = torch.ones(12, 12, dtype=torch.bool).triu(1)

    def run(model: Any) -> Tensor:
        return weighted(
            model["one"](x, x, x, attn_mask=mask)[0],
            model["one"](x, y, y, need_weights=False)[0],
            model["one"](x, y, x + y)[0],
            model["one"](single, single, single)[0],
            model["one"](model.queries, x[0], x[0], attn_mask=model.bias)[0],
            model["one"](x, x, x, attn_mask=model.bias)[0],
            model["two"](x, y, y)[0],
            model["three"](x, k, v)[0],
        )

    return Case(model.double(), run)


def language(config: Any, model: Any) -> Case:
    torch.manual_seed(0)
    tokens = torch.randint(3, 90, (2, 12))

    def run(model: Any) -> Tensor:
        extra = {"decoder_input_ids": tokens} if config.is_encoder_decoder else {}
        return weighted(model(input_ids=tokens, **extra)[0])

    return Case(model(config).double(), run)


SMALL = {
    "vocab_size": 100,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}


def t5() -> Case:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    config = transformers.T5Config(vocab_size=100, decoder_start_token_id=0, **sizes)
    return language(config, transformers.T5ForConditionalGeneration)


def gpt2() -> Case:
    config = transformers.GPT2Config(vocab_size=100, n_embd=32, n_layer=2, n_head=4, n_positions=20)
    return language(config, transformers.GPT2LMHeadModel)


def bert() -> Case:
    return language(transformers.BertConfig(**SMALL), transformers.BertForMaskedLM)


def deberta() -> Case:
    relative = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}
    config = transformers.DebertaV2Config(**SMALL, **relative)
    return language(config, transformers.DebertaV2ForMaskedLM)


CASES: dict[str, Callable[[], Case]] = {
    "ViT-B-32": lambda: clip("ViT-B-32"),
    "ViT-B-16": lambda: clip("ViT-B-16"),
    "ViT-L-14": lambda: clip("ViT-L-14", depth=1, image_size=28),
    "RN50": lambda: clip("RN50", layers=[1, 1, 1, 1]),
    "SigLIP": lambda: clip("ViT-B-16-SigLIP"),
    "CoCa": lambda: clip("coca_ViT-B-32"),
    "EVA02": lambda: clip("EVA02-B-16"),
    "MultiheadAttention": attention,
    "T5": t5,
    "DeBERTa-v2": deberta,
    "BERT": bert,
    "GPT-2": gpt2,
}


def scattered_mask(model: nn.Module) -> CooMask:
    """A fiftieth of every matrix, a third of every vector, and at least one entry."""
    generator = torch.Generator().manual_seed(3)
    chosen = {
        name: torch.randperm(param.numel(), generator=generator)[
            : max(1, param.numel() // (50 if param.dim() > 1 else 3))
        ]
        for name, param in model.named_parameters()
    }
    return CooMask.from_indices(model, {n: i.sort().values.int() for n, i in chosen.items()})


#: Parameters above 1% of these small models that are used in ways without a sampled form.
STREAMED = {
    "DeBERTa-v2": {"deberta.encoder.rel_embeddings.weight"},
    "MultiheadAttention": {"queries", "bias"},
}

#: The largest share of the parameters that a tensor the size of a weight gradient may have.
DENSE = 0.01


@pytest.mark.parametrize("name", CASES)
def test_every_selected_parameter_gets_the_dense_gradient_at_its_indices(name: str) -> None:
    case = CASES[name]()
    model = case.model
    mask = scattered_mask(model)
    expected_loss = case.loss()
    expected_loss.backward()
    dense = {n: p.grad for n, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    with attach(model, mask) as sparse, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loss = case.loss()
        assert_close(loss.detach(), expected_loss.detach(), "double_model")
        loss.backward()
        for param_name, values in sparse.named_parameters():
            expected = dense[param_name]
            if expected is None:
                assert values.grad is None, param_name
                continue
            assert values.grad is not None, param_name
            wanted = reference.gather(expected, mask[param_name])
            assert_close(values.grad, wanted, "double_model")
    assert all(param.grad is None for param in model.parameters())
    named = {str(warning.message).split("'")[1] for warning in caught}
    assert named == STREAMED.get(name, set())


@pytest.mark.parametrize("name", ["ViT-B-16", "SigLIP", "EVA02", "GPT-2", "RN50"])
def test_no_dense_weight_gradient_is_made(name: str) -> None:
    """Watches for outputs with the shape of a weight above 1% of D, or of its transpose."""
    case = CASES[name]()
    numel = sum(p.numel() for p in case.model.parameters())
    weights = [p.shape for p in case.model.parameters() if p.numel() > DENSE * numel]
    large = {*weights, *(torch.Size(reversed(shape)) for shape in weights)}
    mask = select(case.model, density=1e-3, score="random", seed=3)
    with attach(case.model, mask):
        loss = case.loss()
        with Allocations() as seen:
            loss.backward()
    assert not large & seen.shapes
    loss = case.loss()
    with Allocations() as seen:  # the watch does see them
        loss.backward()
    assert large & seen.shapes


# The handle ---------------------------------------------------------------------------------------


def test_the_model_is_left_as_it_was_found() -> None:
    model = small_model()
    model.norm.bias.requires_grad_(False)
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    params = dict(model.named_parameters())
    before, state = snapshot(model), list(model.state_dict())
    with attach(model, small_mask(model)) as sparse:
        assert not any(p.requires_grad for p in model.parameters())
        assert list(model.state_dict()) == state
        assert dict(model.named_parameters()).keys() == params.keys()
        assert isinstance(model.head.weight, nn.Parameter)
        backward(model, 0)
    sparse.detach()
    for name, param in model.named_parameters():
        assert param is params[name]
        assert type(param) is nn.Parameter
        assert param.requires_grad == flags[name]
        assert torch.equal(param, before[name])
        assert not hasattr(param, "_saft_entry")


def test_an_exception_inside_the_block_detaches() -> None:
    model = small_model()
    with pytest.raises(KeyError), attach(model, small_mask(model)):
        raise KeyError
    assert type(model.head.weight) is nn.Parameter


def test_attaching_twice_is_refused_and_changes_nothing() -> None:
    model = small_model()
    with attach(model, small_mask(model)):
        with pytest.raises(OptimizerError, match=r"is in sampled mode already.*detach"):
            attach(model, small_mask(model))
        assert isinstance(model.head.weight, SampledParameter)
    attach(model, small_mask(model)).detach()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_optimizer_trains_the_compact_leaves(dtype: torch.dtype) -> None:
    model, twin = small_model(dtype), small_model().to(dtype)
    mask, before = small_mask(model), snapshot(model)
    ours = SparseAdamW(twin, mask, lr=1e-2, weight_decay=0.1, gradients="sampled")
    with attach(model, mask) as sparse:
        optimizer = torch.optim.AdamW(sparse.parameters(), lr=1e-2, weight_decay=0.1)
        for step in range(8):
            for each, other in ((model, optimizer), (twin, ours)):
                other.zero_grad()
                backward(each, step)
                other.step()
    ours.detach()
    for name, param in model.named_parameters():
        assert_close(param.float(), twin.get_parameter(name).float(), "adamw_rounded_weight")
        if name not in mask:
            assert torch.equal(param, before[name])
    assert not torch.equal(model.head.weight, before["head.weight"])


def test_gradient_scaling_and_clipping_act_on_the_compact_leaves() -> None:
    weights = []
    for scaled in (False, True):
        model = small_model()
        with attach(model, small_mask(model)) as sparse:
            optimizer = torch.optim.AdamW(sparse.parameters(), lr=1e-2)
            scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaled)
            for step in range(4):
                optimizer.zero_grad()
                scaler.scale(loss_of(model, step)).backward()
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(sparse.parameters(), 0.1)
                scaler.step(optimizer)
                scaler.update()
        weights.append(snapshot(model))
    plain, unscaled = weights
    assert all(torch.equal(plain[name], unscaled[name]) for name in plain)  # by a power of two


def test_a_step_that_the_scaler_skips_changes_no_weight() -> None:
    model = small_model()
    before = snapshot(model)
    with attach(model, small_mask(model)) as sparse:
        optimizer = torch.optim.AdamW(sparse.parameters(), lr=1e-2)
        scaler = torch.amp.GradScaler("cpu")
        scaler.scale(loss_of(model, 0) * float("inf")).backward()
        scaler.step(optimizer)
        scaler.update()
        loss_of(model, 1)
    assert all(torch.equal(param, before[name]) for name, param in model.named_parameters())


def train_in_parallel(rank: int, folder: str) -> None:
    """One of two processes, each with its half of every batch."""
    torch.set_num_threads(1)
    start = f"file://{folder}/start"
    torch.distributed.init_process_group("gloo", start, rank=rank, world_size=2)
    torch.manual_seed(rank)  # the first process' weights are everybody's
    model = parallel_model()
    sparse = attach(model, select(model, density=0.05, score="random", seed=0))
    parallel = nn.parallel.DistributedDataParallel(sparse.as_module())
    optimizer = torch.optim.AdamW(sparse.parameters(), lr=1e-2)
    for batch in parallel_batches():
        optimizer.zero_grad()
        parallel(batch[rank::2]).square().mean().backward()
        optimizer.step()
    sparse.detach()
    torch.save(model.state_dict(), f"{folder}/{rank}")
    torch.distributed.destroy_process_group()


def parallel_model() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 8))


def parallel_batches() -> Tensor:
    return torch.randn(5, 10, 16, generator=torch.Generator().manual_seed(3))


def test_distributed_data_parallel_trains_as_one_process_does(tmp_path) -> None:
    torch.multiprocessing.spawn(train_in_parallel, (str(tmp_path),), nprocs=2)
    torch.manual_seed(0)
    model = parallel_model()
    before = snapshot(model)
    with attach(model, select(model, density=0.05, score="random", seed=0)) as sparse:
        optimizer = torch.optim.AdamW(sparse.parameters(), lr=1e-2)
        for batch in parallel_batches():
            optimizer.zero_grad()
            model(batch).square().mean().backward()
            optimizer.step()
        assert not sparse.streamed
    assert not torch.equal(model[0].weight, before["0.weight"])
    for rank in range(2):
        trained = torch.load(tmp_path / str(rank), weights_only=True)
        for name, weight in model.state_dict().items():
            assert_close(trained[name], weight, "adamw_trajectory")


def test_an_optimizer_that_hides_its_writes_moves_the_weights() -> None:
    class Hidden(torch.optim.SGD):
        def step(self) -> None:
            for group in self.param_groups:
                for param in group["params"]:
                    param.data.sub_(param.grad, alpha=group["lr"])  # changes no version

    weights = []
    for kind in (torch.optim.SGD, Hidden):
        model = small_model()
        with attach(model, small_mask(model)) as sparse:
            optimizer = kind(sparse.parameters(), lr=1e-2)
            backward(model, 0)
            optimizer.step()
        weights.append(snapshot(model))
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_an_empty_matrix_is_no_obstacle() -> None:
    model = nn.ModuleDict({"empty": nn.Linear(3, 0), "linear": nn.Linear(20, 20)})
    with attach(model, select(model, density=0.05, score="random")) as sparse:
        model["linear"](torch.randn(3, 20)).sum().backward()
        assert any(values.grad is not None for values in sparse.parameters())


def test_weights_that_are_loaded_are_where_training_goes_on() -> None:
    model, other = small_model(), small_model()
    mask = small_mask(model)
    with torch.no_grad():
        for param in other.parameters():
            param.add_(1)
    with attach(model, mask) as sparse:
        model.load_state_dict(other.state_dict())
        loss_of(model, 0)
        for name, values in sparse.named_parameters():
            assert torch.equal(values, ops.gather(other.get_parameter(name), mask[name]))


def test_state_dict_holds_the_values_of_the_last_step() -> None:
    model = small_model()
    mask = small_mask(model)
    with attach(model, mask) as sparse:
        with torch.no_grad():
            for values in sparse.parameters():
                values.fill_(3.0)
        state = model.state_dict()
        assert (ops.gather(state["head.weight"], mask["head.weight"]) == 3).all()


def test_copies_and_pickles_of_an_attached_model_are_plain() -> None:
    model = small_model()
    with attach(model, small_mask(model)):
        copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for each in copies:
        for name, param in each.named_parameters():
            assert type(param) is nn.Parameter
            assert torch.equal(param, model.get_parameter(name))


def test_frozen_layers_below_the_first_selected_entry_have_no_backward() -> None:
    model = nn.Sequential(*[nn.Linear(6, 6) for _ in range(4)])
    mask = CooMask.from_indices(model, {"2.weight": torch.tensor([1, 8])})
    with attach(model, mask):
        below = model[:2](torch.randn(3, 6))
        assert not below.requires_grad
        assert model[2](below).requires_grad


def test_checkpointing_gives_the_same_gradients() -> None:
    model = nn.Sequential(*[nn.Sequential(nn.Linear(20, 20), nn.Tanh()) for _ in range(3)])
    mask = select(model, density=0.05, score="random")
    x = torch.randn(5, 20)
    grads = []
    for through in (lambda f, x: f(x), lambda f, x: checkpoint(f, x, use_reentrant=False)):
        with attach(model, mask) as sparse:
            out = x
            for block in model:
                out = through(block, out)
            out.square().sum().backward()
            assert not sparse.streamed
            grads.append([values.grad for values in sparse.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_evaluation_in_the_middle_of_a_graph_changes_nothing() -> None:
    model = small_model()
    with attach(model, small_mask(model)) as sparse:
        loss = loss_of(model, 0)
        with torch.no_grad():
            loss_of(model, 1)
        loss.backward()
        first = [values.grad.clone() for values in sparse.parameters()]
        for values in sparse.parameters():
            values.grad = None
        backward(model, 0)
        assert all(map(torch.equal, first, [values.grad for values in sparse.parameters()]))


def test_a_weight_with_two_uses_in_one_graph_gets_the_sum() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(20, 6)
            self.head = nn.Linear(6, 20, bias=False)
            self.head.weight = self.table.weight

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(torch.tanh(self.table(tokens)))

    torch.manual_seed(0)
    model, tokens = Tied().double(), torch.randint(0, 20, (4, 5))
    mask = select(model, density=0.3, score="random")
    weighted(model(tokens)).backward()
    expected = reference.gather(model.table.weight.grad, mask["table.weight"])
    with attach(model, mask) as sparse:
        weighted(model(tokens)).backward()
        (values,) = sparse.parameters()
        assert_close(values.grad, expected, "double_model")


def test_a_large_parameter_without_a_sampled_form_is_named() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(6, 6))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight.exp()

    model = Odd()
    mask = CooMask.from_indices(model, {"weight": torch.tensor([1, 8])})
    x = torch.randn(3, 6)
    model(x).sum().backward()
    expected = reference.gather(model.weight.grad, mask["weight"])
    with attach(model, mask) as sparse:
        with pytest.warns(UserWarning, match=r"'weight' is computed whole.*exp has no sampled"):
            model(x).sum().backward()
        assert sparse.streamed == {"weight": "exp has no sampled form"}
        assert torch.allclose(next(sparse.parameters()).grad, expected)


def cross_attention() -> tuple[nn.MultiheadAttention, Callable[[], Tensor]]:
    torch.manual_seed(0)
    model = nn.MultiheadAttention(8, 2).double()
    q, k = torch.randn(3, 2, 8).double(), torch.randn(4, 2, 8).double()
    return model, lambda: weighted(model(q, k, k)[0])


def test_a_crowded_part_of_attention_uses_the_dense_product() -> None:
    model, loss = cross_attention()
    indices = {"in_proj_weight": torch.cat([torch.arange(64, 128, 2), torch.tensor([140])])}
    mask = CooMask.from_indices(model, indices)
    loss().backward()
    expected = reference.gather(model.in_proj_weight.grad, mask["in_proj_weight"])
    with attach(model, mask) as sparse, warnings.catch_warnings():
        warnings.simplefilter("error")
        loss().backward()
        assert "50% of its entries" in sparse.streamed["in_proj_weight"]
        assert_close(next(sparse.parameters()).grad, expected, "double_model")


def test_attention_of_a_torch_we_do_not_know_is_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sampled_parameter._HANDLERS, F.multi_head_attention_forward)
    model, loss = cross_attention()
    mask = CooMask.from_indices(model, {"in_proj_weight": torch.tensor([1, 70, 140])})
    loss().backward()
    expected = reference.gather(model.in_proj_weight.grad, mask["in_proj_weight"])
    with attach(model, mask) as sparse:
        with pytest.warns(UserWarning, match="multi_head_attention_forward has no sampled form"):
            loss().backward()
        assert_close(next(sparse.parameters()).grad, expected, "double_model")


def test_a_frozen_matrix_in_attention_is_not_warned_of() -> None:
    class Learned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2)
            self.bias = nn.Parameter(torch.randn(5, 5))

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x, x, x, attn_mask=self.bias)[0]

    model = Learned()
    mask = CooMask.from_indices(model, {"attention.in_proj_weight": torch.tensor([1, 100])})
    with attach(model, mask) as sparse, warnings.catch_warnings():
        warnings.simplefilter("error")
        model(torch.randn(5, 2, 8)).sum().backward()
        assert not sparse.streamed


def test_a_parameter_of_another_class_is_refused() -> None:
    class Special(nn.Parameter):
        pass

    model = nn.Linear(3, 3)
    model.weight = Special(torch.randn(3, 3))
    mask = CooMask.from_indices(model, {"weight": torch.tensor([1])})
    with pytest.raises(OptimizerError, match=r"'weight' is a Special"):
        attach(model, mask)


def test_a_crowded_weight_uses_the_dense_product_without_a_warning() -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(20, 20).double(), torch.randn(7, 20).double()
    mask = CooMask.from_indices(model, {"weight": torch.arange(0, 400, 2)})
    weighted(model(x)).backward()
    expected = reference.gather(model.weight.grad, mask["weight"])
    with attach(model, mask) as sparse, warnings.catch_warnings():
        warnings.simplefilter("error")
        weighted(model(x)).backward()
        assert "50% of its entries" in sparse.streamed["weight"]
        assert_close(next(sparse.parameters()).grad, expected, "double_model")

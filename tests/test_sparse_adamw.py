"""sparse_adamw_ against its specification and against torch.optim.AdamW."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from conftest import CPU, IMPLEMENTATIONS, implementation, operations
from saft_kernels import backends, ops
from tolerances import assert_close

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
GPU_BACKENDS = [name for name in IMPLEMENTATIONS if name not in CPU]
SHAPES = ((), (1,), (0, 4), (40, 50), (6, 5, 4, 3), (70_003,))


@dataclass
class Problem:
    """Tensors, gradients and state of one call."""

    params: list[Tensor]
    grads: list[Tensor]
    indices: list[Tensor]
    exp_avg: Tensor
    exp_avg_sq: Tensor
    master: Tensor | None
    step: Tensor
    options: dict[str, object] = field(default_factory=dict)

    @property
    def state(self) -> list[Tensor]:
        masters = [] if self.master is None else [self.master]
        return [self.exp_avg, self.exp_avg_sq, self.step, *masters]

    def clone(self) -> Problem:
        keep = {"memory_format": torch.preserve_format}
        return Problem(
            [p.clone(**keep) for p in self.params],
            self.grads,
            self.indices,
            self.exp_avg.clone(),
            self.exp_avg_sq.clone(),
            None if self.master is None else self.master.clone(),
            self.step.clone(),
            dict(self.options),
        )

    def compact_grad(self) -> Tensor:
        pairs = zip(self.grads, self.indices, strict=True)
        pieces = [g.reshape(-1)[i.long()].float() for g, i in pairs]
        return torch.cat([self.exp_avg.new_zeros(0), *pieces])

    def run(self, compact: bool = False) -> Problem:
        ops.sparse_adamw_(
            self.params,
            self.compact_grad() if compact else self.grads,
            self.indices,
            self.exp_avg,
            self.exp_avg_sq,
            self.step,
            master=self.master,
            **{"lr": 1e-2, "weight_decay": 0.1, **self.options},
        )
        return self


def every_third(param: Tensor, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.arange(0, param.numel(), 3, dtype=dtype, device=param.device)


def problem(dtype: torch.dtype, device: torch.device, **options: object) -> Problem:
    torch.manual_seed(0)
    params = [torch.randn(shape, device=device).to(dtype) for shape in SHAPES]
    grads = [torch.randn_like(p) for p in params]
    params[4] = params[4].to(memory_format=torch.channels_last)
    grads[3] = grads[3].t().contiguous().t()
    indices = [every_third(p, [torch.int32, torch.int64][n % 2]) for n, p in enumerate(params)]
    nnz = sum(map(len, indices))
    pairs = list(zip(params, indices, strict=True))
    masters = [p.reshape(-1)[i.long()].float() for p, i in pairs]
    return Problem(
        params,
        grads,
        indices,
        torch.randn(nnz, device=device),
        torch.rand(nnz, device=device),
        None if dtype == torch.float32 else torch.cat(masters),
        torch.arange(float(len(params)), device=device),
        {key: o.to(device) if isinstance(o, Tensor) else o for key, o in options.items()},
    )


def assert_equals_specification(given: Problem, compact: bool) -> None:
    actual = given.clone().run(compact)
    with backends.use_backend("reference"):
        expected = given.clone().run(compact)
    for a, e in zip(actual.state, expected.state, strict=True):
        assert_close(a, e, "adamw_step")
    for a, e in zip(actual.params, expected.params, strict=True):
        name = "adamw_step" if a.dtype == torch.float32 else "adamw_rounded_weight"
        assert_close(a.float(), e.float(), name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"maximize": True},
        {"weight_decay": 0.0, "betas": (0.0, 0.5), "eps": 1e-3},
        {"lr": torch.tensor(0.05)},
        {"grad_scale": torch.tensor([1024.0]), "found_inf": torch.tensor([0.0])},
    ],
)
def test_equals_specification(device, dtype, compact, options):
    assert_equals_specification(problem(dtype, device, **options), compact)


@pytest.mark.parametrize("beta1", [0.0, 0.3, 0.5, 0.9])
def test_first_moment_of_gradients_that_shrink_a_billionfold(device, beta1):
    """A moment that is interpolated from the far end would lose the small gradient."""
    gradients = torch.tensor([[1e5, -1e5, 3.0], [1e-4, 1e-4, -1e-8]])
    weight, index = torch.zeros(3, device=device), torch.arange(3, device=device)
    m, v, step = (torch.zeros(n, device=device) for n in (3, 3, 1))
    expected = torch.zeros(3)
    for gradient in gradients:
        ops.sparse_adamw_(
            [weight], gradient.to(device), [index], m, v, step, lr=0.1, betas=(beta1, 0.5)
        )
        expected.lerp_(gradient, 1 - beta1)
    assert torch.equal(m.cpu(), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_on_every_implementation(dtype):
    outcomes = []
    for isa in backends.cpu_isas():
        with backends.use_cpu_isa(isa):
            done = problem(dtype, torch.device("cpu")).run()
            outcomes.append([*done.params, *done.state])
    for outcome in outcomes[1:]:
        assert all(torch.equal(a, b) for a, b in zip(outcomes[0], outcome, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_dense_and_compact_gradients_give_the_same_bits(device, dtype):
    dense, compact = problem(dtype, device).run(), problem(dtype, device).run(compact=True)
    pairs = zip([*dense.params, *dense.state], [*compact.params, *compact.state], strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("device", CPU, indirect=True)
def test_same_bits_for_any_number_of_threads(device, threads, dtype, compact):
    done = problem(dtype, device).run(compact)
    torch.set_num_threads(1)
    alone = problem(dtype, device).run(compact)
    pairs = zip([*done.params, *done.state], [*alone.params, *alone.state], strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_indices_of_either_width_give_the_same_bits(device, dtype):
    narrow, wide = problem(dtype, device), problem(dtype, device)
    narrow.indices = [index.int() for index in narrow.indices]
    wide.indices = [index.long() for index in wide.indices]
    narrow.run(), wide.run()
    pairs = zip([*narrow.params, *narrow.state], [*wide.params, *wide.state], strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("compact", [False, True])
def test_other_entries_keep_their_bits(device, dtype, compact):
    before = problem(dtype, device)
    after = before.clone().run(compact)
    for old, new, indices in zip(before.params, after.params, before.indices, strict=True):
        frozen = torch.ones(old.numel(), dtype=torch.bool, device=device)
        frozen[indices.long()] = False
        assert torch.equal(old.reshape(-1)[frozen], new.reshape(-1)[frozen])
        assert new.stride() == old.stride()


def test_equals_torch_adamw_where_everything_is_selected(device):
    weight = torch.randn(300, 7, device=device)
    ours = torch.nn.Parameter(weight.clone())
    theirs = torch.nn.Parameter(weight.clone())
    optimizer = torch.optim.AdamW([theirs], lr=1e-2, weight_decay=0.1)
    m, v, step = (torch.zeros(n, device=device) for n in (2100, 2100, 1))
    state = Problem([ours], [], [torch.arange(2100, device=device)], m, v, None, step)
    for _ in range(20):
        theirs.grad = torch.randn_like(weight)
        optimizer.step()
        state.grads = [theirs.grad]
        state.run()
    assert_close(ours.detach(), theirs.detach(), "adamw_same_gradients")
    assert float(state.step) == 20


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_weights_are_the_rounding_of_master(device, dtype):
    done = problem(dtype, device).run()
    begin = 0
    for param, indices in zip(done.params, done.indices, strict=True):
        master = done.master[begin : begin + len(indices)]
        assert torch.equal(param.reshape(-1)[indices.long()], master.to(dtype))
        begin += len(indices)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_is_to_nearest_even_over_the_whole_range(device, dtype):
    patterns = torch.arange(0, 1 << 32, 65_521 * 8 + 1, dtype=torch.int64)
    fine = torch.arange(0x33000000, 0x39000000, 4_099 * 4, dtype=torch.int64)
    if dtype == torch.bfloat16:  # every one of them
        ties = torch.arange(1 << 16, dtype=torch.int64) << 16 | 0x8000
    else:  # all between numbers above 2^-14; those between denormals differ in the bits they drop
        ties = torch.arange(0x38800000 >> 13, 0x47800000 >> 13, dtype=torch.int64) << 13 | 0x1000
    denormal_ties = ((torch.arange(1024) + 0.5) * 2.0**-24).view(torch.int32).long()
    bits = torch.cat([patterns, fine, ties, ties | 1 << 31, denormal_ties])
    master = bits.to(torch.uint32).view(torch.float32).to(device)
    n = master.numel()
    weight = torch.zeros(n, dtype=dtype, device=device)
    nothing = torch.zeros(n, device=device)
    ops.sparse_adamw_(
        [weight], nothing, [torch.arange(n, device=device)], nothing.clone(), nothing.clone(),
        torch.zeros(1, device=device), lr=0.0, master=master.clone(),
    )  # fmt: skip
    expected = master.to(dtype)
    assert torch.equal(weight.isnan(), expected.isnan())
    number = ~expected.isnan()
    assert torch.equal(weight[number].view(torch.int16), expected[number].view(torch.int16))


def test_found_inf_leaves_everything_as_it_was(device):
    before = problem(torch.float32, device, found_inf=torch.tensor(1.0))
    after = before.clone().run()
    pairs = zip([*before.params, *before.state], [*after.params, *after.state], strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_no_tensors_is_no_step(device):
    nothing = torch.zeros(0, device=device)
    ops.sparse_adamw_(
        [], [], nothing.int(), nothing, nothing.clone(), nothing.clone(), bounds=[0], lr=0.1
    )


@given(
    sizes=st.lists(st.integers(0, 300), min_size=1, max_size=6),
    data=st.data(),
)
@settings(max_examples=80, deadline=None)
def test_property_any_split_into_tensors_is_the_same_step(sizes, data):
    """Many tensors in one call are the same as one call each."""
    assert_any_split_is_the_same_step(sizes, data, torch.device("cpu"))


@pytest.mark.parametrize("name", GPU_BACKENDS)
@given(
    sizes=st.lists(st.integers(0, 1200), min_size=1, max_size=6),
    data=st.data(),
)
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_property_any_split_into_tensors_is_the_same_step_on_a_gpu(name, sizes, data):
    with implementation(name) as device:
        assert_any_split_is_the_same_step(sizes, data, device)


def assert_any_split_is_the_same_step(sizes, data, device):
    torch.manual_seed(sum(sizes))
    params = [torch.randn(n, device=device) for n in sizes]
    indices = [
        torch.tensor(
            sorted(data.draw(st.sets(st.integers(0, n - 1)))) if n else [], dtype=torch.int32
        ).to(device)
        for n in sizes
    ]
    grads = [torch.randn_like(p) for p in params]
    nnz = sum(map(len, indices))

    def zeros(n: int) -> Tensor:
        return torch.zeros(n, device=device)

    together = Problem(
        [p.clone() for p in params], grads, indices, zeros(nnz), zeros(nnz), None,
        zeros(len(sizes)),
    ).run()  # fmt: skip
    for param, grad, index, expected in zip(params, grads, indices, together.params, strict=True):
        n = len(index)
        Problem([param], [grad], [index], zeros(n), zeros(n), None, zeros(1)).run()
        assert torch.equal(param, expected)


@pytest.mark.parametrize("compact", [False, True])
def test_indices_end_to_end_are_the_same_step(device, compact):
    apart, together = (problem(torch.float32, device) for _ in range(2))
    apart.run(compact)
    indices, bounds = ops.end_to_end(together.indices)
    ops.sparse_adamw_(
        together.params, together.compact_grad() if compact else together.grads, indices,
        together.exp_avg, together.exp_avg_sq, together.step,
        bounds=bounds, lr=1e-2, weight_decay=0.1,
    )  # fmt: skip
    pairs = zip([*apart.params, *apart.state], [*together.params, *together.state], strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("place", [0, 2_047, 2_048, 5_000, 69_998])
@pytest.mark.parametrize("device", CPU, indirect=True)
def test_disorder_anywhere_is_noticed(device, threads, place):
    """Threads check the order piece by piece; a pair across two pieces belongs to one of them."""
    assert_disorder_is_noticed(device, place)


@pytest.mark.parametrize("place", [0, 69_998])
def test_disorder_is_noticed(device, place):
    assert_disorder_is_noticed(device, place)


def assert_disorder_is_noticed(device, place):
    n = 70_000
    indices = torch.arange(n, dtype=torch.int32)
    indices[place + 1] = place
    weight, grad, m, v = (torch.zeros(n, device=device) for _ in range(4))
    with pytest.raises(RuntimeError, match="increase strictly"):
        ops.sparse_adamw_(
            [weight], grad + 1, [indices.to(device)], m, v, torch.zeros(1, device=device), lr=1.0
        )
    assert not weight.any()


@pytest.mark.parametrize(
    "bounds", [None, [], [0, 1], [0, 2, 1, 3], [1, 1, 2, 3], [0, 1, 2, 4], [-1, 1, 2, 3]]
)
def test_bounds_that_do_not_fit_are_refused(device, bounds):
    weights = [torch.zeros(4, device=device) for _ in range(3)]
    indices = torch.tensor([0, 1, 2], device=device)
    m, v, step = (torch.zeros(3, device=device) for _ in range(3))
    with pytest.raises(
        RuntimeError,
        match=r"per parameter: 3, not 1$|bounds must (rise|not be empty)|needs bounds",
    ):
        ops.sparse_adamw_(weights, m + 1, indices, m, v, step, bounds=bounds, lr=1.0)
    assert not any(weight.any() for weight in weights)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"indices": [torch.tensor([0, 9])]}, "lie within"),
        ({"indices": [torch.tensor([1, 1])]}, "increase strictly"),
        ({"indices": []}, "one index vector per parameter"),
        ({"grads": []}, "one dense tensor per parameter"),
        ({"grads": [torch.zeros(8)]}, "shape of its parameter"),
        ({"grads": [torch.zeros(2, 4, dtype=torch.bfloat16)]}, "every gradient must be Float"),
        ({"grads": torch.zeros(3)}, "compact gradient must have 2"),
        ({"params": [torch.zeros(2, 4, dtype=torch.float64)]}, "params must be float32"),
        ({"exp_avg": torch.zeros(3)}, "exp_avg must have 2"),
        ({"exp_avg_sq": torch.zeros(2, dtype=torch.bfloat16)}, "exp_avg_sq must be Float"),
        ({"master": torch.zeros(2)}, "take no master"),
        (
            {
                "params": [torch.zeros(2, 4, dtype=torch.bfloat16)],
                "grads": [torch.zeros(2, 4, dtype=torch.bfloat16)],
            },
            "need master",
        ),
        ({"step": torch.zeros(2)}, "step must have one element per parameter"),
        ({"lr": torch.zeros(2)}, "lr must have one element"),
        ({"params": [torch.zeros(1).expand(2, 4)]}, "share one place"),
    ],
)
def test_wrong_arguments_are_refused_and_nothing_is_written(device, change, message):
    arguments = {
        "params": [torch.zeros(2, 4)],
        "grads": [torch.ones(2, 4)],
        "indices": [torch.tensor([1, 6])],
        "exp_avg": torch.zeros(2),
        "exp_avg_sq": torch.zeros(2),
        "step": torch.zeros(1),
        "lr": 1.0,
        **change,
    }
    arguments = {name: moved(value, device) for name, value in arguments.items()}
    with pytest.raises(RuntimeError, match=message):
        ops.sparse_adamw_(**arguments)
    written = [*arguments["params"], arguments["exp_avg"], arguments["step"]]
    assert all((tensor == 0).all() for tensor in written)


def moved(value, device):
    """A test's argument on a device; expanded tensors stay expanded on the CPU's."""
    if isinstance(value, list):
        return [moved(item, device) for item in value]
    if not isinstance(value, Tensor):
        return value
    base = value.as_strided((1,), (1,)) if 0 in value.stride() else value
    return base.to(device).expand(value.shape)


@pytest.mark.parametrize(
    ("dtype", "lr_tensor"),
    [*((dtype, None) for dtype in DTYPES), (DTYPES[0], torch.tensor(0.1, dtype=torch.float64))],
)
def test_opcheck(device, dtype, lr_tensor):
    p = problem(dtype, device)
    lr_tensor = lr_tensor if lr_tensor is None else lr_tensor.to(device)
    numbers = (0.1, lr_tensor, 0.9, 0.999, 1e-8, 0.1, False, None, None)
    op = operations(device).sparse_adamw_.default
    state = (p.exp_avg, p.exp_avg_sq, p.master, p.step)
    indices, bounds = ops.end_to_end(p.indices)
    for grads, compact in ((p.grads, None), ([], p.compact_grad())):
        torch.library.opcheck(op, (p.params, grads, compact, indices, bounds, *state, *numbers))


def test_compiles_without_graph_breaks():
    def step(p: Problem) -> None:
        p.run()

    eager, compiled = problem(torch.float32, torch.device("cpu")), None
    compiled = eager.clone()
    eager.run()
    torch.compile(step, fullgraph=True, backend="aot_eager")(compiled)
    pairs = zip([*eager.params, *eager.state], [*compiled.params, *compiled.state], strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_writing_moves_the_version_counters():
    p = problem(torch.float32, torch.device("cpu"))
    before = [t._version for t in (*p.params, *p.state)]
    p.run()
    assert all(t._version > v for t, v in zip((*p.params, *p.state), before, strict=True))

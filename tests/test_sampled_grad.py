"""pack_columns, sampled_grad and sampled_embedding_grad: specification and dense gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from conftest import CPU, IMPLEMENTATIONS, implementation, number_of_threads, operations
from saft_kernels import backends, ops, reference
from tolerances import assert_close

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
HALF = [torch.bfloat16, torch.float16]
TOKENS = [0, 1, 15, 16, 17, 32, 33, 80, 100, 257]


@dataclass
class Problem:
    """A layer's input and output gradient, and the entries [n, 2] (row, column) that are wanted."""

    x: Tensor
    dy: Tensor
    entries: Tensor

    @property
    def width(self) -> int:
        return self.x.shape[1]

    def plan(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(columns to pack, rows, offsets, packed column of every entry)."""
        row, column = self.entries.t()
        columns, of_entry = column.unique(return_inverse=True)
        rows, counts = row.unique_consecutive(return_counts=True)
        offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        return columns.int(), rows.int(), offsets.int(), of_entry.int()

    def run(self, product: bool | None = None) -> Tensor:
        columns, *plan = self.plan()
        packed = ops.pack_columns(self.x, columns)
        return ops.sampled_grad(packed, self.dy, *plan, product=product)

    def dense(self) -> Tensor:
        """What autograd would compute, in double precision; the last column is the bias's."""
        x = torch.cat([self.x, self.x.new_ones(len(self.x), 1)], 1).double()
        return (self.dy.double().t() @ x)[self.entries[:, 0], self.entries[:, 1]]


def problem(
    device: torch.device,
    dtype: torch.dtype,
    tokens: int = 100,
    width: int = 37,
    height: int = 23,
    every: int = 3,
) -> Problem:
    """Every third entry, bias column included."""
    torch.manual_seed(tokens)
    flat = torch.arange(0, height * (width + 1), every, device=device)
    entries = torch.stack([flat // (width + 1), flat % (width + 1)], 1)
    x, dy = torch.randn(tokens, width), torch.randn(tokens, height)
    return Problem(x.to(device, dtype), dy.to(device, dtype), entries)


def poisoned(tensor: Tensor, strides: str) -> Tensor:
    """The same values in another layout, with NaN in between."""
    tokens, width = tensor.shape
    if strides == "transposed":
        return tensor.t().contiguous().t()
    around = tensor.new_full((2 * tokens + 1, 3 * width + 2), float("nan"))
    view = around[1::2, 1 : 3 * width : 3]
    view.copy_(tensor)
    return view


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", TOKENS)
def test_packing_equals_specification(device, dtype, tokens):
    x = problem(device, dtype, tokens).x
    for columns in ([], [0], [37], [0, 5, 36], list(range(38))):
        chosen = torch.tensor(columns, dtype=torch.int32, device=device)
        assert torch.equal(ops.pack_columns(x, chosen), reference.pack_columns(x, chosen))


def test_packing_more_columns_than_a_block_of_threads_has(device):
    x = problem(device, torch.float32, 40, width=300).x
    columns = torch.arange(0, 301, 2, dtype=torch.int32, device=device)
    assert torch.equal(ops.pack_columns(x, columns), reference.pack_columns(x, columns))


@pytest.mark.parametrize("dtype", HALF)
def test_packing_rounds_on_the_way(device, dtype):
    """To nearest even, overflow, underflow and special values included."""
    x = problem(device, torch.float32, 33).x * torch.logspace(-46, 38, 37, device=device)
    x[0, 0], x[1, 1] = float("-inf"), 1 + 3 * torch.finfo(dtype).eps / 2
    columns = torch.arange(38, dtype=torch.int32, device=device)
    packed = ops.pack_columns(x, columns, dtype)
    assert packed.dtype == dtype
    assert torch.equal(packed, reference.pack_columns(x.to(dtype), columns))
    x[2, 2] = float("nan")
    assert ops.pack_columns(x, columns, dtype)[0, 2, 2].isnan()


@pytest.mark.parametrize("product", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", TOKENS)
def test_gradient_equals_specification(device, dtype, tokens, product):
    p = problem(device, dtype, tokens)
    actual = p.run(product)
    with backends.use_backend("reference"):
        expected = p.run()
    assert actual.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_close(actual, expected, "sampled_grad")


@pytest.mark.parametrize("product", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_equals_the_dense_one(device, dtype, product):
    problems = (
        problem(device, dtype, 1000),
        problem(device, dtype, 999, every=1),
        problem(device, dtype, 64, 300, 200, 97),  # several tiles, and blocks of threads
    )
    for p in problems:
        assert_close(p.run(product).double(), p.dense(), "sampled_grad")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("strides", ["transposed", "sparse"])
@pytest.mark.parametrize("tokens", [50, 64])  # transposed, some or all columns are aligned
def test_any_strides_give_the_same_bits(device, dtype, strides, tokens):
    p = problem(device, dtype, tokens)
    apart = Problem(poisoned(p.x, strides), poisoned(p.dy, strides), p.entries)
    for product in (False, True):
        assert torch.equal(p.run(product), apart.run(product))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slices_that_begin_anywhere(device, dtype):
    p = problem(device, dtype, 40, width=36)
    for begin in (1, 2, 3):
        x, dy = (t.new_zeros(t.numel() + begin) for t in (p.x, p.dy))
        shifted = Problem(x[begin:].view_as(p.x), dy[begin:].view_as(p.dy), p.entries)
        shifted.x.copy_(p.x)
        shifted.dy.copy_(p.dy)
        for product in (False, True):
            assert torch.equal(shifted.run(product), p.run(product))


@pytest.mark.parametrize("product", [False, True])
def test_rows_without_entries_and_columns_in_any_order(device, product):
    """More than plans hold, within the contract."""
    p = problem(device, torch.float32, 70, width=90, height=150)
    columns = torch.arange(91, dtype=torch.int32, device=device)
    rows = torch.arange(0, 150, 2, dtype=torch.int32, device=device)
    counts = torch.arange(75, device=device) % 5 * 7
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int()
    of_entry = (torch.arange(int(offsets[-1]), device=device) * 37 % 91).int()
    packed = ops.pack_columns(p.x, columns)
    actual = ops.sampled_grad(packed, p.dy, rows, offsets, of_entry, product=product)
    p.entries = torch.stack([rows.long().repeat_interleave(counts), of_entry.long()], 1)
    assert_close(actual.double(), p.dense(), "sampled_grad")


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_on_every_instruction_set(dtype):
    outcomes = []
    for isa in backends.cpu_isas():
        with backends.use_cpu_isa(isa):
            outcomes.append(problem(torch.device("cpu"), dtype, 333).run())
    assert all(torch.equal(outcomes[0], outcome) for outcome in outcomes[1:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("device", CPU, indirect=True)
def test_same_bits_for_any_number_of_threads(device, threads, dtype):
    p = problem(device, dtype, 500, width=300, height=400, every=7)
    found = p.run()
    with number_of_threads(1):
        assert torch.equal(p.run(), found)


@pytest.mark.parametrize(
    "entries", [[], [[0, 0]], [[22, 36]], [[22, 37]], [[3, 0], [3, 1], [3, 37]]]
)
def test_few_entries(device, entries):
    p = problem(device, torch.float32)
    p.entries = torch.tensor(entries, dtype=torch.int64, device=device).view(-1, 2)
    for product in (False, True):
        assert_close(p.run(product).double(), p.dense(), "sampled_grad")


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@given(
    tokens=st.integers(0, 70),
    shape=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    product=st.booleans(),
    data=st.data(),
)
@settings(max_examples=30, deadline=None)
def test_property_any_entries_of_any_layer(name, tokens, shape, product, data):
    height, width = shape
    flat = data.draw(st.sets(st.integers(0, height * (width + 1) - 1)))
    with implementation(name) as device:
        where = torch.tensor(sorted(flat), dtype=torch.int64, device=device)
        p = problem(device, torch.float64, tokens, width, height)
        p.entries = torch.stack([where // (width + 1), where % (width + 1)], 1)
        assert_close(p.run(product), p.dense(), "sampled_grad")


def test_nan_in_an_unused_column_or_row_does_not_matter(device):
    """What no entry uses is not read, or at least not used."""
    for product in (False, True):
        p = problem(device, torch.float32)
        p.entries = p.entries[(p.entries[:, 0] != 4) & (p.entries[:, 1] != 7)]
        expected = p.run(product)
        p.x[:, 7], p.dy[:, 4] = float("nan"), float("nan")
        assert torch.equal(p.run(product), expected)


@pytest.mark.parametrize("product", [False, True])
def test_nan_reaches_the_entries_of_its_row_or_column_alone(device, product):
    p = problem(device, torch.float32, every=1)
    p.x[17, 7], p.dy[99, 4] = float("nan"), float("inf")
    row, column = p.entries.t()
    assert torch.equal(~p.run(product).isfinite(), (row == 4) | (column == 7))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"columns": torch.tensor([0, 38], dtype=torch.int32)}, "within the 38 columns of x, that"),
        ({"columns": torch.tensor([1, 1], dtype=torch.int32)}, "columns must increase"),
        ({"columns": torch.tensor([0, 1])}, "columns must be Int"),
        ({"x": torch.zeros(3)}, "two dimensions"),
        ({"x": torch.zeros(100, 37, dtype=torch.int32)}, "must be float32"),
        ({"dtype": torch.float64}, "x of Float cannot be packed as Double"),
        ({"x": torch.zeros(100, 37).half(), "dtype": torch.bfloat16}, "x of Half cannot be packed"),
    ],
)
def test_wrong_columns_are_refused(device, change, message):
    arguments = {"x": torch.zeros(100, 37), "columns": torch.tensor([0], dtype=torch.int32)}
    with pytest.raises(RuntimeError, match=message):
        ops.pack_columns(**on(device, {**arguments, **change}))


def on(device: torch.device, arguments: dict[str, Any]) -> dict[str, Any]:
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in arguments.items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"packed": torch.zeros(6, 2, 16)}, "packed must be what"),
        ({"packed": torch.zeros(7, 2, 16, dtype=torch.bfloat16)}, "packed must be Float"),
        ({"packed": torch.zeros(7, 16, 2).transpose(1, 2)}, "packed must be what"),
        ({"grad_output": torch.zeros(100, 23, 1)}, "two dimensions"),
        ({"rows": [0, 23]}, "rows must increase .* 23 columns of grad_output"),
        ({"rows": [1, 0]}, "rows must increase"),
        ({"offsets": [0, 1, 2]}, "offsets must rise"),
        ({"offsets": [0, 3]}, "offsets must rise"),
        ({"offsets": [0, 4, 3]}, "offsets must rise"),
        ({"offsets": [1, 2, 3]}, "offsets must rise"),
        ({"columns": [0, 1, 2]}, "columns must lie within the 2 packed columns"),
        ({"columns": [0, -1, 1]}, "columns must lie within"),
    ],
)
def test_wrong_plans_are_refused(device, change, message):
    plan = {"rows": [0, 1], "offsets": [0, 1, 3], "columns": [0, 1, 1]}
    arguments = {"packed": torch.zeros(7, 2, 16), "grad_output": torch.zeros(100, 23), **plan}
    arguments.update(change)
    for name in plan:
        arguments[name] = torch.tensor(arguments[name], dtype=torch.int32)
    with pytest.raises(RuntimeError, match=message):
        ops.sampled_grad(**on(device, arguments))


def test_packed_columns_must_be_where_torch_puts_tensors(device):
    """Kernels load pieces of 16 bytes."""
    misplaced = torch.zeros(7 * 2 * 16 + 1, device=device)[1:].view(7, 2, 16)
    plan = [torch.tensor(v, dtype=torch.int32, device=device) for v in ([0], [0, 1], [1])]
    with pytest.raises(RuntimeError, match="packed must be what"):
        ops.sampled_grad(misplaced, torch.zeros(100, 23, device=device), *plan)


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(device, dtype):
    p = problem(device, dtype)
    columns, *plan = p.plan()
    op = operations(device)
    torch.library.opcheck(op.pack_columns.default, (p.x, columns))
    if dtype == torch.float32:
        torch.library.opcheck(op.pack_columns.default, (p.x, columns, torch.bfloat16))
    packed = ops.pack_columns(p.x, columns)
    torch.library.opcheck(op.sampled_grad.default, (packed, p.dy, *plan, True))


def test_gradients_of_a_parameter_record_no_graph(device):
    p = problem(device, torch.float32, 20)
    columns, *plan = p.plan()
    for tensor in (p.x, p.dy):
        tensor.requires_grad_()
    packed = ops.pack_columns(p.x, columns)
    assert not packed.requires_grad
    assert not ops.sampled_grad(packed.requires_grad_(), p.dy, *plan).requires_grad


# Embeddings ---------------------------------------------------------------------------------------


def lookup(
    device: torch.device, dtype: torch.dtype, tokens: int, vocabulary: int = 50, width: int = 12
) -> Problem:
    """Every third entry of an embedding; ``x`` holds the tokens."""
    p = problem(device, dtype, tokens, width - 1, vocabulary)
    drawn = torch.randint(vocabulary, (tokens,)).to(device)
    return Problem(drawn, torch.randn(tokens, width).to(device, dtype), p.entries)


def run_lookup(p: Problem) -> Tensor:
    row, column = p.entries.t()
    rows, counts = row.unique_consecutive(return_counts=True)
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return ops.sampled_embedding_grad(p.x, p.dy, rows.int(), offsets.int(), column.int())


def test_embedding_gradient_of_a_parameter_records_no_graph(device):
    p = lookup(device, torch.float32, 20)
    p.dy.requires_grad_()
    assert not run_lookup(p).requires_grad


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [0, 1, 7, 3000])
def test_embedding_gradient_equals_specification_and_the_dense_one(device, dtype, tokens):
    p = lookup(device, dtype, tokens)
    actual = run_lookup(p)
    with backends.use_backend("reference"):
        expected = run_lookup(p)
    assert_close(actual, expected, "sampled_grad")
    dense = torch.zeros(50, 12, dtype=torch.float64, device=device)
    dense.index_add_(0, p.x, p.dy.double())
    assert_close(actual.double(), dense[p.entries[:, 0], p.entries[:, 1]], "sampled_grad")


@pytest.mark.parametrize("strides", ["transposed", "sparse"])
def test_any_strides_of_an_embedding(device, strides):
    p = lookup(device, torch.float32, 300)
    assert torch.equal(run_lookup(Problem(p.x, poisoned(p.dy, strides), p.entries)), run_lookup(p))


def test_a_token_that_is_everywhere(device):
    p = lookup(device, torch.float32, 1000)
    p.x[:] = 7
    p.x[::100] = 3
    dense = torch.zeros(50, 12, dtype=torch.float64, device=device)
    dense.index_add_(0, p.x, p.dy.double())
    assert_close(run_lookup(p).double(), dense[p.entries[:, 0], p.entries[:, 1]], "sampled_grad")


def test_tokens_without_entries_have_no_part(device):
    p = lookup(device, torch.float32, 100)
    p.entries = p.entries[p.entries[:, 0] == 5]
    p.x[:50] = 7
    expected = run_lookup(p)
    of_row = p.dy[p.x == 5].sum(0)
    assert_close(expected, of_row[p.entries[:, 1]], "sampled_grad")
    p.x[:50] = torch.tensor([-1, 1 << 40], device=device).repeat(25)
    assert torch.equal(run_lookup(p), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_embedding_same_bits_for_any_number_of_threads(threads, dtype):
    p = lookup(torch.device("cpu"), dtype, 5000)
    found = run_lookup(p)
    with number_of_threads(1):
        assert torch.equal(run_lookup(p), found)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": torch.zeros(4, dtype=torch.int64)}, "one token per row"),
        ({"tokens": torch.zeros(3, dtype=torch.int32)}, "tokens must be Long"),
        ({"rows": torch.tensor([1, 0], dtype=torch.int32)}, "rows that an embedding may have"),
        ({"offsets": torch.tensor([0, 1], dtype=torch.int32)}, "offsets must rise"),
        ({"columns": torch.tensor([0, 5], dtype=torch.int32)}, "the 5 columns of grad_output"),
    ],
)
def test_wrong_embedding_arguments_are_refused(device, change, message):
    arguments = {
        "tokens": torch.zeros(3, dtype=torch.int64),
        "grad_output": torch.zeros(3, 5),
        "rows": torch.tensor([0, 1], dtype=torch.int32),
        "offsets": torch.tensor([0, 1, 2], dtype=torch.int32),
        "columns": torch.tensor([0, 4], dtype=torch.int32),
    }
    with pytest.raises(RuntimeError, match=message):
        ops.sampled_embedding_grad(**on(device, {**arguments, **change}))


@pytest.mark.parametrize("dtype", DTYPES)
def test_embedding_opcheck(device, dtype):
    p = lookup(device, dtype, 40)
    row, column = p.entries.t()
    rows, counts = row.unique_consecutive(return_counts=True)
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int()
    op = operations(device).sampled_embedding_grad.default
    torch.library.opcheck(op, (p.x, p.dy, rows.int(), offsets, column.int()))

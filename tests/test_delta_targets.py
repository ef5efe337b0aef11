"""What a delta may be applied to: state dicts, meta models, cast models, sharded models."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing
from torch import Tensor, nn

from saft_kernels import ops
from saft_kernels.delta import SparseDelta, places
from saft_kernels.errors import DeltaError
from saft_kernels.fingerprint import same_bits
from saft_kernels.mask import CooMask
from small_deltas import (
    assert_same_bits,
    change_one_bit,
    make_base,
    make_mask,
    on_meta,
    tuned_pair,
)

pytestmark = pytest.mark.usefixtures("one_thread")


# State dicts --------------------------------------------------------------------------------------


def assert_holds(state: dict[str, Tensor], model: nn.Module) -> None:
    for name, param in model.named_parameters(remove_duplicate=False):
        assert same_bits(state[name], param).all(), name


def test_a_state_dict_is_a_model_too() -> None:
    base, tuned, delta = tuned_pair()
    state = copy.deepcopy(base.state_dict())
    delta.apply_(state)
    assert_holds(state, tuned)
    with pytest.raises(DeltaError, match="applied to this model already"):
        delta.apply_(state)
    delta.revert_(state)
    assert_holds(state, base)


def test_a_state_dict_of_another_base_is_refused_and_left_alone() -> None:
    base, _, delta = tuned_pair()
    change_one_bit(base, "norm.weight")
    state = copy.deepcopy(base.state_dict())
    with pytest.raises(DeltaError, match=r"not the base .*'norm.weight' has other values"):
        delta.apply_(state)
    assert_holds(state, base)


def test_tied_parameters_of_a_state_dict_are_known_by_their_memory() -> None:
    base, _, delta = tuned_pair()
    state = copy.deepcopy(base.state_dict())
    state["decoder.weight"] = state["decoder.weight"].clone()
    with pytest.raises(DeltaError, match="one tied parameter in its base, and two here"):
        delta.apply_(state)
    del state["decoder.weight"]
    delta.apply_(state)


def test_a_state_dict_on_meta_is_refused() -> None:
    _, _, delta = tuned_pair()
    state = on_meta(torch.float32).state_dict()
    del state["decoder.weight"]
    with pytest.raises(DeltaError, match=r"'.*' is on the meta device; load its values first"):
        delta.apply_(state)


# Meta models --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_meta_model_gets_the_delta_with_its_weights(dtype: torch.dtype) -> None:
    base, tuned, delta = tuned_pair(dtype)
    for assign in (True, False):
        model = on_meta(dtype)
        delta.apply_(model)
        assert all(param.is_meta for param in model.parameters())
        with pytest.raises(DeltaError, match="waits for the weights of this model already"):
            delta.apply_(model)
        if not assign:
            model.to_empty(device="cpu")
            model.decoder.weight = model.embedding.weight  # which that has parted
        model.load_state_dict(copy.deepcopy(base.state_dict()), assign=assign)
        model.decoder.weight = model.embedding.weight  # assigned apart, of the same memory
        assert_same_bits(model, tuned)
        delta.revert_(model)
        assert_same_bits(model, base)
        model.load_state_dict(base.state_dict())  # and never again
        assert_same_bits(model, base)


def test_a_meta_model_that_gets_other_weights_says_so_when_they_are_loaded() -> None:
    base, _, delta = tuned_pair()
    model = on_meta(torch.float32)
    delta.apply_(model)
    change_one_bit(base, "conv.bias")
    with pytest.raises(DeltaError, match=r"'conv.bias' has other values"):
        model.load_state_dict(copy.deepcopy(base.state_dict()), assign=True)
    model.decoder.weight = model.embedding.weight
    assert_same_bits(model, base)


def test_a_delta_that_waits_for_weights_can_be_taken_back() -> None:
    base, _, delta = tuned_pair()
    model = on_meta(torch.float32)
    delta.apply_(model)
    delta.revert_(model)
    model.load_state_dict(base.state_dict(), assign=True)
    model.decoder.weight = model.embedding.weight
    assert_same_bits(model, base)
    delta.apply_(model)


# Cast models --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_cast_base_becomes_the_cast_tuned_model(dtype: torch.dtype) -> None:
    base, tuned, delta = tuned_pair()
    model = copy.deepcopy(base).to(dtype)
    with pytest.raises(DeltaError, match=r"has dtype .*verify=False"):
        delta.apply_(model)
    delta.apply_(model, verify=False)
    for (name, found), wanted in zip(
        model.named_parameters(), copy.deepcopy(tuned).to(dtype).parameters(), strict=True
    ):
        # A cast may write a NaN in several ways.
        assert (same_bits(found, wanted) | (found.isnan() & wanted.isnan())).all(), name
    with pytest.raises(DeltaError, match="applied to this model already"):
        delta.apply_(model, verify=False)
    delta.revert_(model, verify=False)
    assert_same_bits(model, copy.deepcopy(base).to(dtype))


def test_an_integer_model_is_refused() -> None:
    base, _, delta = tuned_pair()
    state = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    state["scale"] = state["scale"].to(torch.int32)
    with pytest.raises(DeltaError, match=r"'scale' has dtype torch.int32"):
        delta.apply_(state, verify=False)


# 8-bit weights ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_weights_of_8_bits(dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = nn.ParameterDict({"w": nn.Parameter(torch.randn(40, 50).to(dtype), requires_grad=False)})
    mask = CooMask.from_indices(base, {"w": torch.arange(0, 2000, 7)})
    tuned = copy.deepcopy(base)
    changed = torch.randn(len(mask["w"])).to(dtype)
    ops.scatter_(tuned["w"], mask["w"], changed)
    SparseDelta.capture(tuned, mask, base).save(tmp_path / "d.safetensors", originals=True)
    delta = SparseDelta.load(tmp_path / "d.safetensors")
    model = copy.deepcopy(base)
    delta.apply_(model)
    assert_same_bits(model, tuned)
    delta.revert_(model)
    assert_same_bits(model, base)


# Sharded models -----------------------------------------------------------------------------------


class FailingOps:
    """The operations, of which one call of scatter_ fails."""

    def __init__(self, at: int) -> None:
        self._left = at

    def __getattr__(self, name: str) -> Any:
        return getattr(ops, name)

    def scatter_(self, *arguments: Any) -> None:
        self._left -= 1
        if self._left == 0:
            raise ZeroDivisionError("at last")
        ops.scatter_(*arguments)


def sharded(rank: int, world: int, folder: str, scheme: str) -> None:
    """One of several processes, each of which holds a part of every parameter."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store-{scheme}", rank=rank, world_size=world
    )
    try:
        mesh = init_device_mesh("cpu", (world,))
        base, tuned, _ = tuned_pair()
        delta = SparseDelta.load(Path(folder, "d.safetensors"))

        def whole(model: nn.Module) -> nn.Module:
            again = make_base()
            with torch.no_grad():
                for name, param in model.named_parameters():
                    full = param.full_tensor() if isinstance(param, DTensor) else param
                    again.get_parameter(name).copy_(full)
            return again

        def shard(model: nn.Module) -> nn.Module:
            for module in model.modules():
                for name, param in list(module.named_parameters(recurse=False)):
                    if scheme == "rows" and param.dim():
                        placement = Shard(0)
                    elif scheme == "columns" and param.dim() > 1:
                        placement = Shard(1)
                    else:
                        placement = Replicate()
                    spread = distribute_tensor(param.detach().contiguous(), mesh, [placement])
                    setattr(module, name, nn.Parameter(spread))
            model.decoder.weight = model.embedding.weight
            return model

        model = shard(make_base())
        for _ in range(2):
            delta.apply_(model)
            assert_same_bits(whole(model), tuned)
            with pytest.raises(DeltaError, match="applied to this model already"):
                delta.apply_(model)
            delta.revert_(model)
            assert_same_bits(whole(model), base)
        with pytest.raises(DeltaError, match="not applied to this model"):
            delta.revert_(model)
        model = shard(make_base())
        with torch.no_grad():
            local = model.norm.weight.to_local()
            if rank == world - 1 and local.numel():
                local[0] += 1
        with pytest.raises(DeltaError, match=r"'norm.weight' has other values"):
            delta.apply_(model)
        model = shard(make_base())
        if rank == 0:
            places.ops = FailingOps(at=3)  # type: ignore[attr-defined]
        error = ZeroDivisionError if rank == 0 else DeltaError
        with pytest.raises(error, match=r"at last|another process could not write its part"):
            delta.apply_(model)
        places.ops = ops  # type: ignore[attr-defined]
        assert_same_bits(whole(model), base)
        with pytest.raises(DeltaError, match="is sharded; capture a model that holds its whole"):
            SparseDelta.capture(shard(make_base()), make_mask(base), base)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("scheme", ["rows", "columns", "copies"])
def test_every_process_writes_its_shards(tmp_path: Path, scheme: str) -> None:
    tuned_pair()[2].save(tmp_path / "d.safetensors")
    torch.multiprocessing.spawn(sharded, (3, str(tmp_path), scheme), nprocs=3)

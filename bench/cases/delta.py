"""Stage 5: the delta file, its size and what it takes to write, read, apply and revert it; and to
change from one to another.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from saft_kernels import CooMask, SparseDelta, ops
from saft_kernels.delta import DeltaSwap
from saft_kernels.delta.file import dtype_name

from ..bars import held_to
from ..harness import Contender, measure, require
from ..limits import Needs
from ..models import CACHE_LINE, Setting, cache_lines, workload
from ..outcome import BASELINE, Figure, Outcome
from ..ratios import format_seconds, times_faster

#: How far entries move: far enough to be seen in 16 bits.
LEARNT = 1e-2

#: How many indices are decoded.
INDICES = 1_000_000

LOAD_WHOLE = "load_file and load_state_dict of the whole model"
LOAD_STATE = "load_state_dict of the whole model, from memory"
SWAP = "DeltaSwap.to the next of two deltas"
LOAD_AND_APPLY = "SparseDelta.load and apply_, base verified"
DECODE = "decode_indices"
APPLY_VERIFIED = "SparseDelta.apply_, base verified"


def run(setting: Setting) -> Outcome:
    """A base, a model that differs from it inside the uniform mask, and the files of both."""
    work = workload(setting)
    mask = work.masks["uniform"]
    base = work.task.model
    tuned = copy.deepcopy(base)
    perturb(tuned, mask)
    with tempfile.TemporaryDirectory() as folder:
        outcome = _with_files(Path(folder), base, tuned, mask, setting)
        outcome += _entries(Path(folder), base, mask)
    outcome += _swapping(base, tuned, mask, setting)
    outcome += _decoding(setting)
    return outcome


@torch.no_grad()
def perturb(model: nn.Module, mask: CooMask, seed: int = 0) -> None:
    """Move the selected entries by the same amounts on every device."""
    generator = torch.Generator().manual_seed(seed)
    for _, param, chosen in mask.parameters(model):
        indices = chosen.to(param.device)
        values = ops.gather(param, indices)
        noise = torch.randn(indices.numel(), generator=generator)
        ops.scatter_(param, indices, values + LEARNT * noise.to(values))


def _with_files(
    folder: Path, base: nn.Module, tuned: nn.Module, mask: CooMask, setting: Setting
) -> Outcome:
    whole, small = folder / "model.safetensors", folder / "delta.safetensors"
    save_file(_tensors(tuned), whole)
    delta = SparseDelta.capture(tuned, mask, base)
    delta.save(small)
    loaded = SparseDelta.load(small)
    patched, reloaded = copy.deepcopy(base), copy.deepcopy(base)
    applied: SparseDelta | None = None  # only this one can be reverted

    def apply(delta: SparseDelta, *, verify: bool = False) -> None:
        nonlocal applied
        delta.apply_(patched, verify=verify)
        applied = delta

    def revert() -> None:
        nonlocal applied
        if applied is not None:
            applied.revert_(patched, verify=False)
        applied = None

    def be_applied() -> None:
        if applied is None:
            apply(loaded)

    lines, weights = CACHE_LINE * cache_lines(mask, _tensors(base)), whole.stat().st_size
    file = small.stat().st_size
    contenders = [
        Contender(
            LOAD_WHOLE,
            lambda: reloaded.load_state_dict(load_file(whole)),
            _becomes(reloaded, tuned),
            needs=Needs(2 * weights),
            role=BASELINE,
        ),
        Contender(
            "SparseDelta.capture",  # the base's fingerprints, and the entries of both
            lambda: SparseDelta.capture(tuned, mask, base),
            _equal(delta),
            needs=Needs(weights + lines + file),
        ),
        Contender(
            "SparseDelta.save",
            lambda: delta.save(small),
            _file_as_before(small),
            needs=Needs(2 * file),
        ),
        Contender(
            "SparseDelta.load",
            lambda: SparseDelta.load(small),
            _equal(delta),
            needs=Needs(2 * file),
        ),
        Contender(
            LOAD_AND_APPLY,
            lambda: apply(SparseDelta.load(small), verify=True),
            _becomes(patched, tuned),
            revert,
            Needs(weights + 2 * lines + 2 * file),
        ),
        Contender(
            APPLY_VERIFIED,
            lambda: apply(loaded, verify=True),
            _becomes(patched, tuned),
            revert,
            Needs(weights + 2 * lines + file),
        ),
        Contender(
            "SparseDelta.apply_, verify=False",
            lambda: apply(loaded),
            _becomes(patched, tuned),
            revert,
            Needs(2 * lines + file),
        ),
        Contender(
            "SparseDelta.revert_, verify=False",
            revert,
            _becomes(patched, base),
            be_applied,
            Needs(2 * lines + file),
        ),
    ]
    timings = measure("delta", contenders, setting.kernels)
    share = 100 * small.stat().st_size / whole.stat().st_size
    figures = [
        held_to("delta/size", Figure("delta file, in percent of the model's file", share, "%")),
        times_faster(
            "switching to a tuned model by a delta's file (base verified) against loading it whole",
            timings[LOAD_WHOLE],
            timings[LOAD_AND_APPLY],
        ),
    ]
    return Outcome(list(timings.values()), figures)


def _entries(folder: Path, base: nn.Module, mask: CooMask) -> Outcome:
    """What an entry takes in a whole file, by the dtype of the weights."""
    figures = []
    for dtype in (torch.float32, torch.bfloat16):
        name = dtype_name(dtype)
        model = copy.deepcopy(base).to(dtype)
        before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        perturb(model, mask)
        file = folder / f"{name}.safetensors"
        SparseDelta.capture(model, mask, before).save(file)
        figure = Figure(
            f"delta file per selected entry, {name}", file.stat().st_size / mask.nnz, "bytes"
        )
        figures.append(held_to(f"delta/entry/{name}", figure))
    return Outcome(figures=figures)


def _swapping(base: nn.Module, tuned: nn.Module, mask: CooMask, setting: Setting) -> Outcome:
    """One model that takes on two deltas by turns, and one that is loaded whole instead."""
    other = copy.deepcopy(base)
    perturb(other, mask, seed=1)
    models = [tuned, other]
    deltas = [SparseDelta.capture(model, mask, base) for model in models]
    served, reloaded = copy.deepcopy(base), copy.deepcopy(base)
    swap = DeltaSwap(served)
    for delta in deltas:
        swap.to(delta)

    def other_than_now() -> int:
        return int(swap.current is deltas[0])

    def next_model() -> nn.Module:
        return models[other_than_now()]

    states = [model.state_dict() for model in models]
    lines, weights = (
        CACHE_LINE * cache_lines(mask, _tensors(base)),
        sum(p.nbytes for p in base.parameters()),
    )
    contenders = [
        Contender(
            LOAD_STATE,
            lambda: reloaded.load_state_dict(states[0]),
            _becomes(reloaded, tuned),
            needs=Needs(2 * weights),
            role=BASELINE,
        ),
        Contender(
            SWAP,
            lambda: swap.to(deltas[other_than_now()]),
            lambda run: _becomes(served, next_model())(run),
            needs=Needs(3 * lines + 4 * 8 * mask.nnz),
        ),
    ]
    timings = measure("one of two deltas for the other", contenders, setting.kernels)
    what = "changing from one delta to another against loading a whole state_dict"
    return Outcome(list(timings.values()), [times_faster(what, timings[LOAD_STATE], timings[SWAP])])


def _decoding(setting: Setting) -> Outcome:
    """Many indices of one large parameter: what a file of a large model takes to read."""
    numel = round(INDICES / setting.density)
    generator = torch.Generator().manual_seed(0)
    indices = torch.randint(numel, (INDICES,), generator=generator).unique()
    indices = indices.to(torch.int32 if numel < 1 << 31 else torch.int64)
    n, code = len(indices), ops.encode_indices(indices, numel)

    def same(run: Callable[[], Any]) -> None:
        require(torch.equal(run(), indices), "they are other indices")

    decode = Contender(
        DECODE,
        lambda: ops.decode_indices(code, n, numel),
        same,
        needs=Needs(code.nbytes + indices.nbytes),
    )
    timing = measure(f"{INDICES:,} indices of a file", [decode], setting.kernels)[DECODE]
    rate = Figure(
        "indices of a delta file decoded in a second",
        n / timing.median / 1e6,
        "million",
        note=f"{n:,} in {format_seconds(timing.median)}, {code.nbytes / n:.2f} bytes each",
    )
    return Outcome([timing], [held_to("delta/decoding", rate)])


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.contiguous() for name, tensor in model.state_dict().items()}


def _becomes(model: nn.Module, other: nn.Module) -> Callable[[Callable[[], Any]], None]:
    def check(run: Callable[[], Any]) -> None:
        run()
        wanted = dict(other.named_parameters())
        for name, param in model.named_parameters():
            require(torch.equal(param, wanted[name]), f"{name!r} has other values than it should")

    return check


def _equal(delta: SparseDelta) -> Callable[[Callable[[], Any]], None]:
    def check(run: Callable[[], Any]) -> None:
        pairs = zip(run().items(), delta.items(), strict=True)
        for (name, *tensors), (wanted, *others) in pairs:
            same = name == wanted and all(map(torch.equal, tensors, others))
            require(same, f"the delta differs at {wanted!r}")

    return check


def _file_as_before(path: Path) -> Callable[[Callable[[], Any]], None]:
    def check(run: Callable[[], Any]) -> None:
        before = path.read_bytes()
        path.unlink()
        run()
        require(path.read_bytes() == before, "the file differs")

    return check

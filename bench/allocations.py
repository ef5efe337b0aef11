"""What the memory that tensors hold is for, at the moment of a training step when they hold most.

Operations pass by one after the other and every storage they show is followed until it is freed. A
gradient is known when autograd accumulates it, which is after it was allocated, and what a step
finds but did not make was kept from before. So blocks are only noted while the step runs, and the
peak is looked for, and divided, when it is over.

Memory that an operation allocates and frees inside itself is not seen.
``torch.distributed._tools.mem_tracker.MemTracker`` (torch 2.14) was no choice: it hooks every
parameter, which frozen ones refuse, and it fails on gradients that are not plain tensors.
"""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import DisableTorchFunctionSubclass
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

from saft_kernels.selected_grad import SelectedGrad

_SPARSE_ROWS = (torch.sparse_csr, torch.sparse_bsr)
_SPARSE_COLUMNS = (torch.sparse_csc, torch.sparse_bsc)

_CPU = torch.device("cpu")

#: What ``torch.tensor`` makes reaches operations in one of these first.
_FRESH = (torch.ops.aten.lift_fresh.default, torch.ops.aten.lift.default)


class Kind(IntEnum):
    """What memory is for. Of memory that is for several things, the last one counts."""

    ACTIVATIONS = 0
    #: It was there before the step, and nobody said what for.
    FOUND = 1
    GRADIENTS = 2
    STATE = 3
    WEIGHTS = 4


@dataclass(frozen=True)
class Split:
    """Bytes that tensors held at the peak of a step.

    Attributes:
        weights: parameters and buffers.
        state: the optimizer's moments and whatever else was there before the step: indices, compact
            parameters, plans.
        gradients: what is in the ``grad`` of parameters, or will be as it is; whole or compact.
        activations: the batch, what is saved for backward, and temporaries between operations.
    """

    weights: int
    state: int
    gradients: int
    activations: int

    @property
    def held(self) -> int:
        """Bytes of all tensors at the peak."""
        return self.weights + self.state + self.gradients + self.activations


@dataclass(frozen=True)
class Allocated:
    """What a step allocated in all, also what it freed again, inside operations too.

    Attributes:
        allocated: bytes.
        allocations: how many times.
    """

    allocated: int
    allocations: int


def count_allocations(step: Callable[[], object], device: torch.device) -> Allocated:
    """Take a step and count what it allocates on a device; torch's allocator tells."""
    return (_count_on_gpu if device.type == "cuda" else _count_on_cpu)(step)


def _count_on_cpu(step: Callable[[], object]) -> Allocated:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    results: Any = profiler.profiler
    events = results.kineto_results.events()
    sizes = [e.nbytes() for e in events if e.name() == "[memory]" and e.nbytes() > 0]
    return Allocated(sum(sizes), len(sizes))


def _count_on_gpu(step: Callable[[], object]) -> Allocated:
    keys = "allocated_bytes.all.allocated", "allocation.all.allocated"
    before = torch.cuda.memory_stats()
    step()
    after = torch.cuda.memory_stats()
    return Allocated(*(after[key] - before.get(key, 0) for key in keys))


@dataclass
class _Block:
    """Memory of one storage.

    Attributes:
        size: bytes.
        kind: what it is for, as far as is known.
        born: the first operation after which it was there; 0: it was there before them all.
        died: the first operation after which it was not.
    """

    size: int
    kind: Kind
    born: int
    died: float = math.inf


class Allocations(TorchDispatchMode):
    """Follows the memory of all tensors that operations show while it is entered, once.

    Backward passes are followed as well: autograd takes the mode along, to the threads of a GPU
    too. It computes a little differently then: where a tensor was used twice, the two gradients of
    it are summed in a third tensor and not in the first, and sparse gradients are copied. Dense
    gradients of parameters are taken over as ever. So the peak is right to a tensor or so, but the
    sum of all allocations, which :class:`Allocated` is, would not be.

    Args:
        device: whose memory is followed; others of its type too.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device.type
        self._now = 0  # operations so far
        self._blocks: list[_Block] = []
        self._living: dict[int, tuple[_Block, weakref.ref[Any]]] = {}  # by id of the storage

    def hold(self, kind: Kind, tensors: Iterable[Tensor]) -> None:
        """Say what some tensors are for; those not met yet were there before."""
        for storage in self._storages(tensors):
            self._mark(storage, kind)

    def at_peak(self) -> Split:
        """How the memory was divided when it was most; the earliest such moment."""
        changes: Counter[float] = Counter()
        for block in self._blocks:
            changes[block.born] += block.size
            changes[block.died] -= block.size
        held, most, peak = 0, 0, 0.0
        for moment in sorted(changes):
            held += changes[moment]
            if held > most:
                most, peak = held, moment
        sizes: Counter[Kind] = Counter()
        for block in self._blocks:
            if block.born <= peak < block.died:
                sizes[block.kind] += block.size
        return Split(
            weights=sizes[Kind.WEIGHTS],
            state=sizes[Kind.STATE] + sizes[Kind.FOUND],
            gradients=sizes[Kind.GRADIENTS],
            activations=sizes[Kind.ACTIVATIONS],
        )

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run the operation; note what it is given and what it makes."""
        self._now += 1
        if func not in _FRESH:
            for storage in self._storages(tree_leaves((args, kwargs))):
                self._mark(storage, Kind.FOUND)
        result = func(*args, **(kwargs or {}))
        kind = Kind.GRADIENTS if _accumulates() else Kind.ACTIVATIONS
        for storage in self._storages(tree_leaves(result)):
            if id(storage) in self._living:
                self._mark(storage, kind)
            else:
                self._follow(storage, kind, self._now)
        return result

    def _mark(self, storage: torch.UntypedStorage, kind: Kind) -> None:
        """Of a storage that is not new."""
        if id(storage) not in self._living:
            self._follow(storage, kind, 0)
            return
        block, reference = self._living[id(storage)]
        if block.size != storage.nbytes():
            block = self._resized(block, storage)
            self._living[id(storage)] = block, reference
        if kind != Kind.FOUND:
            block.kind = max(block.kind, kind)

    def _resized(self, block: _Block, storage: torch.UntypedStorage) -> _Block:
        block.died = self._now
        self._blocks.append(_Block(storage.nbytes(), block.kind, self._now))
        return self._blocks[-1]

    def _follow(self, storage: torch.UntypedStorage, kind: Kind, born: int) -> None:
        block = _Block(storage.nbytes(), kind, born)
        self._blocks.append(block)
        key = id(storage)
        # The storage's object in Python lives as long as its memory, whoever holds that.
        self._living[key] = block, weakref.ref(storage, partial(self._freed, key))

    def _freed(self, key: int, reference: Any) -> None:
        block, _ = self._living.pop(key)
        block.died = self._now + 1

    def _storages(self, leaves: Iterable[Any]) -> Iterator[torch.UntypedStorage]:
        """Those of the tensors among some objects that take memory of the device."""
        with DisableTorchFunctionSubclass():  # parameters in sampled mode answer in Python
            for leaf in leaves:
                for part in _parts(leaf) if isinstance(leaf, Tensor) else ():
                    storage = part.untyped_storage()
                    if storage.device.type == self._device and storage.nbytes():
                        yield storage


def _accumulates() -> bool:
    """Whether autograd is adding to a parameter's ``grad``, or is in a hook after that.

    Not to that of a layer's output, which can be a leaf too.
    """
    node = torch._C._current_autograd_node()
    return isinstance(getattr(node, "variable", None), nn.Parameter)


def _parts(tensor: Tensor) -> Iterator[Tensor]:
    """The tensors with memory that a tensor consists of; mostly itself."""
    if isinstance(tensor, SelectedGrad):
        yield from (tensor.values(), tensor.indices())
    elif is_traceable_wrapper_subclass(tensor):
        names, _ = tensor.__tensor_flatten__()
        for name in names:
            yield from _parts(getattr(tensor, name))
    elif tensor.layout == torch.strided:
        yield tensor
    elif tensor.layout == torch.sparse_coo:
        yield from (tensor._indices(), tensor._values())
    elif tensor.layout in _SPARSE_ROWS:
        yield from (tensor.crow_indices(), tensor.col_indices(), tensor.values())
    elif tensor.layout in _SPARSE_COLUMNS:
        yield from (tensor.ccol_indices(), tensor.row_indices(), tensor.values())


@dataclass(frozen=True)
class TrainingWork:
    """Training steps whose memory is to be divided. As other work, it is called.

    Attributes:
        step: takes one training step. It is called four times: the first call makes the state and
            may be a smaller step; the others must be alike.
        model: its parameters and buffers are the weights.
        optimizer: what it says it holds is state; None where there is none, or it is not known.
            State that it does not tell of is noticed when a step uses it.
        batch: the tensors of the batch; they count as activations.
        device: of all that.
    """

    step: Callable[[], object]
    model: nn.Module
    optimizer: torch.optim.Optimizer | None = None
    batch: Sequence[Tensor] = ()
    device: torch.device = _CPU

    def __call__(self) -> None:
        """A step that makes the state, and a whole one."""
        self.step()
        self.step()

    def weights(self) -> Iterator[Tensor]:
        """The model's tensors, as they are now."""
        return chain(self.model.parameters(), self.model.buffers())

    def state(self) -> Iterator[Tensor]:
        """What the optimizer has in its state and its groups; weights may be among it."""
        if self.optimizer is None:
            return
        for group in self.optimizer.param_groups:
            yield from _tensors(group)
            yield from group["params"]
        for state in self.optimizer.state.values():
            yield from _tensors(state)

    def split(self) -> Split:
        """Take one more step, and see what its memory is for."""
        seen = Allocations(self.device)
        seen.hold(Kind.ACTIVATIONS, self.batch)
        seen.hold(Kind.WEIGHTS, self.weights())
        seen.hold(Kind.STATE, self.state())
        with seen:
            self.step()
        seen.hold(Kind.WEIGHTS, self.weights())  # it may have replaced some
        return seen.at_peak()

    def allocated(self) -> Allocated:
        """Take one more, and see what it allocates."""
        return count_allocations(self.step, self.device)


def _tensors(values: dict[str, Any]) -> list[Tensor]:
    return [value for value in values.values() if isinstance(value, Tensor)]

"""The optimizer state of parameters that share a group, dtypes and a device, as flat vectors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from saft_kernels import ops
from saft_kernels.errors import OptimizerError, OptimizerStateError
from saft_kernels.untrusted import shown

#: The dtypes of weights that can be trained.
TRAINABLE = (torch.float32, torch.bfloat16, torch.float16)


class FlatState:
    """Moments, master values and step counts of T parameters, one entry per selected index.

    Each vector holds the parameters' entries one after the other, so that one operation serves all
    of them; parameter i owns ``[bounds[i], bounds[i + 1])``.

    Args:
        names: T names, for messages.
        params: T parameters of one dtype (fp32, bf16 or fp16) and device.
        indices: T vectors of strictly increasing flat indices of one dtype, int32 or int64, on that
            device.

    Attributes:
        indices: int32 or int64 [nnz].
        bounds: T + 1 numbers.
        exp_avg: fp32 [nnz], first moment.
        exp_avg_sq: fp32 [nnz], second moment.
        master: fp32 [nnz], exact values of the selected entries; None for fp32 parameters.
        step: fp32 [T], steps that each parameter has taken.
    """

    def __init__(
        self, names: Sequence[str], params: Sequence[Tensor], indices: Sequence[Tensor]
    ) -> None:
        self.names = list(names)
        self.params = list(params)
        self.indices, self.bounds = ops.end_to_end(indices)
        ops.check_indices(self.indices, self.bounds, self.params)
        self.dtype, self.device = params[0].dtype, params[0].device
        self.exp_avg = self._vector(self.nnz)
        self.exp_avg_sq = self._vector(self.nnz)
        self.step = self._vector(len(self.params))
        self.master: Tensor | None = None
        # Version of each parameter when its master values were last known to agree with it.
        self._versions = [-1] * len(self.params)
        if self.dtype != torch.float32:
            pieces = [ops.gather(p, self.index(i)) for i, p in enumerate(self.params)]
            self.master = torch.cat(pieces).float()

    def _vector(self, length: int) -> Tensor:
        return torch.zeros(length, dtype=torch.float32, device=self.device)

    def __len__(self) -> int:
        """The number of parameters, T."""
        return len(self.params)

    @property
    def nnz(self) -> int:
        """The number of selected entries."""
        return self.bounds[-1]

    def piece(self, vector: Tensor, begin: int, end: int) -> Tensor:
        """The entries of parameters ``begin`` to ``end`` of a flat vector, as a view."""
        return vector[self.bounds[begin] : self.bounds[end]]

    def index(self, i: int) -> Tensor:
        """The flat indices of parameter ``i``, as a view."""
        return self.piece(self.indices, i, i + 1)

    def view(self, i: int) -> dict[str, Tensor]:
        """The state of parameter ``i``: views, so that whoever changes one changes the other."""
        state = {
            "step": self.step[i],
            "exp_avg": self.piece(self.exp_avg, i, i + 1),
            "exp_avg_sq": self.piece(self.exp_avg_sq, i, i + 1),
            "indices": self.index(i),
        }
        if self.master is not None:
            state["master"] = self.piece(self.master, i, i + 1)
        return state

    # Loading ------------------------------------------------------------------------------------

    def check(self, i: int, saved: Any) -> None:
        """Make sure that ``saved`` is a state of parameter ``i``.

        Raises:
            OptimizerStateError: naming the parameter and what does not fit.
        """
        own = self.view(i)
        where = f"the saved optimizer state does not fit parameter {self.names[i]!r}: "
        if not isinstance(saved, Mapping):
            raise OptimizerStateError(f"{where}it has none; was it saved with another mask?")
        if saved.keys() != own.keys():
            raise OptimizerStateError(
                f"{where}it holds {shown(', '.join(sorted(map(str, saved))))} instead of "
                f"{', '.join(sorted(own))}; weights in {self.dtype} need exactly these"
            )
        for key, tensor in own.items():
            _check_tensor(where, key, saved[key], tensor)
        if not torch.equal(saved["indices"].to(self.device), own["indices"]):
            raise OptimizerStateError(f"{where}it was saved with another mask (other indices)")
        if not 0 <= float(saved["step"]) < float("inf"):
            raise OptimizerStateError(f"{where}step is {float(saved['step'])}")

    def load(self, i: int, saved: Mapping[str, Tensor]) -> None:
        """Copy a state that :meth:`check` has passed; no value is cast."""
        for key, tensor in self.view(i).items():
            if key != "indices":
                tensor.copy_(saved[key].reshape(tensor.shape))
        self._versions[i] = -1

    # Stepping -----------------------------------------------------------------------------------

    def runs(self) -> Iterator[tuple[int, int]]:
        """Maximal ranges ``begin, end`` of parameters that have a gradient now."""
        begin = None
        for i, param in enumerate(self.params):
            if param.grad is not None:
                begin = i if begin is None else begin
            elif begin is not None:
                yield begin, i
                begin = None
        if begin is not None:
            yield begin, len(self)

    def require_unmoved(self) -> None:
        """Refuse parameters that were cast or moved since the optimizer was made.

        Raises:
            OptimizerError: naming the first one.
        """
        for name, param in zip(self.names, self.params, strict=True):
            if param.dtype != self.dtype or param.device != self.device:
                raise OptimizerError(
                    f"parameter {name!r} was {self.dtype} on {self.device} when the optimizer was "
                    f"made and is {param.dtype} on {param.device} now; cast the model before that"
                )

    def adamw_(
        self, begin: int, end: int, grads: Sequence[Tensor] | Tensor, **options: Any
    ) -> None:
        """One AdamW step of parameters ``begin`` to ``end``; options as of the operation."""
        params = self.params[begin:end]
        first = self.bounds[begin]
        ops.sparse_adamw_(
            params,
            grads,
            self.piece(self.indices, begin, end),
            self.piece(self.exp_avg, begin, end),
            self.piece(self.exp_avg_sq, begin, end),
            self.step[begin:end],
            bounds=[bound - first for bound in self.bounds[begin : end + 1]],
            master=None if self.master is None else self.piece(self.master, begin, end),
            **options,
        )
        if self.master is not None:
            self._versions[begin:end] = [param._version for param in params]

    def follow_weights_(self, *, everywhere: bool = False) -> None:
        """Let master values follow weights that were changed from outside.

        An entry whose weight is no longer the rounding of its master value takes the weight as its
        new value; all others keep theirs. Only parameters that were written since the last step are
        looked at, unless ``everywhere``: writes through ``param.data`` leave no trace.
        """
        if self.master is None:
            return
        for i, param in enumerate(self.params):
            if everywhere or param._version != self._versions[i]:
                master = self.piece(self.master, i, i + 1)
                weight = ops.gather(param, self.index(i))
                unchanged = master.to(self.dtype) == weight
                master.copy_(torch.where(unchanged, master, weight.float()))
                self._versions[i] = param._version


def _check_tensor(where: str, key: str, saved: Any, own: Tensor) -> None:
    if not isinstance(saved, Tensor):
        raise OptimizerStateError(f"{where}{key} is not a tensor")
    if saved.dtype != own.dtype:
        raise OptimizerStateError(
            f"{where}{key} is {saved.dtype}, not {own.dtype}; was the state cast on its way?"
        )
    if saved.numel() != own.numel():
        raise OptimizerStateError(
            f"{where}{key} has {saved.numel()} entries, not {own.numel()}; "
            "was it saved with another mask?"
        )

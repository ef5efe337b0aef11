"""Sampled mode: a model whose weight gradients exist at the selected entries only.

:func:`attach` makes every selected parameter a
:class:`~saft_kernels.sampled_parameter.SampledParameter`, in place: the same object, which torch's
functions from then on ask what to do with it. Modules, their classes and ``state_dict`` stay as
they are.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import DisableTorchFunctionSubclass
from torch._compile import _disable_dynamo  # lazy, where torch.compiler.disable imports it all
from torch.optim.optimizer import register_optimizer_step_post_hook

from saft_kernels.entry import Entry
from saft_kernels.errors import OptimizerError
from saft_kernels.mask import CooMask
from saft_kernels.sampled_parameter import SampledParameter, plan_ahead

#: A share of the model's parameters from which on a dense gradient deserves a warning.
_LARGE = 0.01


class Sampled:
    """A model in sampled mode; made by :func:`attach`, which says more.

    Args:
        model: it.
        selected: parameter -> (name, flat indices of its selected entries, on its device).
        leading: whether the compact leaves hold values that the weights follow.

    Attributes:
        entries: parameter -> what stands for its entries.
        streamed: parameter name -> why its dense gradient is computed (and then freed), as far as
            forward passes have shown. Vectors, which are small, are not listed.
    """

    def __init__(
        self, model: nn.Module, selected: Mapping[Any, tuple[str, Tensor]], *, leading: bool
    ) -> None:
        for param, (name, _) in selected.items():
            _require_plain(name, param)
        self._model = model
        self.streamed: dict[str, str] = {}
        self.entries = {
            param: Entry(name, param, index, leading, self.note_streamed)
            for param, (name, index) in selected.items()
        }
        self._flags = {param: param.requires_grad for param in model.parameters()}
        self._numel = sum(param.numel() for param in self._flags)
        for param in self._flags:
            param.requires_grad_(False)
        # Matrices without selected entries too: torch is slow with frozen ones (sampled.py).
        self._frozen = {
            param: _nothing_selected(name, param, self.note_streamed)
            for name, param in model.named_parameters()
            if param not in self.entries and param.dim() == 2 and type(param) is nn.Parameter
        }
        for param, entry in {**self.entries, **self._frozen}.items():
            param.__class__ = SampledParameter
            param._saft_entry = entry
        for module in model.modules():
            plan_ahead(module)
        if leading:
            self._watch()

    def _watch(self) -> None:
        """Let the weights follow every optimizer step: their uses in compiled code do not."""
        for entry in self.entries.values():
            entry.leaf.register_post_accumulate_grad_hook(_weakly(entry.require_together))
        self._by_leaf = {entry.leaf: entry for entry in self.entries.values()}
        _register_step_hook()
        _watched.add(self)

    def follow_step_(self, optimizer: torch.optim.Optimizer) -> None:
        """Bring up to date the weights whose values an optimizer has just stepped."""
        leaves = (leaf for group in optimizer.param_groups for leaf in group["params"])
        with DisableTorchFunctionSubclass():
            for leaf in leaves:
                if leaf in self._by_leaf:
                    self._by_leaf[leaf].follow_step_()

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(name of the model's parameter, its compact leaf)."""
        return ((entry.name, entry.leaf) for entry in self.entries.values())

    def parameters(self) -> Iterator[nn.Parameter]:
        """The compact leaves, fp32, one for each parameter with selected entries."""
        return (values for _, values in self.named_parameters())

    def as_module(self) -> nn.Module:
        """The model as a module whose trainable parameters are the compact leaves.

        For wrappers that look for a module's parameters, ``DistributedDataParallel`` for one: they
        synchronise the compact gradients, 4 bytes per selected entry.
        """
        return _WithLeaves(self._model, self.parameters())

    def note_streamed(self, entry: Entry, func: Any) -> None:
        """Remember that a parameter was used without a sampled form; warn if it is large."""
        if entry.weight.dim() < 2 or entry.name in self.streamed:
            return
        if entry.crowded:
            share = entry.indices.numel() / entry.weight.numel()
            self.streamed[entry.name] = f"{share:.0%} of its entries are selected, which is faster"
            return
        name = getattr(func, "__name__", str(func))
        self.streamed[entry.name] = f"{name} has no sampled form"
        if entry.weight.numel() > _LARGE * self._numel:
            warnings.warn(
                f"the gradient of {entry.name!r} is computed whole and then freed: "
                f"{self.streamed[entry.name]}",
                stacklevel=2,
            )

    def update_(self) -> None:
        """Bring the weights up to date with the compact leaves; any use of them does it too.

        Needed only before weights are read in ways that torch does not see, and in compiled models
        after values or weights were changed by anything but an optimizer.
        """
        with DisableTorchFunctionSubclass():
            for entry in self.entries.values():
                entry.follow_()

    def detach(self) -> None:
        """Leave the model as it was found, with the trained weights. Can be repeated."""
        if not self._flags:
            return
        self.update_()
        for param in (*self.entries, *self._frozen):
            param.__class__ = nn.Parameter
            del param._saft_entry
        for param, flag in self._flags.items():
            param.requires_grad_(flag)
        self._flags.clear()
        _watched.discard(self)

    def __enter__(self) -> Sampled:
        """Itself."""
        return self

    def __exit__(self, *error: object) -> None:
        """:meth:`detach`."""
        self.detach()


class _WithLeaves(nn.Module):
    def __init__(self, model: nn.Module, leaves: Iterator[nn.Parameter]) -> None:
        super().__init__()
        self.model = model
        self.values = nn.ParameterList(leaves)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)


#: Those whose weights follow optimizer steps. torch keeps our hook, which must not keep a model.
_watched: weakref.WeakSet[Sampled] = weakref.WeakSet()


@cache
def _register_step_hook() -> None:
    register_optimizer_step_post_hook(_follow_step)


@_disable_dynamo
def _follow_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    for sampled in list(_watched):
        sampled.follow_step_(optimizer)


def _weakly(method: Callable[[Tensor], None]) -> Callable[[Tensor], None]:
    """A hook that keeps no object alive: torch's are where the garbage collector does not look."""
    reference = weakref.WeakMethod(method)

    @_disable_dynamo
    def hook(leaf: Tensor) -> None:
        bound = reference()
        if bound is not None:
            bound(leaf)

    return hook


def _nothing_selected(name: str, param: nn.Parameter, streamed: Any) -> Entry:
    none = torch.empty(0, dtype=torch.int32, device=param.device)
    entry = Entry(name, param, none, False, streamed)
    entry.leaf.requires_grad_(False)
    return entry


def _require_plain(name: str, param: Tensor) -> None:
    if isinstance(param, SampledParameter):
        raise OptimizerError(
            f"parameter {name!r} is in sampled mode already; call detach() there first"
        )
    if type(param) is not nn.Parameter:
        raise OptimizerError(
            f"parameter {name!r} is a {type(param).__name__}; sampled mode takes plain "
            "nn.Parameter only, use gradients='streamed'"
        )


def attach(model: nn.Module, mask: CooMask) -> Sampled:
    """Put a model into sampled mode, in place, until ``detach()`` or the end of a ``with`` block.

    Forward passes run at stock speed on the weights as they stand. In backward the gradient of
    every selected parameter is computed at its selected entries only, and arrives in a compact leaf
    of :meth:`Sampled.parameters`, which any optimizer, clipping call or data-parallel wrapper can
    use::

        with attach(model, mask) as sparse:
            optimizer = torch.optim.AdamW(sparse.parameters(), lr=1e-5)
            for batch in batches:
                optimizer.zero_grad()
                loss_fn(model, batch).backward()
                optimizer.step()  # the next forward pass uses the new values

    All parameters of the model are frozen meanwhile: nothing below the first selected entry is part
    of backward. Matrices without selected entries are taken over too, only because torch is slow
    with frozen ones in attention.

    Linear layers, 2-d convolutions without groups, embeddings, fused attention and ``x @ weight``
    have a sampled form. Anything else that is done with a selected parameter works too: its dense
    gradient is computed, gathered and freed, and :attr:`Sampled.streamed` says so.

    Args:
        model: floating point, on its device.
        mask: the entries to train.

    Raises:
        MaskError: if the mask does not fit the model.
        OptimizerError: if a parameter is in sampled mode already.
    """
    selected = {p: (name, index.to(p.device)) for name, p, index in mask.parameters(model)}
    return Sampled(model, selected, leading=True)

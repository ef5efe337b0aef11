"""AdamW over the selected entries of a model."""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from itertools import zip_longest
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import DisableTorchFunctionSubclass
from torch._compile import _disable_dynamo  # lazy, where torch.compiler.disable imports it all
from torch.optim import Optimizer
from torch.utils.weak import WeakTensorKeyDictionary

from saft_kernels.errors import NonFiniteGradientError, OptimizerError, OptimizerStateError
from saft_kernels.flat_state import TRAINABLE, FlatState
from saft_kernels.gradients import gradient_source
from saft_kernels.mask import CooMask
from saft_kernels.untrusted import shown

#: What optimizers have frozen, and which one (a weak reference) each.
_frozen_by: Any = WeakTensorKeyDictionary()


class SparseAdamW(Optimizer):
    """AdamW (Loshchilov & Hutter 2019) that trains the selected entries of a model, nothing else.

    The selected entries follow ``torch.optim.AdamW`` run on gradients that are zero elsewhere;
    every other entry keeps its bits, also under weight decay, which acts on the selected entries
    only. The state takes 12 bytes per selected entry (indices and two moments), 4 more for bf16 and
    fp16 weights, whose exact values are kept in fp32, and 4 more in streamed mode, plus 4 per
    parameter tensor.

    It is a ``torch.optim.Optimizer``: learning-rate schedulers, ``GradScaler``, closures, hooks,
    ``deepcopy``, pickling and ``state_dict`` work as for any other. Under ``torch.compile`` the
    step itself runs eagerly. A parameter whose ``grad`` is None is skipped, as in
    ``torch.optim.AdamW``.

    Gradient modes:

    - ``"dense"`` reads ``param.grad``. The dense gradients exist, only the selected entries are
      read.
    - ``"streamed"`` gathers the selected entries of each gradient as soon as autograd has made it
      and frees the rest, so that no more than a layer's gradient exists at a time; ``param.grad``
      is then a :class:`~saft_kernels.selected_grad.SelectedGrad`. Parameters without selected
      entries are set to ``requires_grad=False``, since nothing would free their gradients.
      :meth:`detach` undoes both.
    - ``"sampled"`` computes the gradients at the selected entries only: a dense weight gradient
      never exists, and a step costs little more than that of a frozen model. The model is put into
      sampled mode (:func:`saft_kernels.attach`) and frozen until :meth:`detach`. ``param.grad`` is
      as in streamed mode. A copy of the optimizer holds a copy of the model.

    Gradient clipping by norm means the norm of the *selected* gradient: :meth:`clip_grad_norm_` in
    every mode. ``torch.nn.utils.clip_grad_norm_`` is the same in streamed mode; in dense mode it
    sees the whole gradient, whose norm is larger.

    Two optimizers with dense gradients may train one model, each its own entries. One with streamed
    or sampled gradients has the model to itself.

    Weights are the truth: a selected weight that is changed between two steps (by
    ``load_state_dict``, say) is where the next step starts from, in low precision too. Only writes
    through ``param.data`` to bf16 and fp16 weights need :meth:`refresh_master_`.

    Args:
        model: the model whose weights are changed in place; fp32, bf16 or fp16, already on its
            device. All selected parameters must require gradients.
        mask: the entries to train.
        lr: learning rate, a float or a one-element tensor, read at each step.
        betas: decay rates of the two moments.
        eps: added to the denominator.
        weight_decay: decoupled weight decay.
        maximize: ascend instead of descend.
        capturable: accepted for compatibility: a step never waits for the GPU, and its state lies
            there, so that every step can be captured in a CUDA graph once one was taken without.
            Options are captured as they are, but for a tensor lr on the GPU, which each replay
            reads. After bf16 or fp16 weights were changed from outside, call
            :meth:`refresh_master_` before the next replay.
        gradients: "dense", "streamed" or "sampled", see above.
        param_groups: options for parts of the model, as ``[{"params": model.visual.parameters(),
            "lr": 1e-5}]``. Parameters without selected entries may be listed and are left out;
            selected ones that no group lists form one more group, at the end, with the options
            above.

    Raises:
        MaskError: if the mask does not fit the model.
        OptimizerError: if an option, a dtype or a group cannot be served, naming it; or, in
            streamed mode, if another optimizer streams one of the parameters.
    """

    _step_supports_amp_scaling = True

    def __init__(
        self,
        model: nn.Module,
        mask: CooMask,
        lr: float | Tensor = 5e-6,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        *,
        maximize: bool = False,
        capturable: bool = False,
        gradients: str = "dense",
        param_groups: Iterable[Mapping[str, Any]] | None = None,
    ) -> None:
        source = gradient_source(gradients)
        selected = mask.parameters(model)
        for name, param, _ in selected:
            _require_trainable(name, param)
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "capturable": capturable,
        }
        groups = _groups(model, selected, param_groups or ())
        for group in groups:
            _check_options({**defaults, **group})
        self._complete = False
        super().__init__(groups, defaults)
        self._complete = True
        indices = {param: index.to(param.device) for _, param, index in selected}
        self._states = [_flat_states(group, indices) for group in self.param_groups]
        self._bind_views()
        self._mode, self._source = gradients, source
        self._frozen: list[nn.Parameter] = []
        self._model = None  # needed again by a copy in sampled mode only
        if gradients == "sampled":
            self._model = model
            self._freeze(model.parameters())
        source.attach(self._all_states(), model)
        if gradients == "streamed":
            self._freeze(p for p in model.parameters() if p not in indices)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refuse: the mask fixes what is trained. Give ``param_groups`` when making the optimizer.

        Raises:
            OptimizerError: always, once the optimizer is made.
        """
        if self._complete:
            raise OptimizerError(
                "every selected parameter is in a group already, and a mask does not change; "
                "give param_groups=... when making the optimizer"
            )
        super().add_param_group(param_group)

    # Stepping -----------------------------------------------------------------------------------

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step over the selected entries.

        Args:
            closure: evaluates the model again and returns the loss.

        Returns:
            What ``closure`` returned, or None.

        Raises:
            OptimizerError: if a parameter was cast or moved since the optimizer was made or has a
                sparse gradient, or an option was changed to a wrong value; nothing is written.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._update()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop all gradients, or set them to zero."""
        with DisableTorchFunctionSubclass():
            super().zero_grad(set_to_none)

    @_disable_dynamo
    @torch.no_grad()
    def _update(self) -> None:
        # Parameters in sampled mode answer every question in Python, and there are many of them.
        with DisableTorchFunctionSubclass():
            self._update_plain()

    def _update_plain(self) -> None:
        grad_scale = getattr(self, "grad_scale", None)  # set by GradScaler around the call
        found_inf = getattr(self, "found_inf", None)
        for state in self._all_states():
            state.require_unmoved()
            self._require_not_taken(state)
            state.follow_weights_()
        for group in self.param_groups:  # schedulers and users change them
            _check_options(group)
        # Every gradient is looked at before any weight is written.
        jobs = [
            (_options(group, state.device), state, run, self._source.gradients(state, *run))
            for group, states in zip(self.param_groups, self._states, strict=True)
            for state in states
            for run in state.runs()
        ]
        for options, state, run, grads in jobs:
            scale, skip = _on(grad_scale, state.device), _on(found_inf, state.device)
            state.adamw_(*run, grads, **options, grad_scale=scale, found_inf=skip)

    @torch.no_grad()
    def clip_grad_norm_(
        self,
        max_norm: float,
        norm_type: float = 2.0,
        error_if_nonfinite: bool = False,
    ) -> Tensor:
        """Scale the selected gradient down so that its norm is at most ``max_norm``.

        As ``torch.nn.utils.clip_grad_norm_`` on gradients that are zero outside the mask, in every
        gradient mode. With a ``GradScaler``, call its ``unscale_(optimizer)`` first. In dense mode
        only the selected entries of ``param.grad`` are scaled.

        Args:
            max_norm: the largest norm allowed.
            norm_type: order of the norm; may be ``float("inf")``.
            error_if_nonfinite: raise if the norm is NaN or infinite.

        Returns:
            The norm before clipping, of all groups together, fp32, without dimensions.

        Raises:
            NonFiniteGradientError: naming the first parameter with such a value, if asked for.
        """
        runs = [(state, *run) for state in self._all_states() for run in state.runs()]
        if not runs:
            return torch.tensor(0.0)
        norms = [torch.linalg.vector_norm(self._source.compact(*run), norm_type) for run in runs]
        total = torch.linalg.vector_norm(
            torch.stack([norm.to(norms[0].device) for norm in norms]), norm_type
        )
        if error_if_nonfinite and not total.isfinite():
            self._raise_nonfinite(runs)
        factor = (max_norm / (total + 1e-6)).clamp(max=1.0)
        for state, begin, end in runs:
            self._source.scale_(state, begin, end, factor.to(state.device))
        return total

    def _raise_nonfinite(self, runs: list[tuple[FlatState, int, int]]) -> None:
        for state, begin, end in runs:
            for i in range(begin, end):
                if not self._source.compact(state, i, i + 1).isfinite().all():
                    raise NonFiniteGradientError(
                        f"the selected gradient of {state.names[i]!r} holds NaN or infinity, so it "
                        "cannot be clipped; lower the learning rate or skip this step",
                        state.names[i],
                    )
        raise NonFiniteGradientError("the norm of the selected gradient overflows float32")

    def refresh_master_(self) -> None:
        """Let the fp32 master values follow bf16 or fp16 weights written through ``.data``.

        Entries whose weight is still the rounding of its master value keep that value. Any other
        way of changing weights (``load_state_dict``, in-place operations) is noticed without this
        call.
        """
        for state in self._all_states():
            state.follow_weights_(everywhere=True)

    def detach(self) -> None:
        """Take the hooks off the model and unfreeze what this optimizer has frozen.

        Steps can still be taken afterwards, from dense gradients.
        """
        self._source.detach()
        for param in self._frozen:
            param.requires_grad_(True)
            _frozen_by.pop(param, None)
        self._frozen.clear()

    def _freeze(self, params: Iterable[nn.Parameter]) -> None:
        for param in params:
            if param.requires_grad:
                param.requires_grad_(False)
                self._frozen.append(param)
                _frozen_by[param] = weakref.ref(self)

    def _require_not_taken(self, state: FlatState) -> None:
        """Refuse to train on what will never get a gradient; a missing one alone is no fault."""
        for name, param in zip(state.names, state.params, strict=True):
            if param.grad is None and _freezer(param) not in (None, weakref.ref(self)):
                raise _taken(name)

    # State --------------------------------------------------------------------------------------

    def _all_states(self) -> list[FlatState]:
        return [state for states in self._states for state in states]

    def _bind_views(self) -> None:
        self.state: defaultdict[Tensor, Any] = defaultdict(dict)
        for state in self._all_states():
            for i, param in enumerate(state.params):
                self.state[param] = state.view(i)

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict()`` of an optimizer with the same mask and groups returned.

        Everything is checked before anything is changed, and no value is cast: training continues
        bit for bit, if the model's weights were loaded too, before or after.

        Raises:
            OptimizerStateError: if the state belongs to another mask or model, or was damaged,
                naming the parameter.
        """
        state_dict = dict(state_dict) if isinstance(state_dict, Mapping) else {}
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            replaced = pre_hook(self, state_dict)
            state_dict = state_dict if replaced is None else replaced
        _check_form(state_dict)
        groups = deepcopy(state_dict["param_groups"])
        self._check_groups(groups)
        saved = self._saved_states(groups, state_dict["state"])
        for state, i, entry in saved:
            state.check(i, entry)
        for state, i, entry in saved:
            state.load(i, entry)
        self.param_groups = [
            {
                **new,  # first, so that a file of the state has the same bytes as without a stop
                **{key: value for key, value in self.defaults.items() if key not in new},
                "params": own["params"],
                "param_names": own["param_names"],
            }
            for own, new in zip(self.param_groups, groups, strict=True)
        ]
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _check_groups(self, groups: Sequence[Mapping[str, Any]]) -> None:
        own, saved = ([len(g["params"]) for g in some] for some in (self.param_groups, groups))
        if own != saved:
            raise OptimizerStateError(
                f"the saved optimizer state has groups of {shown(saved)} parameters, this "
                f"optimizer has {own}; it was saved with another mask, model or param_groups"
            )
        for mine, theirs in zip(self.param_groups, groups, strict=True):
            # States of other releases and of wrapped models may lack the names.
            names = theirs.get("param_names", mine["param_names"])
            for name, other in zip_longest(mine["param_names"], names):
                if name != other:
                    raise OptimizerStateError(
                        f"the saved optimizer state holds {shown(repr(other))} where this "
                        f"optimizer has {name!r}; it was saved with another model"
                    )
            _check_saved_options({**self.defaults, **theirs})

    def _saved_states(
        self, groups: Sequence[Mapping[str, Any]], saved: Mapping[Any, Any]
    ) -> list[tuple[FlatState, int, Any]]:
        """(flat state, position in it, saved state) of every parameter."""
        key_of = {
            param: key
            for own, group in zip(self.param_groups, groups, strict=True)
            for param, key in zip(own["params"], group["params"], strict=True)
        }
        return [
            (state, i, saved.get(key_of[param]))
            for state in self._all_states()
            for i, param in enumerate(state.params)
        ]

    def __getstate__(self) -> dict[str, Any]:
        """What pickling and ``deepcopy`` keep; the flat vectors are made again from the state."""
        own = {"_mode": self._mode, "_frozen": self._frozen, "_model": self._model}
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copy; in streamed mode its hooks go on its own parameters."""
        super().__setstate__({**state, "_complete": True})
        pieces = self.state
        indices = {param: piece["indices"] for param, piece in pieces.items()}
        self._states = [_flat_states(group, indices) for group in self.param_groups]
        for flat in self._all_states():
            for i, param in enumerate(flat.params):
                flat.load(i, pieces[param])
        self._bind_views()
        self._source = gradient_source(self._mode)
        self._source.attach(self._all_states(), self._model)


def _check_form(saved: Mapping[str, Any]) -> None:
    """Make sure that this has the form of an optimizer state, whatever is in it."""
    groups = saved.get("param_groups")
    if not isinstance(groups, list | tuple) or not isinstance(saved.get("state"), Mapping):
        raise OptimizerStateError("this is no optimizer state: it lacks param_groups or state")
    if not all(map(_is_group, groups)):
        raise OptimizerStateError("this is no optimizer state: a group of it is malformed")


def _is_group(group: Any) -> bool:
    if not isinstance(group, Mapping):
        return False
    keys, names = group.get("params"), group.get("param_names", [])
    if not isinstance(keys, list | tuple) or not isinstance(names, list | tuple):
        return False
    return all(isinstance(key, int | str) for key in keys)


def _check_saved_options(group: Mapping[str, Any]) -> None:
    try:
        _check_options(group)
        numbers = [*group["betas"], group["eps"], group["weight_decay"]]
        sound = all(isinstance(number, Real) for number in numbers)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise OptimizerStateError(f"the saved options are impossible: {shown(error)}") from error
    if not sound or not isinstance(group["maximize"], bool):
        raise OptimizerStateError("the saved options are impossible: one is of another type")


def _options(group: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """The options of a group that a step on a device takes, read anew: schedulers change them."""
    names = ("lr", "eps", "weight_decay", "maximize")
    options = {"betas": tuple(group["betas"]), **{name: group[name] for name in names}}
    lr = options["lr"]
    if isinstance(lr, Tensor) and lr.device.type != "cpu":  # one on the CPU is read at the call
        options["lr"] = lr.to(device)
    return options


def _on(scalar: Tensor | None, device: torch.device) -> Tensor | None:
    return None if scalar is None else scalar.to(device)


def _require_trainable(name: str, param: nn.Parameter) -> None:
    if param.dtype not in TRAINABLE:
        raise OptimizerError(
            f"parameter {name!r} is {param.dtype}; SparseAdamW trains float32, bfloat16 and float16"
        )
    if param.is_inference():
        raise OptimizerError(
            f"parameter {name!r} was made under torch.inference_mode(), so that changes of it "
            "cannot be noticed; make the model outside of it"
        )
    if _freezer(param) is not None:
        raise _taken(name)
    if not param.requires_grad:
        raise OptimizerError(
            f"parameter {name!r} has selected entries but requires_grad is False, so it would "
            "never train; call requires_grad_(True) on it or leave it out of the mask"
        )


def _freezer(param: Tensor) -> Any:
    """A weak reference to the optimizer that keeps a parameter frozen; None if none does."""
    return None if param.requires_grad else _frozen_by.get(param)


def _taken(name: str) -> OptimizerError:
    return OptimizerError(
        f"parameter {name!r} was frozen by another SparseAdamW, which has the model to itself "
        "(gradients='streamed' or 'sampled'); call detach() on that one, or requires_grad_(True) "
        "on the parameter if that one is gone"
    )


def _check_options(group: Mapping[str, Any]) -> None:
    lr, (beta1, beta2) = group["lr"], group["betas"]
    if isinstance(lr, Tensor):
        if lr.numel() != 1 or lr.dtype not in (torch.float32, torch.float64):
            raise OptimizerError(
                "a tensor lr must be one float32 or float64 number, not "
                f"{lr.dtype} {list(lr.shape)}"
            )
    elif not isinstance(lr, Real):
        raise OptimizerError(f"lr={lr!r} must be a number or a tensor, not a {type(lr).__name__}")
    on_gpu = isinstance(lr, Tensor) and lr.device.type != "cpu"  # reading it would wait
    rules = (
        ("lr", on_gpu or float(lr) >= 0, "must not be negative"),
        ("betas", 0 <= beta1 < 1 and 0 <= beta2 < 1, "must lie in [0, 1)"),
        ("eps", group["eps"] >= 0, "must not be negative"),
        ("weight_decay", group["weight_decay"] >= 0, "must not be negative"),
    )
    for name, holds, rule in rules:
        if not holds:
            raise OptimizerError(f"{name}={group[name]} {rule}")


Selected = Sequence[tuple[str, nn.Parameter, Tensor]]


def _groups(
    model: nn.Module, selected: Selected, given: Iterable[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """The parameter groups: the given ones without unselected parameters, and one for the rest."""
    known = set(model.parameters())
    left = {param: name for name, param, _ in selected}
    names = dict(left)
    groups: list[dict[str, Any]] = []
    for group in given:
        params = list(_listed(group["params"]))
        for param in params:
            if param not in known:
                raise OptimizerError(
                    f"group {len(groups)} of param_groups lists a tensor of shape "
                    f"{list(param.shape)} that is no parameter of the model"
                )
            if param in names and left.pop(param, None) is None:
                raise OptimizerError(f"parameter {names[param]!r} is listed twice in param_groups")
        groups.append(_group([p for p in params if p in names], names, group))
    if left or not groups:
        groups.append(_group(list(left), names, {}))
    return groups


def _listed(params: Any) -> Iterator[nn.Parameter]:
    """The parameters of a group, alone or with names as from ``named_parameters()``."""
    entries: Iterable[Any] = [params] if isinstance(params, Tensor) else params
    for entry in entries:
        yield entry[1] if isinstance(entry, tuple) else entry


def _group(
    params: list[nn.Parameter], names: Mapping[nn.Parameter, str], options: Mapping[str, Any]
) -> dict[str, Any]:
    return {**options, "params": params, "param_names": [names[param] for param in params]}


def _flat_states(group: Mapping[str, Any], indices: Mapping[Any, Tensor]) -> list[FlatState]:
    """One state for each dtype, device and dtype of indices among a group's parameters."""
    parts: defaultdict[tuple[Any, ...], list[tuple[str, Tensor]]] = defaultdict(list)
    for name, param in zip(group["param_names"], group["params"], strict=True):
        parts[param.dtype, param.device, indices[param].dtype].append((name, param))
    return [
        FlatState([n for n, _ in part], [p for _, p in part], [indices[p] for _, p in part])
        for part in parts.values()
    ]

"""What fine-tuning changed: a small file that turns any copy of the base into the tuned model."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from saft_kernels import ops
from saft_kernels.delta import file as delta_file
from saft_kernels.delta.base import Base
from saft_kernels.delta.file import DeltaContent, TensorRecord
from saft_kernels.delta.places import (
    Place,
    Target,
    everywhere,
    is_sharded,
    place_of,
    write,
)
from saft_kernels.errors import DeltaError
from saft_kernels.fingerprint import count_different_bits, fingerprints, same_bits
from saft_kernels.layout import index_dtype
from saft_kernels.mask import CooMask
from saft_kernels.untrusted import near_matches

_APPLIED = "the delta is applied to this model already; revert_ it first"


class SparseDelta:
    """New values for the selected entries of a model, exact to apply and exact to take back.

    It holds, for every parameter, flat indices and the values that replace the base's there, and a
    fingerprint of the base's whole tensor. The original values are remembered when it is applied
    and written back when it is reverted; nothing is ever added or subtracted, so both directions
    are exact to the bit. All parameters of the model are covered, tied ones once. Buffers
    (batch-norm statistics) are not part of it.

    Make one with :meth:`capture` or :meth:`load`. :meth:`capture` leaves the model it was taken
    from in the applied state, so that :meth:`revert_` turns it back into the base.

    Attributes:
        base: the parameters of the model that it was made from.
        records: what it changes in each of them.
        metadata: text that the maker of the delta wrote down about it.
        density: selected entries over the entries of all candidate parameters.
        created_by: the release that captured it.
    """

    def __init__(self, content: DeltaContent) -> None:
        self.records = content.records
        self.base = Base(content.records)
        self.metadata: dict[str, str] = dict(content.metadata)
        self.density = content.density
        self.created_by = content.created_by
        # Those of the base that the fingerprints describe, and those of each model by itself, which
        # may differ from them if it was applied to without verification.
        self._originals: Mapping[str, Tensor] | None = content.originals
        self._applied: WeakKeyDictionary[nn.Module, list[Tensor]] = WeakKeyDictionary()
        self._awaited: WeakKeyDictionary[nn.Module, RemovableHandle] = WeakKeyDictionary()

    @classmethod
    def capture(
        cls,
        model: nn.Module,
        mask: CooMask,
        base: nn.Module | Mapping[str, Tensor],
        metadata: Mapping[str, str] | None = None,
    ) -> SparseDelta:
        """The difference between a fine-tuned model and its base.

        Args:
            model: the fine-tuned model.
            mask: the entries that were trained.
            base: the pretrained model, or its ``state_dict``.
            metadata: text to keep with the delta.

        Raises:
            MaskError: if the mask does not fit the model.
            DeltaError: naming the parameter, if one is missing from the base, has another shape or
                dtype there, or shares its memory; or differs from the base outside the mask, so
                that the delta would lose that.
        """
        mask.check(model)
        texts = require_texts(metadata)
        if isinstance(base, nn.Module):
            base = dict(base.named_parameters(remove_duplicate=False))
        params = _params_with_names(model)
        bases = [_base_of(param, names[0], base) for param, names in params]
        records, originals = [], {}
        for (param, (name, *tied)), before, of_base in zip(
            params, bases, fingerprints(bases), strict=True
        ):
            indices = _indices(mask, [name, *tied], param)
            values, originals[name] = _changes(name, param, before, indices)
            kind = (param.dtype, tuple(param.shape), of_base)
            records.append(TensorRecord(name, tuple(tied), *kind, indices, values))
        return cls(DeltaContent(tuple(records), texts, mask.density, release(), originals))

    # What it holds ------------------------------------------------------------------------------

    def items(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """(parameter name, flat indices, new values) of every changed parameter, in model order."""
        for record in self._changed():
            yield record.name, record.indices, record.values

    @property
    def originals(self) -> Mapping[str, Tensor]:
        """Parameter name -> the base's values at its indices, for every changed parameter.

        Raises:
            DeltaError: if they are not known.
        """
        if self._originals is None:
            raise DeltaError(
                "the original values are not known; apply the delta to its base first, or save "
                "deltas with originals=True"
            )
        return self._originals

    @property
    def knows_originals(self) -> bool:
        """Whether :attr:`originals` are known."""
        return self._originals is not None

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every parameter of the base, by name."""
        return self.base.shapes

    @property
    def nnz(self) -> int:
        """The number of entries it replaces."""
        return sum(record.indices.numel() for record in self.records)

    @property
    def nbytes(self) -> int:
        """The size of indices and values."""
        return sum(record.indices.nbytes + record.values.nbytes for record in self.records)

    def __repr__(self) -> str:
        """Its size."""
        changed = sum(1 for _ in self._changed())
        return (
            f"SparseDelta(nnz={self.nnz:,}, density={self.density:.3g}, "
            f"parameters={changed} of {len(self.records)}, nbytes={self.nbytes:,})"
        )

    def _changed(self) -> Iterator[TensorRecord]:
        return (record for record in self.records if record.indices.numel())

    # Files --------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str], *, originals: bool = False) -> None:
        """Write the delta to a safetensors file, atomically.

        Args:
            path: the file; its folder must exist.
            originals: store the base's values too (half as large again), so that someone who did
                not apply the delta can revert it.

        Raises:
            DeltaError: if originals are asked for and not known.
            FileWriteError: if the file cannot be written; one that was there before stays as it
                was.
        """
        stored = self.originals if originals else None
        delta_file.write(
            path,
            DeltaContent(self.records, self.metadata, self.density, self.created_by, stored),
        )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SparseDelta:
        """Read a delta that :meth:`save` wrote. Everything in the file is checked first.

        Raises:
            DeltaFormatError: if the file cannot be read, is broken, cut short or hostile, is no
                delta, or was written by a newer release.
        """
        return cls(delta_file.read(path))

    # Applying -----------------------------------------------------------------------------------

    @torch.no_grad()
    def apply_(self, model: Target, *, verify: bool = True) -> None:
        """Turn a copy of the base into the fine-tuned model, in place: all of it or nothing.

        Parameters that the base did not have are left alone. If parameters are sharded
        (``DTensor``), every process calls this, and each writes its shards.

        A model on the ``meta`` device has nothing to be written to yet: the delta is then applied
        by the ``load_state_dict`` that brings the base's values (with ``assign=True``, or after
        ``to_empty``), and whatever is wrong is raised there.

        Args:
            model: a model with the base's parameters, or a ``state_dict``, on any device.
            verify: compare the fingerprint of every parameter with the base's, which reads the
                whole model once. False checks names and shapes only, for a model known to be the
                base; it may then be the base cast to another floating dtype, and becomes the
                fine-tuned model cast to that dtype.

        Raises:
            DeltaError: naming the parameter, if the model is not the base or the delta is applied
                already; the model is then as it was.
        """
        params = self.base.find(model, same_dtype=verify)
        if isinstance(model, nn.Module) and any(param.is_meta for param in params.values()):
            self._apply_once_loaded(model, verify)
            return
        places = self.places(params)
        if verify:
            self._require_base(params, places)
        elif self._is_applied(places):
            raise DeltaError(_APPLIED)
        originals = [place.gather() for place in places]
        write(places, self._values(places), originals)
        if isinstance(model, nn.Module):
            self._applied[model] = [values.cpu() for values in originals]
        if verify and not any(map(is_sharded, params.values())):
            self._originals = {
                place.record.name: values.cpu()
                for place, values in zip(places, originals, strict=True)
            }

    @torch.no_grad()
    def revert_(self, model: Target, *, verify: bool = True) -> None:
        """Turn the fine-tuned model back into the base, bit for bit: all of it or nothing.

        Args:
            model: a model that this delta was applied to or captured from; or any, if originals are
                in its file or it was applied to another copy of the base before.
            verify: make sure with the fingerprints that the result is the base.

        Raises:
            DeltaError: naming the parameter, if the model is not in the applied state, or the
                original values are not known; the model is then as it was.
        """
        if isinstance(model, nn.Module) and model in self._awaited:
            self._awaited.pop(model).remove()
            return
        params = self.base.find(model, same_dtype=verify)
        places = self.places(params)
        values = self._values(places)
        for place, written in zip(places, values, strict=True):
            if not everywhere(place.holds(written), [place]):
                raise DeltaError(
                    f"the delta is not applied to this model: {place.record.name!r} has other "
                    "values than it wrote; load the base weights again instead"
                )
        originals = self._originals_at(model, places)
        write(places, originals, values)
        differing = self.base.first_difference(params) if verify else None
        if differing is not None:
            write(places, values, originals)
            raise DeltaError(
                f"reverting would not give the base: {differing!r} was changed outside the delta's "
                "entries after it was applied; load the base weights again"
            )
        if isinstance(model, nn.Module):
            self._applied.pop(model, None)

    @torch.no_grad()
    def learn_originals(self, base: Target, *, verify: bool = True) -> None:
        """Look up the base's values at the changed entries, which the base alone knows.

        :meth:`scale`, :func:`.compose` and :meth:`revert_` of another copy need them; a delta that
        was captured here, was applied to its base or has them in its file knows them already.

        Args:
            base: a copy of the base, or its ``state_dict``.
            verify: make sure with the fingerprints that it is the base.

        Raises:
            DeltaError: naming the parameter, if it is not, or is sharded.
        """
        params = self.base.find(base)
        for name, param in params.items():
            if is_sharded(param):
                raise DeltaError(f"parameter {name!r} is sharded; give a base that is whole")
        places = self.places(params)
        if verify:
            self._require_base(params, places)
        self._originals = {place.record.name: place.gather().cpu() for place in places}

    # Interpolating ------------------------------------------------------------------------------

    def scale(self, alpha: float) -> SparseDelta:
        """The delta of the model ``(1 - alpha) base + alpha fine-tuned``.

        That is the interpolation in weight space of WiSE-FT (Wortsman et al. 2022, equation 1): all
        other entries are the same in both models, and so in the interpolated one. Computed in
        double precision and rounded once; 0 and 1 give the base and the fine-tuned model bit for
        bit.

        Args:
            alpha: 0 is the base, 1 the fine-tuned model; others than those between extrapolate.

        Raises:
            DeltaError: if the original values are not known, or alpha is not finite.
        """
        if not math.isfinite(alpha):
            raise DeltaError(f"alpha must be a finite number, not {alpha}")
        originals = self.originals
        records = []
        for record in self.records:
            values = record.values
            if record.indices.numel() and alpha != 1:
                base = originals[record.name]
                between = (1 - alpha) * base.double() + alpha * values.double()
                values = between.to(record.dtype) if alpha else base.clone()
            records.append(replace(record, values=values))
        metadata = {**self.metadata, "alpha": repr(float(alpha))}
        return SparseDelta(
            DeltaContent(tuple(records), metadata, self.density, release(), originals)
        )

    # Applying, in detail ------------------------------------------------------------------------

    def _apply_once_loaded(self, model: nn.Module, verify: bool) -> None:
        if model in self._awaited:
            raise DeltaError("the delta waits for the weights of this model already")

        def loaded(module: nn.Module, incompatible_keys: object) -> None:
            if not any(param.is_meta for param in module.parameters()):
                self._awaited.pop(module).remove()
                self.apply_(module, verify=verify)

        self._awaited[model] = model.register_load_state_dict_post_hook(loaded)

    def places(self, params: Mapping[str, Tensor]) -> list[Place]:
        """Where the changed entries lie in the parameters that :meth:`Base.find` found."""
        return [place_of(record, params[record.name]) for record in self._changed()]

    def _values(self, places: Sequence[Place]) -> list[Tensor]:
        return [place.of_them(place.record.values) for place in places]

    def _originals_at(self, model: Target, places: Sequence[Place]) -> list[Tensor]:
        """What stood at these places: in this very model if it is known, else in the base."""
        known = self._applied.get(model) if isinstance(model, nn.Module) else None
        if known is not None:
            pairs = zip(places, known, strict=True)
            return [values.to(place.tensor.device) for place, values in pairs]
        if self._originals is None:
            raise DeltaError(
                "the original values are not known here; revert_ with the SparseDelta that was "
                "applied, or save deltas with originals=True"
            )
        return [place.of_them(self._originals[place.record.name]) for place in places]

    def _require_base(self, params: Mapping[str, Tensor], places: Sequence[Place]) -> None:
        try:
            self.base.require(params)
        except DeltaError:
            if self._is_applied(places):
                raise DeltaError(_APPLIED) from None
            raise

    def _is_applied(self, places: Sequence[Place]) -> bool:
        pairs = zip(places, self._values(places), strict=True)
        return everywhere(all(place.holds(values) for place, values in pairs), places)


# Capturing ----------------------------------------------------------------------------------------


def _params_with_names(model: nn.Module) -> list[tuple[nn.Parameter, list[str]]]:
    """Every parameter once, with all its names, in model order."""
    names: dict[nn.Parameter, list[str]] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        names.setdefault(param, []).append(name)
    return list(names.items())


def _base_of(param: Tensor, name: str, base: Mapping[str, Tensor]) -> Tensor:
    """The base's tensor of that name, which must be of the parameter's kind."""
    if is_sharded(param) or param.is_meta:
        raise DeltaError(
            f"parameter {name!r} is {'on the meta device' if param.is_meta else 'sharded'}; "
            "capture a model that holds its whole weights"
        )
    if name not in base:
        raise DeltaError(
            f"the base has no parameter {name!r}{near_matches(name, base)}; give the model that "
            "fine-tuning started from"
        )
    original = base[name].detach()
    if param.shape != original.shape or param.dtype != original.dtype:
        raise DeltaError(
            f"parameter {name!r} is {param.dtype} {list(param.shape)} and in the base "
            f"{original.dtype} {list(original.shape)}; give the model that fine-tuning started "
            "from, in the same dtype"
        )
    if param.numel() and _same_memory(param, original):
        raise DeltaError(
            f"parameter {name!r} of the base is the model's own, so it was changed with it; give a "
            "copy made before training: copy.deepcopy(model.state_dict())"
        )
    return original


def _same_memory(a: Tensor, b: Tensor) -> bool:
    return a.device == b.device and a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def _indices(mask: CooMask, names: Sequence[str], param: Tensor) -> Tensor:
    """The selected entries of a parameter, under whichever of its names the mask has them."""
    for name in names:
        if name in mask:
            return mask[name]
    return torch.empty(0, dtype=index_dtype(param.numel()))


@torch.no_grad()
def _changes(name: str, param: Tensor, original: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """The values at the indices after and before fine-tuning; nothing else may differ."""
    if indices.numel():
        values = ops.gather(param, indices.to(param.device)).cpu()
        before = ops.gather(original, indices.to(original.device)).cpu()
        inside = int((~same_bits(values, before)).sum())
    else:
        values = before = torch.empty(0, dtype=param.dtype)
        inside = 0
    outside = count_different_bits(param, original) - inside
    if outside:
        raise DeltaError(
            f"parameter {name!r} differs from the base at {outside:,} entries outside the mask, "
            "which a delta would lose; was it trained without the mask, or is this another base?"
        )
    return values, before


def require_texts(metadata: Mapping[str, str] | None) -> dict[str, str]:
    """A copy of metadata.

    Raises:
        DeltaError: if they hold anything else than text.
    """
    texts = dict(metadata or {})
    if not all(isinstance(text, str) for item in texts.items() for text in item):
        raise DeltaError("metadata must map text to text; turn numbers into text first")
    return texts


def release() -> str:
    """What ``created_by`` says of this release."""
    import saft_kernels  # the package imports this module

    return f"saft-kernels {saft_kernels.__version__}"

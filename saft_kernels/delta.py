"""What fine-tuning changed: a small file that turns any copy of the base into the tuned model."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from saft_kernels import delta_file, ops
from saft_kernels.delta_file import DeltaContent, TensorRecord
from saft_kernels.errors import DeltaError
from saft_kernels.fingerprint import count_different_bits, fingerprints, same_bits
from saft_kernels.mask import CooMask, index_dtype, near_matches


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
        metadata: text that the maker of the delta wrote down about it.
        density: selected entries over the entries of all candidate parameters.
        created_by: the release that captured it.
    """

    def __init__(self, content: DeltaContent) -> None:
        self._records = content.records
        self.metadata: dict[str, str] = dict(content.metadata)
        self.density = content.density
        self.created_by = content.created_by
        # Those of the base that the fingerprints describe, and those of each model by itself, which
        # may differ from them if it was applied to without verification.
        self._originals: Mapping[str, Tensor] | None = content.originals
        self._applied: WeakKeyDictionary[nn.Module, Mapping[str, Tensor]] = WeakKeyDictionary()

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
        texts = dict(metadata or {})
        if not all(isinstance(text, str) for item in texts.items() for text in item):
            raise DeltaError("metadata must map text to text; turn numbers into text first")
        if isinstance(base, nn.Module):
            base = dict(base.named_parameters(remove_duplicate=False))
        params = _params_with_names(model)
        bases = [_base_of(param, names[0], base) for param, names in params]
        records, originals = [], {}
        for (param, (name, *tied)), before, fingerprint in zip(
            params, bases, fingerprints(bases), strict=True
        ):
            indices = _indices(mask, [name, *tied], param)
            values, originals[name] = _changes(name, param, before, indices)
            kind = (param.dtype, tuple(param.shape), fingerprint)
            records.append(TensorRecord(name, tuple(tied), *kind, indices, values))
        return cls(DeltaContent(tuple(records), texts, mask.density, _release(), originals))

    # What it holds ------------------------------------------------------------------------------

    def items(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """(parameter name, flat indices, new values) of every changed parameter, in model order."""
        for record in self._changed():
            yield record.name, record.indices, record.values

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every parameter of the base, by name."""
        return {record.name: record.shape for record in self._records}

    @property
    def nnz(self) -> int:
        """The number of entries it replaces."""
        return sum(record.indices.numel() for record in self._records)

    @property
    def nbytes(self) -> int:
        """The size of indices and values."""
        return sum(record.indices.nbytes + record.values.nbytes for record in self._records)

    def __repr__(self) -> str:
        """Its size."""
        changed = sum(1 for _ in self._changed())
        return (
            f"SparseDelta(nnz={self.nnz:,}, density={self.density:.3g}, "
            f"parameters={changed} of {len(self._records)}, nbytes={self.nbytes:,})"
        )

    def _changed(self) -> Iterator[TensorRecord]:
        return (record for record in self._records if record.indices.numel())

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
        if originals and self._originals is None:
            raise DeltaError("the original values are not known; apply the delta to its base first")
        stored = self._originals if originals else None
        delta_file.write(
            path,
            DeltaContent(self._records, self.metadata, self.density, self.created_by, stored),
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
    def apply_(self, model: nn.Module, *, verify: bool = True) -> None:
        """Turn a copy of the base into the fine-tuned model, in place: all of it or nothing.

        Parameters that the base did not have are left alone.

        Args:
            model: a model with the base's parameters, on any device.
            verify: compare the fingerprint of every parameter with the base's, which reads the
                whole model once. False checks names, shapes and dtypes only, for a model known to
                be the base.

        Raises:
            DeltaError: naming the parameter, if the model is not the base or the delta is applied
                already; the model is then as it was.
        """
        params = self._find(model)
        if verify:
            self._require_base(params)
        elif self._is_applied(params):
            raise DeltaError("the delta is applied to this model already; revert_ it first")
        originals = {r.name: ops.gather(params[r.name], _at(r, params)) for r in self._changed()}
        self._write(params, {r.name: r.values for r in self._changed()}, originals)
        originals = {name: values.cpu() for name, values in originals.items()}
        self._applied[model] = originals
        if verify:
            self._originals = originals

    @torch.no_grad()
    def revert_(self, model: nn.Module, *, verify: bool = True) -> None:
        """Turn the fine-tuned model back into the base, bit for bit: all of it or nothing.

        Args:
            model: a model that this delta was applied to or captured from; or any, if originals are
                in its file or it was applied to another copy of the base before.
            verify: make sure with the fingerprints that the result is the base.

        Raises:
            DeltaError: naming the parameter, if the model is not in the applied state, or the
                original values are not known; the model is then as it was.
        """
        params = self._find(model)
        originals = self._applied.get(model, self._originals)
        if originals is None:
            raise DeltaError(
                "the original values are not known here; revert_ with the SparseDelta that was "
                "applied, or save deltas with originals=True"
            )
        for record in self._changed():
            if not _holds(record, params):
                raise DeltaError(
                    f"the delta is not applied to this model: {record.name!r} has other values "
                    "than it wrote; load the base weights again instead"
                )
        values = {record.name: record.values for record in self._changed()}
        self._write(params, originals, values)
        differing = self._first_difference(params) if verify else None
        if differing is not None:
            self._write(params, values, originals)
            raise DeltaError(
                f"reverting would not give the base: {differing!r} was changed outside the delta's "
                "entries after it was applied; load the base weights again"
            )
        self._applied.pop(model, None)

    def _find(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The model's parameters that the records stand for; they must be of the same kind."""
        found = dict(model.named_parameters(remove_duplicate=False))
        owners: dict[nn.Parameter, str] = {}
        for record in self._records:
            param = found.get(record.name)
            if param is None:
                raise DeltaError(
                    f"the delta does not fit this model: it has no parameter {record.name!r}"
                    + near_matches(record.name, found)
                )
            _require_kind(record, param)
            for other in record.tied:
                if found.get(other, param) is not param:
                    raise DeltaError(
                        f"the delta does not fit this model: {record.name!r} and {other!r} are one "
                        "tied parameter in its base, and two here"
                    )
            if owners.setdefault(param, record.name) != record.name:
                raise DeltaError(
                    f"the delta does not fit this model: {owners[param]!r} and {record.name!r} are "
                    "two parameters in its base, and one tied here"
                )
        return {record.name: found[record.name] for record in self._records}

    def _first_difference(self, params: Mapping[str, Tensor]) -> str | None:
        """The first parameter whose fingerprint is not the base's."""
        prints = fingerprints([params[record.name] for record in self._records])
        for record, fingerprint in zip(self._records, prints, strict=True):
            if record.fingerprint != fingerprint:
                return record.name
        return None

    def _require_base(self, params: Mapping[str, Tensor]) -> None:
        differing = self._first_difference(params)
        if differing is None:
            return
        if self._is_applied(params):
            raise DeltaError("the delta is applied to this model already; revert_ it first")
        raise DeltaError(
            f"the model is not the base that the delta was made from: {differing!r} has other "
            "values; load the base weights first"
        )

    def _is_applied(self, params: Mapping[str, Tensor]) -> bool:
        return all(_holds(record, params) for record in self._changed())

    def _write(
        self, params: Mapping[str, Tensor], new: Mapping[str, Tensor], old: Mapping[str, Tensor]
    ) -> None:
        """Write ``new`` at the records' indices; on any error or interrupt put ``old`` back."""
        begun: list[TensorRecord] = []
        try:
            for record in self._changed():
                begun.append(record)
                _scatter(record, params, new)
        except BaseException:
            for record in begun:
                _scatter(record, params, old)
            raise


def _scatter(
    record: TensorRecord, params: Mapping[str, Tensor], values: Mapping[str, Tensor]
) -> None:
    param = params[record.name]
    ops.scatter_(param, _at(record, params), values[record.name].to(param.device))


def _at(record: TensorRecord, params: Mapping[str, Tensor]) -> Tensor:
    """The indices of a record, on the device of its parameter."""
    return record.indices.to(params[record.name].device)


def _holds(record: TensorRecord, params: Mapping[str, Tensor]) -> bool:
    """Whether the parameter has the delta's values, bit for bit."""
    now = ops.gather(params[record.name], _at(record, params)).cpu()
    return bool(same_bits(now, record.values).all())


def _require_kind(record: TensorRecord, param: Tensor) -> None:
    for what, wanted, found in (
        ("shape", list(record.shape), list(param.shape)),
        ("dtype", record.dtype, param.dtype),
    ):
        if wanted != found:
            hint = "; cast the model after applying" if what == "dtype" else ""
            raise DeltaError(
                f"the delta does not fit this model: parameter {record.name!r} has {what} {found}, "
                f"its base had {wanted}{hint}"
            )
    if param.device.type == "meta":
        raise DeltaError(f"parameter {record.name!r} is on the meta device; load its weights first")


# Capturing ----------------------------------------------------------------------------------------


def _params_with_names(model: nn.Module) -> list[tuple[nn.Parameter, list[str]]]:
    """Every parameter once, with all its names, in model order."""
    names: dict[nn.Parameter, list[str]] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        names.setdefault(param, []).append(name)
    return list(names.items())


def _base_of(param: Tensor, name: str, base: Mapping[str, Tensor]) -> Tensor:
    """The base's tensor of that name, which must be of the parameter's kind."""
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


def _release() -> str:
    import saft_kernels  # the package imports this module

    return f"saft-kernels {saft_kernels.__version__}"

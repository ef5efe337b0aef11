"""The model that a delta was made from, and how to recognise it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from saft_kernels.delta.file import TensorRecord
from saft_kernels.delta.places import Target, is_sharded, least_of_all, tensors_of, whole
from saft_kernels.errors import DeltaError
from saft_kernels.fingerprint import fingerprint, fingerprints
from saft_kernels.untrusted import near_matches


class Base:
    """The parameters of a base: names, which are tied, shapes, dtypes and fingerprints.

    Args:
        tensors: a record for every parameter; what a delta changes in it does not matter.
    """

    def __init__(self, tensors: Sequence[TensorRecord]) -> None:
        self._tensors = tensors

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every parameter, by name."""
        return {tensor.name: tensor.shape for tensor in self._tensors}

    @property
    def fingerprints(self) -> dict[str, str]:
        """The fingerprint of every parameter, by name."""
        return {tensor.name: tensor.fingerprint for tensor in self._tensors}

    def require_same(self, other: Base) -> None:
        """Make sure that another base is this one.

        Raises:
            DeltaError: naming a parameter in which they differ.
        """
        mine, theirs = self.fingerprints, other.fingerprints
        if mine == theirs:
            return
        differing = (name for name in {**mine, **theirs} if mine.get(name) != theirs.get(name))
        raise DeltaError(
            f"the deltas were made from different bases: {next(differing)!r} is not the same in "
            "both; use deltas of one pretrained model"
        )

    def find(self, target: Target, *, same_dtype: bool = True) -> dict[str, Tensor]:
        """The parameters of a model that stand for these; they must be of the same kind.

        Args:
            target: a model or its tensors by name.
            same_dtype: False allows every floating dtype for another.

        Returns:
            parameter name -> parameter, for all of the base; others are left out.

        Raises:
            DeltaError: naming the parameter, if one is missing, has another shape or dtype, or is
                tied where it was not, or not where it was.
        """
        found = tensors_of(target)
        owners: dict[Tensor, str] = {}
        for tensor in self._tensors:
            param = found.get(tensor.name)
            if param is None:
                raise DeltaError(
                    f"the delta does not fit this model: it has no parameter {tensor.name!r}"
                    + near_matches(tensor.name, found)
                )
            _require_kind(tensor, param, same_dtype=same_dtype)
            for other in tensor.tied:
                if found.get(other, param) is not param:
                    raise DeltaError(
                        f"the delta does not fit this model: {tensor.name!r} and {other!r} are one "
                        "tied parameter in its base, and two here"
                    )
            if owners.setdefault(param, tensor.name) != tensor.name:
                raise DeltaError(
                    f"the delta does not fit this model: {owners[param]!r} and {tensor.name!r} are "
                    "two parameters in its base, and one tied here"
                )
        return {tensor.name: found[tensor.name] for tensor in self._tensors}

    def require(self, params: Mapping[str, Tensor]) -> None:
        """Make sure that parameters are the base's, by their fingerprints.

        Raises:
            DeltaError: naming the first one that is not.
        """
        differing = self.first_difference(params)
        if differing is not None:
            raise DeltaError(
                f"the model is not the base that the delta was made from: {differing!r} has other "
                "values; load the base weights first"
            )

    def first_difference(self, params: Mapping[str, Tensor]) -> str | None:
        """The first parameter whose fingerprint is not the base's; None if all are the base's.

        If parameters are sharded, it is the first one of which any process says so.
        """
        tensors = [params[tensor.name] for tensor in self._tensors]
        if any(map(is_sharded, tensors)):  # collected one at a time: there may be no room for all
            found = [fingerprint(whole(tensor)) for tensor in tensors]
        else:
            found = fingerprints(tensors)
        differing = [
            its != tensor.fingerprint for tensor, its in zip(self._tensors, found, strict=True)
        ]
        first = least_of_all([*differing, True].index(True), tensors)
        return None if first == len(tensors) else self._tensors[first].name


def _require_kind(tensor: TensorRecord, param: Tensor, *, same_dtype: bool) -> None:
    shape = list(param.shape)
    if list(tensor.shape) != shape:
        raise DeltaError(
            f"the delta does not fit this model: parameter {tensor.name!r} has shape {shape}, its "
            f"base had {list(tensor.shape)}"
        )
    if tensor.dtype == param.dtype:
        return
    if same_dtype or not (tensor.dtype.is_floating_point and param.is_floating_point()):
        raise DeltaError(
            f"the delta does not fit this model: parameter {tensor.name!r} has dtype "
            f"{param.dtype}, its base had {tensor.dtype}; cast the model after applying, or apply "
            "with verify=False to a cast copy of the base, which cannot be recognised"
        )

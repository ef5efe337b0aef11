"""How the selected entries of a layer's weight and bias are laid out for the sampled gradient.

Plans are made once per layer and hold every index vector of a step. A vector made in the step would
be new to :mod:`saft_kernels.index_values`, and on a GPU its check would wait for all work before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LinearPlan:
    """The selected entries of ``y = x @ W.T + b``, row by row, made once per layer.

    The bias counts as one more column of W, numbered ``in_features``, whose input is one.

    Attributes:
        columns: int32 [C], the columns of x that some entry uses, ascending.
        rows: int32 [R], the rows of W that hold an entry, ascending.
        offsets: int32 [R + 1]: row j holds entries ``offsets[j]`` to ``offsets[j + 1]``.
        entry_columns: int32 [n], for every entry the place of its column in ``columns``.
        places: int32 [n], the entry of every selected value: those of W in the order of their flat
            indices, then those of b. None if that is the entries' own order.
    """

    columns: Tensor
    rows: Tensor
    offsets: Tensor
    entry_columns: Tensor
    places: Tensor | None

    @classmethod
    def of(
        cls,
        in_features: int,
        weight: Tensor | None,
        bias: Tensor | None = None,
        *,
        out_features: int | None = None,
    ) -> LinearPlan:
        """Plan a layer.

        Args:
            in_features: I, the number of columns of x.
            weight: flat indices of the selected entries of W, ascending; None if there are none.
            bias: the same of b.
            out_features: O, if W is stored as [I, O], as GPT-2's ``Conv1D`` and ``x @ W`` have it;
                None if it is stored as [O, I].
        """
        pieces = []
        if weight is not None:
            flat = weight.long()
            if out_features is None:
                pieces.append((flat // in_features, flat % in_features))
            else:
                pieces.append((flat % out_features, flat // out_features))
        if bias is not None:
            pieces.append((bias.long(), torch.full_like(bias, in_features, dtype=torch.int64)))
        row, column = (torch.cat(parts) for parts in zip(*pieces, strict=True))
        order = (row * (in_features + 1) + column).argsort()
        columns, column_places = column.unique(return_inverse=True)
        rows, counts = row[order].unique_consecutive(return_counts=True)
        offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        entry_columns = column_places[order]
        return cls(columns.int(), rows.int(), offsets.int(), entry_columns.int(), _places(order))

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """All of it, in the order above."""
        return self.columns, self.rows, self.offsets, self.entry_columns, self.places


@dataclass(frozen=True)
class Conv2dPlan:
    """The selected entries of a 2-d convolution, the product of a weight with unfolded inputs.

    Attributes:
        linear: that product's plan; its columns count (channel, kernel row, kernel column).
        window: int64 [3, K], these three of every used column; the bias has none.
        unfolded: int32 [C], 0, 1, 2 ...: where the columns are once only they are unfolded.
        copied: int32 [R], the same for the rows.
    """

    linear: LinearPlan
    window: Tensor
    unfolded: Tensor
    copied: Tensor

    @classmethod
    def of(
        cls, weight_shape: Sequence[int], weight: Tensor | None, bias: Tensor | None = None
    ) -> Conv2dPlan:
        """Plan a layer.

        Args:
            weight_shape: [O, C, KH, KW].
            weight: flat indices of the selected entries of the weight, ascending; None if there are
                none.
            bias: the same of the bias.
        """
        _, channels, kh, kw = weight_shape
        linear = LinearPlan.of(channels * kh * kw, weight, bias)
        columns = linear.columns.long()
        inner = columns if bias is None else columns[:-1]
        window = torch.stack([inner // (kh * kw), inner // kw % kh, inner % kw])
        return cls(linear, window, _count(linear.columns), _count(linear.rows))

    def tensors(self) -> tuple[Tensor | None, ...]:
        """All of it but the columns, in the order above."""
        return self.window, self.unfolded, self.copied, *self.linear.tensors()[1:]


@dataclass(frozen=True)
class EmbeddingPlan:
    """The selected entries of an embedding, row by row.

    Attributes:
        rows: int32 [R], the tokens that have an entry, ascending.
        offsets: int32 [R + 1]: row j holds entries ``offsets[j]`` to ``offsets[j + 1]``.
        columns: int32 [n], of every entry.
    """

    rows: Tensor
    offsets: Tensor
    columns: Tensor

    @classmethod
    def of(cls, width: int, weight: Tensor) -> EmbeddingPlan:
        """Plan an embedding.

        Args:
            width: E, the number of columns of the weight.
            weight: flat indices of its selected entries, ascending.
        """
        rows, counts = (weight.long() // width).unique_consecutive(return_counts=True)
        offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        return cls(rows.int(), offsets.int(), (weight.long() % width).int())

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """All of it, in the order above."""
        return self.rows, self.offsets, self.columns


def _count(vector: Tensor) -> Tensor:
    return torch.arange(vector.numel(), dtype=torch.int32, device=vector.device)


def _places(order: Tensor) -> Tensor | None:
    """The inverse of a permutation, None for the identity."""
    inverse = torch.arange(order.numel(), device=order.device)
    if torch.equal(order, inverse):
        return None
    return torch.empty_like(order).index_copy_(0, order, inverse).int()

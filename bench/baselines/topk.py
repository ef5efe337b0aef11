"""Global selection in plain torch: concatenate all magnitudes, then ``torch.topk``."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate

import torch
from torch import Tensor


def concatenated(mean: Mapping[str, Tensor]) -> Tensor:
    """|mean| of all parameters as one vector."""
    return torch.cat([tensor.view(-1) for tensor in mean.values()]).abs_()


def topk(magnitude: Tensor, mean: Mapping[str, Tensor], k: int) -> dict[str, Tensor]:
    """The k largest of ``magnitude = concatenated(mean)``.

    Returns:
        Name -> sorted flat indices, int32, for every parameter with any.
    """
    return split(magnitude.topk(k, sorted=False).indices, mean)


def split(positions: Tensor, mean: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Indices per parameter from positions in the concatenated vector, in any order."""
    positions = positions.sort().values
    begins = [0, *accumulate(tensor.numel() for tensor in mean.values())]
    cuts = torch.searchsorted(positions, torch.tensor(begins, device=positions.device)).tolist()
    pieces = {
        name: (positions[low:high] - begin).int()
        for name, begin, low, high in zip(mean, begins, cuts, cuts[1:], strict=False)
    }
    return {name: piece for name, piece in pieces.items() if piece.numel()}

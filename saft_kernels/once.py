"""What was found out about a tensor's values, kept for as long as they stay what they are.

Looking at values makes the host wait for a GPU; what a training step needs to know of its index
vectors, plans and prompts is the same in every step.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

Found = TypeVar("Found")

#: Tensors (those that views are of) -> version, and what was found out about it.
_kept: WeakIdKeyDictionary = WeakIdKeyDictionary()


def once(tensor: Tensor, what: Hashable, find: Callable[[], Found]) -> Found:
    """Find something out about a tensor, once for as long as it lives and nobody writes to it.

    Not kept in inference mode, whose tensors have no version, nor in compiled code.

    Args:
        tensor: what it is about; views of one memory in one place and dtype count as the same.
        what: is found out; may hold whatever else the answer depends on.
        find: looks at the tensor.

    Returns:
        What ``find`` returned, now or before.
    """
    place = tensor.storage_offset(), tensor.shape, tensor.stride()
    return once_of_memory(tensor, (what, *place), find)


def once_of_memory(tensor: Tensor, what: Hashable, find: Callable[[], Found]) -> Found:
    """The same about all memory that a tensor is a view of, read in its dtype."""
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled() or tensor.is_inference():
        return find()
    whole = tensor if tensor._base is None else tensor._base
    version, found = _kept.get(whole, (None, {}))
    if version != tensor._version:
        found = {}
        _kept[whole] = tensor._version, found
    key = what, tensor.dtype
    if key not in found:
        found[key] = find()
    result: Found = found[key]
    return result

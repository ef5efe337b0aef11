"""What a batch is made of: counting its examples, and cutting it into them.

A batch is a tensor, or mappings, lists, tuples, named tuples and dataclasses of batches, nested as
you like; anything else in it is passed on as it is.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from typing import Any, TypeVar

from torch import Tensor

from saft_kernels.errors import SelectionError

T = TypeVar("T")


def with_last(items: Iterable[T]) -> Iterator[tuple[T, bool]]:
    """Each item and whether it is the last one; looks one item ahead."""
    iterator = iter(items)
    try:
        current = next(iterator)
    except StopIteration:
        return
    for following in iterator:
        yield current, False
        current = following
    yield current, True


def count_examples(batch: Any) -> int:
    """The leading dimension of the first tensor of a batch; 1 if there is none."""
    for tensor in _tensors(batch):
        return tensor.shape[0] if tensor.dim() else 1
    return 1


def split_examples(batch: Any, count: int) -> Iterator[Any]:
    """The examples of a batch, each as a batch of one that shares the memory of the original.

    Cut are the tensors whose leading dimension is ``count``, and lists of that length that hold no
    tensors and no containers (captions, for instance). Everything else goes to every example whole.

    Args:
        batch: any structure of tensors (see the module).
        count: its number of examples.

    Raises:
        SelectionError: if no tensor has a leading dimension of ``count``.
    """
    if count == 1:
        yield batch
        return
    if not any(tensor.dim() and tensor.shape[0] == count for tensor in _tensors(batch)):
        raise SelectionError(
            f"a batch of {count} examples cannot be cut into them: none of its tensors has a "
            f"leading dimension of {count}; give batches of tensors, or batches of one example"
        )
    for index in range(count):
        yield _example(batch, count, index)


def _tensors(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    else:
        for child in _children(batch):
            yield from _tensors(child)


def _children(batch: Any) -> list[Any]:
    if isinstance(batch, Mapping):
        return list(batch.values())
    if isinstance(batch, (list, tuple)):
        return list(batch)
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        return [getattr(batch, field.name) for field in dataclasses.fields(batch)]
    return []


def _example(batch: Any, count: int, index: int) -> Any:
    if isinstance(batch, Tensor):
        return batch[index : index + 1] if batch.dim() and batch.shape[0] == count else batch
    if isinstance(batch, list) and len(batch) == count and not any(map(_is_node, batch)):
        return batch[index : index + 1]
    children = [_example(child, count, index) for child in _children(batch)]
    return _rebuild(batch, children)


def _is_node(item: Any) -> bool:
    return isinstance(item, Tensor) or bool(_children(item))


def _rebuild(batch: Any, children: list[Any]) -> Any:
    """A structure like ``batch`` with other children."""
    if isinstance(batch, Mapping):
        changed = copy.copy(batch) if isinstance(batch, MutableMapping) else dict(batch)
        changed.update(zip(batch.keys(), children, strict=True))
        return changed
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*children)
    if isinstance(batch, (list, tuple)):
        return type(batch)(children)
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        names = (field.name for field in dataclasses.fields(batch))
        return dataclasses.replace(batch, **dict(zip(names, children, strict=True)))
    return batch

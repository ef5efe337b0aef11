"""What a mutation asks for: integers, and what is made of them.

The same mutations are driven by a seed (a long run) and by hypothesis (``test_fuzz.py``, which
makes a failing input smaller).
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TypeVar

Item = TypeVar("Item")


class Choices(ABC):
    """Decides everything that is left open."""

    @abstractmethod
    def integer(self, low: int, high: int) -> int:
        """An integer from ``low`` to ``high``, both included."""

    def pick(self, items: Sequence[Item]) -> Item:
        """One of the items."""
        return items[self.integer(0, len(items) - 1)]

    def one_in(self, count: int) -> bool:
        """True once in ``count`` times."""
        return self.integer(1, count) == count

    def data(self, size: int) -> bytes:
        """So many bytes."""
        return bytes(self.integer(0, 255) for _ in range(size))


class Seeded(Choices):
    """The same choices for the same seed."""

    def __init__(self, seed: str) -> None:
        self._random = random.Random(seed)

    def integer(self, low: int, high: int) -> int:
        """An integer from ``low`` to ``high``, both included."""
        return self._random.randint(low, high)

    def data(self, size: int) -> bytes:
        """So many bytes."""
        return self._random.randbytes(size)

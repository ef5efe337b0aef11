"""What a target is, and what those of safetensors files have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import ClassVar

from fuzz import mutations
from fuzz.choices import Choices
from fuzz.containers import Container, assemble, parse
from fuzz.trees import IMPROPER

#: One file in so many is large: what grows faster than the file shows only there.
_BLOATED = 150


class Target(ABC):
    """One kind of file: valid ones, how others are made of them, and what must hold of any.

    Attributes:
        name: for the command line.
        suffix: of its files.
        weight: how many of all inputs are its, in relation to the other targets.
        seconds: of the processor, that reading may take besides what grows with the file.
        memory: bytes, likewise.
        per_byte: how many bytes reading may take for each byte of the file.
    """

    name: ClassVar[str]
    suffix: ClassVar[str] = ".safetensors"
    weight: ClassVar[int] = 20
    seconds: ClassVar[float] = 1.0
    memory: ClassVar[int] = 8 << 20
    per_byte: ClassVar[int] = 24

    @cached_property
    def seeds(self) -> list[bytes]:
        """Valid files."""
        return self.make_seeds()

    @abstractmethod
    def make_seeds(self) -> list[bytes]:
        """Valid files, the same ones each time."""

    @abstractmethod
    def mutate(self, choices: Choices, content: bytes) -> bytes:
        """Another file, made of a valid one."""

    @abstractmethod
    def read(self, path: Path) -> str:
        """Read a file as the application does, and do with it what can be done.

        Returns:
            ``accepted``, or the name of the error with which it was refused.

        Raises:
            Finding: if something does not hold.
            Exception: of any other kind, which is a finding as well.
        """

    def repair(self, content: bytes) -> bytes:
        """The same file with a checksum that is right again, where it has one."""
        return content

    def generate(self, choices: Choices) -> bytes:
        """An input."""
        return self.mutate(choices, choices.pick(self.seeds))


class SafetensorsTarget(Target):
    """A target whose files are safetensors files."""

    def mutate(self, choices: Choices, content: bytes) -> bytes:
        """Change texts, tensors or both, then mostly put the checksum right."""
        if choices.one_in(10):
            return mutations.change_bytes(choices, content)
        container = parse(content)
        for _ in range(choices.integer(0, 3)):
            self.change(choices, container)
        if choices.one_in(_BLOATED):
            mutations.bloat(choices, container, choices.pick([1 << 16, 1 << 18, 1 << 20]))
        if not choices.one_in(8):
            with suppress(*IMPROPER):
                self.seal(container)
        return mutations.write(choices, container)

    def change(self, choices: Choices, container: Container) -> None:
        """Change one thing in the parts of a file."""
        if choices.one_in(5):
            mutations.change_texts(choices, container)
        else:
            mutations.change_tensors(choices, container)

    @abstractmethod
    def seal(self, container: Container) -> None:
        """Put the checksum right: whoever makes a hostile file can do so, too.

        Raises:
            Exception: one of ``IMPROPER``, if there is no right one.
        """

    def repair(self, content: bytes) -> bytes:
        """The same file with a checksum that is right; as it is, if it cannot be taken apart."""
        try:
            container = parse(content)
            self.seal(container)
            return assemble(container)
        except IMPROPER:
            return content

"""BitFit: biases, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import nn

from saft_clip.errors import ConfigError
from saft_clip.methods.base import about
from saft_clip.methods.dense import Dense
from saft_kernels.delta import extract


class BitFit(Dense):
    """All bias vectors of both encoders, those of normalisation layers too (Ben Zaken et al. 2022).

    The result is a delta: biases are a thousandth of a transformer.
    """

    name = "bitfit"
    artefact = "delta.safetensors"

    def trainable(self) -> dict[str, nn.Parameter]:
        """Every parameter that is called a bias.

        Raises:
            ConfigError: if the model has none.
        """
        biases = {n: p for n, p in self.encoder_parameters().items() if n.endswith("bias")}
        if not biases:
            raise ConfigError(f"{self.clip.name} has no biases for --method bitfit to train")
        return biases

    def export(self, folder: Path, base: Callable[[], nn.Module]) -> Path:
        """Write the delta."""
        path = folder / self.artefact
        extract(self.model, base(), metadata=about(self)).delta.save(path)
        return path

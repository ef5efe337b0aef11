"""WiSE-FT: the average of the pretrained and the fine-tuned weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor, nn

from saft_clip.batches import Batches
from saft_clip.methods.head import HEAD, WithHead


class WiseFt(WithHead):
    """Fine-tunes image encoder and classifier end to end, then averages (Wortsman et al. 2022).

    The result is ``(1 - alpha) * pretrained + alpha * fine-tuned`` of every trained tensor, head
    included (their Eq. 1 and Section 3, "weight-space ensembling"); ``--alpha`` is 0.5 by default,
    as they advise where nothing is known of the shift.
    """

    name = "wise-ft"

    def trainable(self) -> dict[str, nn.Parameter]:
        """Image encoder and head."""
        return {**self.image_parameters(), HEAD: self.head}

    def prepare(self, batches: Batches, folder: Path | None) -> None:
        """Keep the head that training starts from."""
        super().prepare(batches, folder)
        self._first_head = self.head.detach().clone()

    def starting_values(self, base: Callable[[], nn.Module]) -> Mapping[str, Tensor]:
        """The head that was made of the class embeddings, too."""
        return {**super().starting_values(base), HEAD: self._first_head}

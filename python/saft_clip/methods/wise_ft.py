"""WiSE-FT: the average of the pretrained and the fine-tuned weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

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

    def way(self, base: Callable[[], nn.Module]) -> Callable[[float], None]:
        """Averages of all that is trained."""
        first = {**dict(base().named_parameters()), HEAD: self._first_head}
        ends = {
            name: (param, first[name].to(param), param.detach().clone())
            for name, param in self.params.items()
        }

        @torch.no_grad()
        def go(alpha: float) -> None:
            for param, before, after in ends.values():
                param.copy_(torch.lerp(before, after, alpha))

        return go

    def finish(self, base: Callable[[], nn.Module]) -> None:
        """Average."""
        assert self.config.alpha is not None
        self.way(base)(self.config.alpha)

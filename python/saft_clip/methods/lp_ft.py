"""LP-FT: a linear probe first, so that fine-tuning need not bend the features to a poor head."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from saft_clip.batches import Batches
from saft_clip.console import progress
from saft_clip.errors import CheckpointError
from saft_clip.methods.head import HEAD, WithHead
from saft_clip.models import autocast
from saft_clip.run_folder import PROBE
from saft_clip.schedule import learning_rate
from saft_kernels.files import atomic_write
from saft_kernels.untrusted import open_safetensors


class LpFt(WithHead):
    """Trains the head on fixed features, then image encoder and head (Kumar et al. 2022, Sec. 3.4).

    The probe takes ``--probe-epochs`` passes of AdamW with ``--probe-lr`` over the features of the
    training images, without augmentation; the run's steps are those of fine-tuning.
    """

    name = "lp-ft"

    def trainable(self) -> dict[str, nn.Parameter]:
        """Image encoder and head."""
        return {**self.image_parameters(), HEAD: self.head}

    def start_head(self, batches: Batches, folder: Path | None) -> None:
        """Train the probe, or take the one that the run has trained already."""
        super().start_head(batches, folder)
        file = folder / PROBE if folder else None
        if file is not None and file.exists():
            self._load_probe(file)
        else:
            self._train_probe(*self._features(batches))
            if file is not None:
                with atomic_write(file) as temporary:
                    save_file({HEAD: self.head.detach().cpu()}, temporary)

    def _load_probe(self, file: Path) -> None:
        try:
            with open_safetensors(file) as opened:
                found = opened.get_tensor(HEAD)
            fits = (found.dtype, found.shape) == (torch.float32, self.head.shape)
        except (SafetensorError, OSError, ValueError):
            fits = False
        if not fits:
            raise CheckpointError(f"{file} is no probe of this run: delete it, to train it anew")
        self.head.data.copy_(found)

    @torch.no_grad()
    def _features(self, batches: Batches) -> tuple[Tensor, Tensor]:
        self.model.eval()
        features, labels = [], []
        with progress("image features", len(batches), unit="batches") as advance:
            for images, truth in batches:
                with autocast(self.config.precision, self.device):
                    features.append(self.image_features(images))
                labels.append(truth)
                advance()
        return torch.cat(features), torch.cat(labels).to(self.device)

    def _train_probe(self, features: Tensor, labels: Tensor) -> None:
        """Minimise the mean cross-entropy over batches in random order."""
        config = self.config
        assert config.probe_epochs is not None
        assert config.probe_lr is not None
        generator = torch.Generator().manual_seed(config.seed)
        optimizer = torch.optim.AdamW([self.head], weight_decay=config.wd)
        size = min(config.batch_size, len(labels))
        steps = config.probe_epochs * -(-len(labels) // size)
        done = 0
        for _ in range(config.probe_epochs):
            for chosen in torch.randperm(len(labels), generator=generator).split(size):
                chosen = chosen.to(self.device)
                optimizer.param_groups[0]["lr"] = learning_rate(done, steps, config.probe_lr)
                optimizer.zero_grad()
                F.cross_entropy(self.logits(features[chosen]), labels[chosen]).backward()
                optimizer.step()
                done += 1
        self.head.grad = None

"""The built-in image domains as data sets."""

from __future__ import annotations

from saft_clip.data.listing import SPLITS, Layout, Listing
from saft_clip.domains import domain_splits, load_domain


class Builtin(Layout):
    """One of :data:`saft_clip.domains.DOMAINS`.

    Args:
        name: of the domain.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    @property
    def kind(self) -> str:
        """A built-in domain."""
        return "built-in domain"

    def splits(self) -> tuple[str, ...]:
        """Its splits but the one for pretraining."""
        own = domain_splits(self.name)
        return tuple(split for split in SPLITS if split in own)

    def listing(self, split: str) -> Listing:
        """Its images, in memory."""
        domain = load_domain(self.name, split)
        return Listing(
            domain.name,
            list(domain.images.permute(0, 2, 3, 1).numpy()),
            domain.labels.tolist(),
            domain.class_names,
            domain.templates,
        )

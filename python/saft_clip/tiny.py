"""The built-in tiny CLIP, ``saft-tiny``: a stand-in that lets anyone run everything offline.

It is a real open_clip model (a ViT image tower, a text tower with CLIP's own tokenizer) of four
million parameters, three quarters of them the token embedding. It knows digits and capital letters
in many styles and nothing else. :mod:`saft_clip.pretrain_tiny` rebuilds its weights.
"""

from __future__ import annotations

import functools
from pathlib import Path

ASSETS = Path(__file__).parent / "assets"
TINY_NAME = "saft-tiny"
TINY_WEIGHTS: Path = ASSETS / "saft-tiny.safetensors"
TINY_CARD: Path = ASSETS / "saft-tiny-card.json"

#: Models of other sizes, for studies of size; without weights, which
#: :mod:`saft_clip.pretrain_tiny` makes.
OTHER_SIZES = ("saft-tiny-small", "saft-tiny-large")


@functools.cache
def register_tiny() -> None:
    """Make ``saft-tiny`` and its siblings model names of open_clip. Idempotent."""
    import open_clip

    for name in (TINY_NAME, *OTHER_SIZES):
        open_clip.add_model_config(ASSETS / f"{name}.json")

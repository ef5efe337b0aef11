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
TINY_CONFIG: Path = ASSETS / "saft-tiny.json"
TINY_WEIGHTS: Path = ASSETS / "saft-tiny.safetensors"
TINY_CARD: Path = ASSETS / "saft-tiny-card.json"


@functools.cache
def register_tiny() -> None:
    """Make ``saft-tiny`` a model name of open_clip, for factories and tokenizer. Idempotent."""
    import open_clip

    open_clip.add_model_config(TINY_CONFIG)

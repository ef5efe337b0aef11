"""Everything that is read back from a file, each a target of its own."""

from __future__ import annotations

from fuzz.targets.base import Target

__all__ = ["Target", "all_targets"]


def all_targets() -> dict[str, Target]:
    """Every target by its name; made when it is asked for, as it imports the whole application."""
    from fuzz.targets.adapter import AdapterTarget
    from fuzz.targets.checkpoint import CheckpointTarget
    from fuzz.targets.delta import DeltaTarget
    from fuzz.targets.mask import MaskTarget
    from fuzz.targets.run_folder import run_folder_targets
    from fuzz.targets.weights import ExtractTarget, WeightsTarget

    tensors = (DeltaTarget(), MaskTarget(), CheckpointTarget(), AdapterTarget())
    foreign = (WeightsTarget(), ExtractTarget())
    made = (*tensors, *foreign, *run_folder_targets())
    return {target.name: target for target in made}

"""What a checkpoint says of its run, checked before any of it is believed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from saft_clip.config import FinetuneConfig
from saft_clip.errors import CheckpointError
from saft_clip.methods.base import Method
from saft_clip.random_states import check_random_states, set_random_states
from saft_kernels.errors import SaftError


@dataclass(frozen=True)
class RunState:
    """The state of a run between two steps.

    Attributes:
        step: optimizer steps taken.
        metrics: bytes of the record that belong to it.
        method: trained values and optimizer state.
        random: states of the random generators.
        seconds: what took how long.
        config: the run's settings.
        inputs: fingerprints of what it reads.
        source: the file that this was read from, for messages.
    """

    step: int
    metrics: int
    method: Mapping[str, Any]
    random: Mapping[str, Any]
    seconds: dict[str, float]
    config: FinetuneConfig
    inputs: Any
    source: str

    @classmethod
    def of(cls, state: Any, source: str) -> RunState:
        """What :meth:`saft_clip.train.Run` saved, as it was read from a file.

        Raises:
            CheckpointError: if it is something else.
            ConfigError: if there is a setting in it that this release does not know.
        """
        names = ("step", "metrics", "method", "random", "seconds", "inputs")
        if not isinstance(state, dict) or not {*names, "config"} <= state.keys():
            raise CheckpointError(f"{source} is broken: it is no checkpoint of a run")
        fields = {name: state[name] for name in names}
        sound = (
            all(type(fields[name]) is int and 0 <= fields[name] < 1 << 62 for name in names[:2])
            and all(isinstance(fields[name], dict) for name in names[2:])
            and fields["seconds"].keys() == {"preparation", "training"}
            and all(map(_is_duration, fields["seconds"].values()))
        )
        if not sound:
            raise CheckpointError(f"{source} is broken: what it says of its run is impossible")
        return cls(
            **fields, config=FinetuneConfig.from_dict(state["config"], source), source=source
        )

    def restore(self, method: Method) -> None:
        """Put a prepared method and the random generators into this state: all of it or nothing.

        Raises:
            CheckpointError: if the state is of another run or model, or broken.
        """
        try:
            check_random_states(self.random, method.device)
            method.load_state_dict(self.method)
        except (SaftError, ValueError) as error:
            raise CheckpointError(f"{self.source} cannot be continued from: {error}") from error
        set_random_states(self.random, method.device)


def _is_duration(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and value >= 0

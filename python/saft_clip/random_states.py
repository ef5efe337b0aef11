"""The states of the random generators that a run draws from, saved and put back."""

from __future__ import annotations

import random
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

#: Words of a Mersenne twister.
_WORDS = 624


def random_states(device: torch.device) -> dict[str, Any]:
    """The states of all random generators: Python's, numpy's, torch's, and the CUDA device's."""
    state: Any = np.random.get_state(legacy=True)
    name, keys, *rest = state
    states = {
        "python": random.getstate(),
        "numpy": (name, keys.tolist(), *rest),
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_random_states(states: Mapping[str, Any], device: torch.device) -> None:
    """The inverse of :func:`random_states`, for states that :func:`check_random_states` passes."""
    random.setstate(states["python"])
    np.random.set_state(_numpy_state(states["numpy"]))
    torch.set_rng_state(states["torch"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)


def check_random_states(states: Any, device: torch.device) -> None:
    """Make sure that states of unknown origin can be set; nothing is changed.

    Raises:
        ValueError: if they are not what :func:`random_states` gives.
    """
    malformed = "the states of the random generators are malformed"
    try:
        sound = _python_is_sound(states["python"]) and _numpy_is_sound(states["numpy"])
        sound = sound and _torch_is_sound(states["torch"])
        if device.type == "cuda":
            torch.Generator(device).set_state(states["cuda"])
    except (TypeError, ValueError, LookupError, RuntimeError, OverflowError, struct.error) as error:
        raise ValueError(malformed) from error
    if not sound:
        raise ValueError(malformed)


# Each is set in a generator of its own, which must then say that this is its state.


def _python_is_sound(state: Any) -> bool:
    generator = random.Random()
    generator.setstate(state)
    same = repr(generator.getstate()) == repr(state)  # True would equal 1
    return same and isinstance(state[2], float | None)


def _numpy_is_sound(state: Any) -> bool:
    """numpy takes any position, and later reads there, wherever that is."""
    generator = np.random.RandomState()
    generator.set_state(_numpy_state(state))
    found: Any = generator.get_state(legacy=True)
    name, keys, position, *_ = found
    same = repr((name, keys.tolist(), *found[2:])) == repr(tuple(state))
    return same and 0 <= position <= _WORDS


def _torch_is_sound(state: Any) -> bool:
    """torch looks at either of two counters, which together could lead it beyond its state."""
    generator = torch.Generator()
    generator.set_state(state)
    _, left, _, position = struct.unpack("<QiiQ", state.numpy().tobytes()[:24])
    counters = left == 1 or left + position == _WORDS + 1
    return counters and torch.equal(generator.get_state(), state)


def _numpy_state(state: Any) -> Any:
    name, keys, *rest = state
    return (name, np.array(keys, dtype=np.uint32), *rest)

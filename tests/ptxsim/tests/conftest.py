"""Test configuration: every race detector is on."""

from __future__ import annotations

import numpy as np
import pytest

import ptxsim


@pytest.fixture(autouse=True)
def detect_races(monkeypatch: pytest.MonkeyPatch) -> None:
    for option in ("races", "shared_races", "block_races"):
        monkeypatch.setattr(ptxsim.defaults, option, True)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)

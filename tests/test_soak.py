"""The soak's own logic, and some of its cycles; the documented run takes an hour."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from saft_kernels import ops
from soak import cycle
from soak.__main__ import grown
from soak.cycle import Setting, run_cycle

TESTS = Path(__file__).parent

#: Short ones, which between them have all modes and dtypes.
SEEDS = (10, 44, 97)


@pytest.mark.parametrize("seed", SEEDS)
def test_cycles(seed: int, tmp_path: Path) -> None:
    done: Counter[str] = Counter()
    run_cycle(Setting.drawn(seed), tmp_path, done)
    assert done["interrupted runs equal bit for bit"] == done["deltas"] == 1


def test_seeds_have_all_modes_and_dtypes() -> None:
    settings = [Setting.drawn(seed) for seed in SEEDS]
    assert {each.mode for each in settings} == set(cycle.MODES)
    assert {each.dtype for each in settings} == set(cycle.DTYPES)
    assert settings == [Setting.drawn(seed) for seed in SEEDS]


def test_a_wrong_resume_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that loses the moments."""

    def forgetful(self: cycle.Run, step: int) -> None:
        if step == 2:
            self.optimizer.detach()
            self.optimizer = self.attached()

    monkeypatch.setattr(cycle, "INTERRUPTIONS", ("detach",))
    monkeypatch.setattr(cycle.Run, "detach", forgetful)
    with pytest.raises(AssertionError, match="interrupted"):
        run_cycle(Setting.drawn(SEEDS[0]), tmp_path, Counter())


def test_a_write_outside_the_mask_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish = cycle.Run.finish

    def careless(self: cycle.Run) -> torch.nn.Module:
        model = finish(self)
        with torch.no_grad():
            model.get_parameter("head.weight").neg_()
        return model

    monkeypatch.setattr(cycle.Run, "finish", careless)
    with pytest.raises(AssertionError, match=r"head\.weight"):
        run_cycle(Setting.drawn(SEEDS[0]), tmp_path, Counter())


def test_a_wrong_delta_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = ops.decode_indices

    def off_by_one(code: torch.Tensor, count: int, numel: int) -> torch.Tensor:
        found = right(code, count, numel)
        return torch.cat([found[:-1], found[-1:] - 1]) if 1 < count < numel else found

    monkeypatch.setattr(ops, "decode_indices", off_by_one)
    with pytest.raises((AssertionError, RuntimeError)):
        run_cycle(Setting.drawn(SEEDS[0]), tmp_path, Counter())


def test_memory_that_grows_is_noticed() -> None:
    flat = [300.0 + 5 * (i % 3) for i in range(60)]
    assert abs(grown(flat)) <= 5
    assert grown([300.0 + i for i in range(60)]) > 40


def test_command(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])}
    command = [sys.executable, "-m", "soak", "--only", str(SEEDS[0])]
    done = subprocess.run(
        command, cwd=TESTS, env=environment, capture_output=True, text=True, check=True
    )
    assert '"cycles": 1' in done.stdout

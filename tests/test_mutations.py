"""The planted faults (tests/mutations): the list is up to date, and its last run caught all."""

from __future__ import annotations

import json

import pytest

from mutations.__main__ import RESULT
from mutations.faults import FAULTS, ROOT


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_the_fault_can_be_planted(fault):
    assert (ROOT / fault.file).read_text().count(fault.right) == 1
    assert fault.right != fault.wrong
    assert (ROOT / fault.tests).is_file()


def test_names_are_unique():
    names = [(fault.file, fault.name) for fault in FAULTS]
    assert len(set(names)) == len(names)


def test_the_last_run_caught_every_fault():
    outcome = {(entry["file"], entry["fault"]): entry for entry in json.loads(RESULT.read_text())}
    assert set(outcome) == {(fault.file, fault.name) for fault in FAULTS}
    assert [entry for entry in outcome.values() if not entry["caught"]] == []

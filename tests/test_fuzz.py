"""Hostile and broken files, in short (tests/fuzz): a few of each kind, and whether faults show.

``python -m fuzz`` in ``tests/`` is the long form; ``tests/fuzz/result.json`` holds its last run.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import pickle
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from fuzz import guided, limits, report
from fuzz.__main__ import _gaps, _shares, main
from fuzz.children import Batch, Outcome, Reader, make_input, run_batches
from fuzz.choices import Choices, Seeded
from fuzz.containers import assemble, parse
from fuzz.limits import Spent
from fuzz.targets import Target, all_targets
from fuzz.trees import Object, Raw, dump
from saft_kernels import ops
from saft_kernels.errors import DeltaFormatError

NAMES = (
    *("delta", "mask", "checkpoint", "adapter", "weights", "extract", "config", "inputs", "split"),
    *("results", "metrics", "demo"),
)

#: Those that draw pages take a second for each.
QUICK = NAMES[:9]


@pytest.fixture(scope="module")
def targets() -> dict[str, Target]:
    return all_targets()


@pytest.fixture(scope="module")
def readers(targets: dict[str, Target]) -> Iterator[Callable[[str], Reader]]:
    """The process of a target, which all tests here share."""
    with ExitStack() as stack:
        yield cache(lambda name: stack.enter_context(Reader(targets[name])))


# Files --------------------------------------------------------------------------------------------


class Drawn(Choices):
    """Choices of hypothesis, which makes what fails as small as it can."""

    def __init__(self, data: st.DataObject) -> None:
        self._data = data

    def integer(self, low: int, high: int) -> int:
        return self._data.draw(st.integers(low, high))

    def data(self, size: int) -> bytes:
        return self._data.draw(st.binary(min_size=size, max_size=size))


@pytest.mark.parametrize("name", QUICK)
@settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate, Phase.shrink],
    suppress_health_check=list(HealthCheck),
)
@given(data=st.data())
def test_any_file_is_refused_or_sound(
    targets: dict[str, Target], readers: Callable[[str], Reader], name: str, data: st.DataObject
) -> None:
    label = readers(name).read(targets[name].generate(Drawn(data)))
    assert not label.startswith("failed"), label


def test_a_short_run_finds_nothing(targets: dict[str, Target]) -> None:
    shares = _shares({name: targets[name] for name in QUICK}, 700)
    total = Outcome("all")
    batches = [Batch(name, 0, share, 20261127) for name, share in shares.items()]
    run_batches(targets, batches, 1, lambda _, outcome: total.merge(outcome))
    assert total.failures == []
    assert total.inputs == sum(shares.values()) >= 700
    assert total.outcomes["accepted"] > 70


def test_the_last_long_run_was_long_and_found_nothing() -> None:
    _, rows = report.kept()
    inputs: Counter[str] = Counter()
    for engine, outcome in rows:
        assert outcome.failures == [], engine
        inputs[engine] += outcome.inputs
    assert sum(inputs.values()) >= 200_000
    for engine in ("mutations", "atheris"):
        assert {outcome.target for its, outcome in rows if its == engine} == set(NAMES)


def test_the_page_shows_the_last_long_run() -> None:
    page = (Path(__file__).parent.parent / "docs" / "reliability.md").read_text()
    _, rows = report.kept()
    assert f"<!-- fuzz -->\n{report.summary(rows)}\n<!-- /fuzz -->" in page


# Inputs -------------------------------------------------------------------------------------------


def test_all_targets_are_here(targets: dict[str, Target]) -> None:
    assert tuple(targets) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_an_input_is_the_same_each_time(targets: dict[str, Target], name: str) -> None:
    again = type(targets[name])()
    assert again.seeds == targets[name].seeds
    for number in range(20):
        assert make_input(again, 3, number) == make_input(targets[name], 3, number)
    assert make_input(again, 3, 1) != make_input(again, 4, 1)


@pytest.mark.parametrize("name", ["delta", "mask", "checkpoint"])
def test_repaired_files_load(
    targets: dict[str, Target], readers: Callable[[str], Reader], name: str
) -> None:
    """What has only a wrong checksum gets the right one."""
    for seed in targets[name].seeds:
        container = parse(seed)
        container.texts = Object([k, "0" * 64 if k != "format" else v] for k, v in container.texts)
        key = {"delta": "checksum", "mask": "fingerprint", "checkpoint": "checksum"}[name]
        broken = parse(seed)
        broken.texts.put(key, "0" * 64)
        assert not readers(name).read(assemble(broken)).startswith("accepted")
        assert readers(name).read(targets[name].repair(assemble(broken))).startswith("accepted")
    assert targets[name].repair(b"none") == b"none"


def test_trees_may_be_what_json_is_not() -> None:
    assert dump(Object([["a", 1], ["a", Raw("1e999")], 3])) == '{"a":1,"a":1e999,3}'


# What a fault looks like --------------------------------------------------------------------------


class Planted(Target):
    """A loader with a fault, which shows in every file but the valid one."""

    name = "planted"
    seconds = 0.1

    def __init__(self, fault: Callable[[Path], Any]) -> None:
        self._fault = fault

    def make_seeds(self) -> list[bytes]:
        return [b"valid"]

    def mutate(self, choices: Choices, content: bytes) -> bytes:
        return b"%d" % choices.integer(0, 9)

    def read(self, path: Path) -> str:
        if path.read_bytes() != b"valid":
            self._fault(path)
        return "accepted"


def swallow(path: Path) -> None:
    try:
        Path("/tmp/written-by-a-fault").write_text("x")
    except Exception:
        raise DeltaFormatError(f"{path} is broken") from None


def take_time(path: Path) -> None:
    end = time.process_time() + 0.3
    while time.process_time() < end:
        pass


def eat_memory(path: Path) -> None:
    """Memory that is new to the process, whatever the allocator still has of the tests before."""
    fresh = mmap.mmap(-1, 40 << 20)
    for at in range(0, len(fresh), mmap.PAGESIZE):
        fresh[at] = 1


def refuse(message: str) -> Callable[[Path], None]:
    """A refusal whose message is not as it should be."""
    from fuzz.oracles import refusals

    def fault(path: Path) -> None:
        with refusals(path):
            raise DeltaFormatError(message.format(path))

    return fault


class Executed:
    def __reduce__(self) -> Any:
        return os.getcwd, ()


FAULTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "an error of another kind": (lambda path: {}["x"], "KeyError"),
    "recursion": (lambda path: FAULTS["recursion"][0](path), "RecursionError"),
    "the process ends": (lambda path: os._exit(3), "the fuzzer itself"),
    "a crash": (lambda path: ctypes.string_at(0), "died with signal 11"),
    "a hang": (lambda path: time.sleep(60), "it hangs"),
    "slowness": (take_time, "it took .* s for"),
    "memory": (eat_memory, "bytes of memory"),
    "much memory": (lambda path: bytearray(1 << 33), "MemoryError"),
    "an index out of range": (
        lambda path: ops.gather(torch.ones(3), torch.tensor([7])),
        "index out of range",
    ),
    "a pickle": (lambda path: pickle.loads(pickle.dumps(Executed())), "pickle.find_class"),
    "a command": (lambda path: os.system("true"), "os.system"),
    "a file elsewhere": (swallow, "open of '/tmp/written-by-a-fault'"),
    "a message of two lines": (refuse("{}\nx"), "control characters"),
    "a message that names no file": (refuse("no"), "does not name the file"),
    "a message without end": (refuse("{}" + "x" * 5000), "characters"),
    "no message": (refuse(""), "is empty"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_a_loader_shows(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if fault == "a hang":
        monkeypatch.setattr(limits, "HANG", 1)
    action, message = FAULTS[fault]
    outcomes: list[Outcome] = []
    target = Planted(action)
    if fault == "the process ends":
        with pytest.raises(RuntimeError, match=message):
            run_batches({"planted": target}, [Batch("planted", 0, 1, 1)], 1, print)
        return
    run_batches(
        {"planted": target}, [Batch("planted", 0, 2, 1)], 1, lambda _, found: outcomes.append(found)
    )
    failures = [failure for outcome in outcomes for failure in outcome.failures]
    assert [failure.number for failure in failures] == [0, 1]
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(failures[0].what)


def test_a_reader_outlives_what_kills_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with Reader(Planted(lambda path: ctypes.string_at(0))) as reader:
        assert reader.read(b"x") == "failed: it died with signal 11"
        assert reader.read(b"valid") == "accepted"


# The command --------------------------------------------------------------------------------------


def test_a_run_goes_on_where_it_was_stopped() -> None:
    assert list(_gaps(2500, [])) == [(0, 1000), (1000, 2000), (2000, 2500)]
    assert list(_gaps(2500, [(0, 1000), (1000, 1007), (2000, 2500)])) == [(1007, 2000)]
    assert list(_gaps(10, [(0, 10)])) == []
    assert list(_gaps(10, [(3, 5)])) == [(0, 3), (5, 10)]


def test_the_command_writes_a_table_and_takes_no_input_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("fuzz.__main__.FOLDER", tmp_path)
    monkeypatch.setattr("fuzz.__main__.all_targets", lambda: {"planted": Planted(len)})
    arguments = ["--inputs", "3", "--jobs", "1"]
    assert main(arguments) == 1
    assert "| planted | mutations | 3 | 0 |  | 3 |" in capsys.readouterr().out
    told = next((tmp_path / "failures").glob("*.txt")).read_text()
    assert "TypeError" in told
    assert "cd tests && python -m fuzz --seed 1 --only planted:" in told
    assert main(arguments) == 1
    assert len((tmp_path / "seed-1.jsonl").read_text().splitlines()) == 1
    with pytest.raises(TypeError):
        main(["--only", "planted:0"])


def test_a_table_adds_up() -> None:
    one, two = Outcome("a"), Outcome("b")
    one.add(1, "accepted", Spent(0.5, 2_000_000), 100)
    one.add(2, "DeltaFormatError", Spent(0.1, 8 << 20), 1 << 20)
    two.add(3, "accepted, fits no model here", Spent(1.5, 1), 100)
    assert Outcome.from_json(one.to_json()) == one
    last = report.table([("mutations", one), ("atheris", two)]).splitlines()[-1]
    assert last == (
        "| all |  | 3 | 2 | DeltaFormatError 1 | 0 | 1.50 s | 8.4 MB, 8 times the file |"
    )


def test_without_atheris_there_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guided.importlib.util, "find_spec", lambda name: None)
    assert "pip install atheris" in (guided.missing() or "")
    with pytest.raises(SystemExit, match="pip install atheris"):
        main(["--guided", "1"])


def test_seeded_choices_are_within_their_bounds() -> None:
    choices = Seeded("x")
    assert {choices.integer(2, 4) for _ in range(99)} == {2, 3, 4}
    assert len(choices.data(7)) == 7

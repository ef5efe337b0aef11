"""Comparing results and revisions. Whether a figure got worse is judged on made-up times."""

from __future__ import annotations

import copy
import io
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from bench import compare, revisions
from bench.cli import app
from bench.harness import Contender, Effort, Pace, measure, paced
from bench.memory import MeasurementError
from bench.models import SMOKE, Setting
from bench.outcome import BASELINE, TIMES_FASTER, Figure, MemoryUse, Outcome, Timing
from bench.ratios import ratio
from bench.result_file import FORMAT, VERSION, ResultError, outcome_record, write_result
from bench.revision_worker import Channel, StoppedError, require_revision, setting_of
from bench.revisions import Worker, compare_answers, run_in_turns

ROOT = Path(__file__).parent.parent


def timing(name: str, center: float, noise: float = 0.01, **more: Any) -> Timing:
    draw = random.Random(name + str(center))
    seconds = [center * (1 + noise * draw.uniform(-1, 1)) for _ in range(15)]
    return Timing("gather, uniform mask", name, seconds, seconds, **more)


def result(*timings: Timing, **more: Any) -> dict[str, Any]:
    """A result file's content with one case."""
    record = {"refused": None, "left_out": None, **outcome_record(Outcome(list(timings), **more))}
    return {
        "format": FORMAT,
        "version": VERSION,
        "environment": {"processor": "abacus", "cores": 2, "threads": 2, "torch": "2.14"},
        "setting": asdict(SMOKE),
        "cases": {"gather_scatter": record},
    }


# Files --------------------------------------------------------------------------------------------


def run_compare(tmp_path: Path, before: Any, after: Any, *options: str) -> tuple[int, str]:
    """The exit code of the command, and what it printed or why it failed."""
    files = [tmp_path / "a.json", tmp_path / "b.json"]
    for file, content in zip(files, (before, after), strict=True):
        write_result(file, content)
    done = CliRunner().invoke(app, ["compare", *map(str, files), *options])
    return done.exit_code, done.stdout + str(done.exception or "")


def row(text: str, name: str) -> str:
    (line,) = (line for line in text.splitlines() if f"| {name} |" in line)
    return line


def test_slower_contender_is_caught(tmp_path: Path) -> None:
    before = result(timing("gather", 1.0), timing("scatter_", 1.0))
    after = result(timing("gather", 1.3), timing("scatter_", 1.01))
    code, text = run_compare(tmp_path, before, after)
    assert code == 1
    assert "Worse: 1 of 2, gather, uniform mask: gather (slower)" in text
    assert "| **slower** |" in row(text, "gather")
    assert "| 1.3 (1.2" in row(text, "gather")
    assert "no difference beyond the noise" in row(text, "scatter_")


def test_faster_contender_is_shown(tmp_path: Path) -> None:
    code, text = run_compare(tmp_path, result(timing("gather", 1)), result(timing("gather", 0.5)))
    assert code == 0
    assert "1 got faster" in text
    assert "| faster |" in row(text, "gather")


def test_no_ratio_is_printed_within_the_noise(tmp_path: Path) -> None:
    before, after = result(timing("gather", 1, 0.4)), result(timing("gather", 1.1, 0.4))
    code, text = run_compare(tmp_path, before, after)
    assert code == 0
    cells = row(text, "gather").split(" | ")
    assert cells[-2].startswith("(")
    assert "Nothing of 1 got slower or larger" in text


def test_threshold_is_in_percent_and_the_whole_interval_lies_beyond_it(tmp_path: Path) -> None:
    before, after = result(timing("gather", 1)), result(timing("gather", 1.07))
    assert run_compare(tmp_path, before, after)[0] == 1
    assert run_compare(tmp_path, before, after, "--threshold", "7")[0] == 0
    assert run_compare(tmp_path, before, after, "--threshold", "10")[0] == 0


def test_a_slower_baseline_is_no_regression_but_a_warning(tmp_path: Path) -> None:
    before = result(timing("torch indexing", 1, bandwidth=2e9, role=BASELINE), timing("gather", 1))
    after = result(timing("torch indexing", 1.5, bandwidth=1e9, role=BASELINE), timing("gather", 1))
    code, text = run_compare(tmp_path, before, after)
    assert code == 0
    assert "| slower (baseline) |" in row(text, "torch indexing")
    assert "took 1.75 times as long after as before (median)" in text
    assert "1 changed that run no code of this package" in text
    assert "Warning" not in run_compare(tmp_path, before, before)[1]


def test_what_came_is_listed(tmp_path: Path) -> None:
    before, after = result(timing("gather", 1)), result(timing("gather", 1), timing("new", 1))
    after["cases"]["delta"] = after["cases"]["gather_scatter"]
    code, text = run_compare(tmp_path, before, after)
    assert code == 0
    assert "Only after: gather, uniform mask: new (gather_scatter)." in text
    assert "Only after: the case delta." in text


def test_what_vanished_is_a_failure(tmp_path: Path) -> None:
    before, after = result(timing("gather", 1), timing("old", 1)), result(timing("gather", 1))
    code, text = run_compare(tmp_path, before, after)
    assert code == 1
    assert "**Only before: gather, uniform mask: old (gather_scatter).**" in text
    more = {**before, "cases": {**before["cases"], "delta": after["cases"]["gather_scatter"]}}
    assert "**Only before: the case delta.**" in run_compare(tmp_path, more, after)[1]
    for key in ("efforts", "setting"):  # of the case, or of a file of before these were its own
        asked_for_less = copy.deepcopy(after)
        holder = asked_for_less["cases"]["gather_scatter"] if key == "efforts" else asked_for_less
        holder[key] = {**after["setting"], "bars_only": True}
        code, text = run_compare(tmp_path, before, asked_for_less)
        assert code == 0
        assert "\nOnly before: gather, uniform mask: old (gather_scatter)." in text


def test_a_case_that_is_left_out_now_is_a_failure(tmp_path: Path) -> None:
    good, bad = result(timing("gather", 1)), result(timing("gather", 1))
    for each in (good, bad):
        each["cases"]["delta"] = copy.deepcopy(each["cases"]["gather_scatter"])
    empty = outcome_record(Outcome())
    bad["cases"]["delta"] |= {**empty, "left_out": "it needs a model with a text tower"}
    code, text = run_compare(tmp_path, good, bad)
    assert code == 1
    assert "**delta was left out after: it needs a model with a text tower.**" in text
    assert run_compare(tmp_path, bad, good)[0] == 0
    assert run_compare(tmp_path, bad, bad)[0] == 0


def test_malformed_files_are_one_sentence(tmp_path: Path) -> None:
    good = result(timing("gather", 1))
    for key in ("environment", "setting", "cases"):
        bad = {k: v for k, v in good.items() if k != key}
        code, text = run_compare(tmp_path, good, bad)
        assert code == 1
        assert f"b.json is not what this release writes (KeyError('{key}'))" in text


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--model", "RN50"], "--model"),
        (["--rounds", "15", "--smoke"], "--rounds, --smoke"),
        (["--batch", "4", "--threads", "1"], "--batch, --threads"),
    ],
)
def test_options_without_effect_are_refused(options: list[str], named: str, tmp_path: Path) -> None:
    good = result(timing("gather", 1))
    _, text = run_compare(tmp_path, good, good, *options)
    assert f"nothing is measured where two files are compared; leave out {named}" in text
    done = CliRunner().invoke(app, ["compare", "--base", "HEAD", "--force"])
    assert "revisions always compare; leave out --force" in str(done.exception)


def test_grown_memory_and_files_are_caught(tmp_path: Path) -> None:
    def sizes(peak: int, state: float, shared: float, speed: float) -> dict[str, Any]:
        return result(
            memory=[
                MemoryUse("step", "SparseAdamW", peak=peak),
                MemoryUse("step", "PEFT LoRA", role=BASELINE, peak=peak),
            ],
            figures=[
                Figure("state of SparseAdamW per selected entry", state, "bytes"),
                Figure("all memory that the fused pass adds", shared, "%"),
                Figure("peak memory below full fine-tuning's", -peak, "bytes"),
                Figure("speed", speed, TIMES_FASTER),
            ],
        )

    before = sizes(100 << 20, 16, 0.8, 30)
    code, text = run_compare(tmp_path, before, sizes(102 << 20, 16.5, 2.0, 3))
    assert code == 1
    assert "Worse: 2 of 4, step: SparseAdamW (larger); state of SparseAdamW" in text
    assert "| 100 MiB | 102 MiB | 1.02 | **larger** |" in row(text, "SparseAdamW")
    assert "larger (baseline)" in row(text, "PEFT LoRA")
    assert "| 0.8 % | 2 % |  | no difference |" in row(text, "all memory that the fused pass adds")
    assert run_compare(tmp_path, before, sizes(90 << 20, 12, 0.5, 3))[0] == 0


@pytest.mark.parametrize(
    ("part", "key", "value", "said"),
    [
        ("environment", "processor", "slide rule", "processor (abacus against slide rule)"),
        ("environment", "threads", 1, "threads (2 against 1)"),
        ("setting", "model", "ViT-B-16", "model (saft-tiny against ViT-B-16)"),
    ],
)
def test_results_not_measured_alike_are_refused_unless_forced(
    part: str, key: str, value: Any, said: str, tmp_path: Path
) -> None:
    before, after = result(timing("gather", 1)), result(timing("gather", 1))
    after[part][key] = value
    code, text = run_compare(tmp_path, before, after)
    assert code == 1
    assert f"the two results do not compare: {said};" in text
    code, text = run_compare(tmp_path, before, after, "--force")
    assert code == 0
    assert f"Compared although not measured alike: {said}." in text


def test_other_versions_and_efforts_are_compared(tmp_path: Path) -> None:
    before, after = result(timing("gather", 1)), result(timing("gather", 1))
    after["environment"] |= {"torch": "2.15", "blas": "mkl 2024.2", "openmp": "OMP_X=1"}
    before["environment"] |= {"blas": "mkl 2024.2", "openmp": "no variables set"}
    after["setting"]["kernels"]["most"] = 100
    code, text = run_compare(tmp_path, before, after)
    assert code == 0
    said = "torch (2.14 against 2.15), openmp (no variables set against OMP_X=1)"
    assert f"Not the same in both: {said}." in text


def test_a_case_that_is_refused_now_is_a_failure(tmp_path: Path) -> None:
    good, bad = result(timing("gather", 1)), result(timing("gather", 1))
    for each in (good, bad):
        each["cases"]["delta"] = copy.deepcopy(each["cases"]["gather_scatter"])
    bad["cases"]["gather_scatter"]["refused"] = "it is wrong"
    code, text = run_compare(tmp_path, good, bad)
    assert code == 1
    assert "gather_scatter was refused after: it is wrong." in text
    assert run_compare(tmp_path, bad, good)[0] == 0


def test_results_need_something_in_common(tmp_path: Path) -> None:
    other = result(timing("gather", 1))
    other["cases"]["delta"] = other["cases"].pop("gather_scatter")
    assert "no case in common" in run_compare(tmp_path, result(timing("gather", 1)), other)[1]
    code, text = run_compare(tmp_path, result(timing("gather", 1)), result(timing("other", 1)))
    assert code == 1
    assert "Nothing could be compared." in text


@pytest.mark.parametrize("arguments", [[], ["a.json"], ["a.json", "b.json", "--head", "main"]])
def test_two_files_or_a_base_are_needed(arguments: Sequence[str]) -> None:
    done = CliRunner().invoke(app, ["compare", *arguments])
    assert isinstance(done.exception, ResultError)
    assert "give two result files, or a revision" in str(done.exception)


def test_what_is_measured_twice_changed_only_if_both_say_so() -> None:
    def change(verdict: str, *found: float) -> compare.Change:
        value, low, high = found
        return compare.Change("case", "group", "name", "", "", (value, low, high), verdict)

    slower, slower_too = change("slower", 1.2, 1.1, 1.4), change("slower", 1.3, 1.2, 1.3)
    both = compare.settled(slower, slower_too)
    assert both.verdict == "slower"
    assert both.ratio == pytest.approx(((1.2 * 1.3) ** 0.5, 1.1, 1.4))
    same = change(compare.SAME_TIME, 1.0, 0.9, 1.1)
    assert compare.settled(slower, same).same
    assert compare.settled(same, slower).same
    assert compare.settled(slower, change("faster", 0.8, 0.7, 0.9)).same
    assert compare.settled(change("larger", 2, 2, 2), change(compare.SAME_SIZE, 1, 1, 1)).verdict \
        == compare.SAME_SIZE  # fmt: skip


# Turns --------------------------------------------------------------------------------------------

#: Goes through groups as a real one does, and writes down when it works.
TOY = """
import json, sys, time

name, log, groups, last = sys.argv[1], sys.argv[2], sys.argv[3].split(","), int(sys.argv[4])

def work(what):
    for when in ("begins", "ends"):
        with open(log, "a") as file:
            print(name, when, what, file=file)
        time.sleep(0.005)

def tell(**message):
    print(json.dumps(message), flush=True)

print("something that an import prints")
tell(ready=True)
left, done = [], 0
for line in sys.stdin:
    message = json.loads(line)
    if "stop" in message:
        tell(failed="it was stopped")
        continue
    if "case" in message:
        left = list(groups)
    else:
        done += 1
        work(left.pop(0))
    if done == last:
        sys.exit("out of luck")
    tell(**({"reached": left[0]} if left else {"outcome": {"by": name}}))
"""


@pytest.fixture
def toys(tmp_path: Path, request: pytest.FixtureRequest) -> Callable[..., list[Worker]]:
    """Makes and starts two workers, of base and head, that run the toy with these groups."""
    script, log = tmp_path / "toy.py", tmp_path / "log"
    script.write_text(TOY)
    log.touch()

    def make(base: str, head: str, last_of_head: int = -1) -> list[Worker]:
        made = []
        for name, groups, last in (("base", base, -1), ("head", head, last_of_head)):
            command = [sys.executable, str(script), name, str(log), groups, str(last)]
            made.append(Worker(name, command, tmp_path, os.environ))
            request.addfinalizer(made[-1].close)
            made[-1].start()
        for each in made:
            each.require_ready()
        return made

    return make


def log_of(tmp_path: Path) -> list[list[str]]:
    return [line.split() for line in (tmp_path / "log").read_text().splitlines()]


def test_two_workers_take_turns_and_never_run_at_once(
    toys: Callable[..., list[Worker]], tmp_path: Path
) -> None:
    workers = toys(*[",".join(["a"] * 8 + ["b"] * 4)] * 2)
    answers = run_in_turns("case", workers, random.Random(0).shuffle)
    assert answers == [{"outcome": {"by": "base"}}, {"outcome": {"by": "head"}}]
    log = log_of(tmp_path)
    begun, ended = log[::2], log[1::2]
    assert [(name, group) for name, _, group in begun] == [(n, g) for n, _, g in ended]
    assert {when for _, when, _ in begun} == {"begins"}
    rounds = [tuple(name for name, _, _ in begun[i : i + 2]) for i in range(0, len(begun), 2)]
    assert len(rounds) == 12
    assert set(rounds) == {("base", "head"), ("head", "base")}  # both, in either order


def test_a_dying_worker_is_one_sentence_and_the_next_case_has_a_new_one(
    toys: Callable[..., list[Worker]],
) -> None:
    workers = toys("a,a,a", "a,a,a", last_of_head=2)
    answers = run_in_turns("case", workers, random.Random(0).shuffle)
    found = compare_answers("gather_scatter", workers, answers, 0.02)
    assert found.failures == [
        "gather_scatter was not compared: head: its process ended with exit code 1: out of luck."
    ]
    assert not found.passed
    again = workers[1].ask(case="another")
    assert again == {"reached": "a"}


def test_other_groups_are_one_sentence(toys: Callable[..., list[Worker]]) -> None:
    for base, head, sentence in (
        ("a,b", "a,c", "base came to b; head came to c"),
        ("a,b", "a", "base came to b; head came to the end"),
    ):
        workers = toys(base, head)
        answers = run_in_turns("case", workers, random.Random(0).shuffle)
        found = compare_answers("delta", workers, answers, 0.02)
        assert found.remarks == [f"delta was not compared: {sentence}."]
        assert workers[0].ask(case="another") == {"reached": "a"}  # it is ready for the next


def test_only_what_the_head_alone_cannot_do_is_a_failure(
    toys: Callable[..., list[Worker]],
) -> None:
    workers = toys("a", "a")
    fine: dict[str, Any] = {"outcome": outcome_record(Outcome())}
    wrong: dict[str, Any] = {"failed": "it is wrong"}
    assert compare_answers("delta", workers, [fine, wrong], 0.02).failures
    for answers in ([wrong, fine], [wrong, wrong]):
        found = compare_answers("delta", workers, answers, 0.02)
        assert not found.failures
        assert found.remarks[0].startswith("delta was not compared: base: it is wrong")


def test_a_worker_that_does_not_start_says_why(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "raise ImportError('no such module')"]
    worker = Worker("old", command, tmp_path, os.environ)
    worker.start()
    with pytest.raises(MeasurementError, match=r"do not run on old: .*no such module"):
        worker.require_ready()


def test_a_worker_loads_the_library_of_its_revision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAFT_LIBRARY", str(tmp_path / "other.so"))
    assert "SAFT_LIBRARY" not in revisions.worker("old", tmp_path, tmp_path, {})._environment


def contender(log: list[str]) -> Contender:
    return Contender("name", lambda: log.append("run"), lambda run: run())


def test_rounds_wait_for_their_turn_and_are_as_many_as_asked_for() -> None:
    said, log = io.StringIO(), list[str]()
    channel = Channel(io.StringIO('{"go": true}\n' * 4), said)
    with paced(Pace(3, channel.turn)):
        timings = measure("group", [contender(log)], Effort(warm_up=1))
    assert len(timings["name"].seconds) == 3
    assert [json.loads(line) for line in said.getvalue().splitlines()] == [{"reached": "group"}] * 4
    assert len(measure("group", [contender(log)], Effort(0, 2, 2))["name"].seconds) == 2


def test_a_case_can_be_stopped_between_rounds() -> None:
    channel = Channel(io.StringIO('{"go": true}\n{"stop": true}\n'), io.StringIO())
    log: list[str] = []
    with pytest.raises(StoppedError), paced(Pace(3, channel.turn)):
        measure("group", [contender(log)], Effort(warm_up=1))
    assert len(log) == 2  # checked, and one round


def test_rounds_of_two_revisions_are_paired() -> None:
    disturbance = [1.0, 5.0] * 10
    base, head = (Timing("g", "n", [f * d for d in disturbance], []) for f in (2.0, 3.0))
    found = compare.compare_outcomes("case", Outcome([base]), Outcome([head]), ratio, 0.02)
    assert found.changes[0].ratio == (1.5, 1.5, 1.5)


# Revisions ----------------------------------------------------------------------------------------


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=test", "-c", "user.email=test@example.com"]
    done = subprocess.run(
        ["git", "-C", str(folder), *identity, *arguments],
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A clone of this checkout with its library; the one that revisions are looked up in."""
    try:
        top = git(ROOT, "rev-parse", "--show-toplevel").strip()
    except (OSError, subprocess.CalledProcessError):
        top = ""
    if not top or Path(top).resolve() != ROOT.resolve():
        pytest.skip("this is no git checkout")
    clone = tmp_path / "clone"
    git(tmp_path, "clone", "--quiet", str(ROOT), str(clone))
    library = Path("saft_kernels", "libsaft_kernels.so")
    shutil.copy(ROOT / library, clone / library)
    monkeypatch.setattr(revisions, "_ROOT", clone)
    return clone


def commit(checkout: Path, file: str, addition: str) -> None:
    path = checkout / file
    path.write_text(path.read_text() + addition)
    git(checkout, "commit", "--quiet", "--all", "--message", file)


def require_tidy(checkout: Path) -> None:
    """No worktree is left of a comparison."""
    assert len(git(checkout, "worktree", "list").splitlines()) == 1


SLOW_GATHER = """

import time
_fast_gather = gather


def gather(dense: Tensor, indices: Tensor) -> Tensor:
    print("what goes to stdout is not for whoever compares")
    time.sleep(3e-3)
    return _fast_gather(dense, indices)
"""

#: Other tests run meanwhile: only what takes several times as long counts.
QUICK = ("gather_scatter", "--smoke", "--threads", "1", "--rounds", "3", "--threshold", "400")


def test_slowed_operation_is_caught(checkout: Path) -> None:
    commit(checkout, "saft_kernels/ops.py", SLOW_GATHER)
    done = CliRunner().invoke(app, ["compare", "--base", "HEAD~1", *QUICK])
    assert done.exit_code == 1, done.output
    assert "Worse: 2 of 8, gather, uniform mask: gather (slower); gather, selected" in done.stdout
    lines = [line for line in done.stdout.splitlines() if "**slower**" in line]
    assert [line.split(" | ")[1] for line in lines] == ["gather", "gather"]
    assert "Measured twice, since something looked worse: gather_scatter." in done.stdout
    require_tidy(checkout)


def test_a_revision_does_not_differ_from_itself(checkout: Path) -> None:
    done = CliRunner().invoke(app, ["compare", "--base", "HEAD", "--head", "HEAD", *QUICK])
    assert done.exit_code == 0, done.output
    assert "Nothing of 8 got slower" in done.stdout
    require_tidy(checkout)


def test_unknown_revision_is_one_sentence(checkout: Path) -> None:
    with pytest.raises(ResultError, match="there is no revision 'nothing' in"):
        revisions.compare_revisions("nothing", None, ["delta"], SMOKE)


def test_revisions_need_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(revisions, "_ROOT", tmp_path)
    with pytest.raises(ResultError, match="is no git checkout, so there are no revisions"):
        revisions.compare_revisions("main", None, ["delta"], SMOKE)


def test_a_revision_that_cannot_be_built_is_one_sentence(checkout: Path) -> None:
    (checkout / "setup.py").write_text("raise SystemExit('error: no luck')\n")
    git(checkout, "commit", "--quiet", "--all", "--message", "broken")
    git(checkout, "revert", "--no-edit", "HEAD")
    with pytest.raises(MeasurementError, match=r"HEAD~1 cannot be built: .*no luck"):
        revisions.compare_revisions("HEAD~1", None, ["delta"], SMOKE)
    require_tidy(checkout)


def test_an_interrupted_comparison_leaves_nothing_behind(
    checkout: Path, toys: Callable[..., list[Worker]], monkeypatch: pytest.MonkeyPatch
) -> None:
    workers = iter(started := toys("a", "a"))
    folders: list[Path] = []

    def toy(label: str, root: Path, folder: Path, options: Any) -> Worker:
        folders.append(folder)
        return next(workers)

    def interrupt(*arguments: Any) -> None:
        assert all(folder.is_dir() for folder in folders)
        raise KeyboardInterrupt

    monkeypatch.setattr(revisions, "worker", toy)
    monkeypatch.setattr(revisions, "run_in_turns", interrupt)
    with pytest.raises(KeyboardInterrupt):
        revisions.compare_revisions("HEAD", None, ["delta"], SMOKE)
    assert not any(folder.exists() for folder in folders)
    assert all(each._process is None for each in started)
    require_tidy(checkout)


def test_an_installed_package_may_not_win_over_the_revision(tmp_path: Path) -> None:
    require_revision(ROOT)
    with pytest.raises(ImportError, match="saft_kernels is that of"):
        require_revision(tmp_path)


def test_settings_reach_the_worker() -> None:
    setting = replace(Setting(), density=0.5, steps=Effort(1, 2, 3, 4))
    assert setting_of(json.loads(json.dumps(asdict(setting)))) == setting

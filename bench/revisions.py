"""Two revisions side by side: each runs in a process of its own, and they take turns.

The base is checked out and built in a temporary folder; the head is the working tree as it is, or
another revision. The benchmarks are those of this checkout for both, so that both do the same work
under the same checks (:mod:`.revision_worker`). The two never run at once: base and head run one
round each, in an order drawn anew every time, so that whatever else the machine does meets both
alike and their rounds can be paired (:func:`.ratios.ratio`).

A process keeps some luck for all its rounds: which pages it got, where its code lies. And of a
hundred intervals of 95 % a few miss. So cases in which something looks worse are measured again in
two new processes, and what is worse has to be so both times.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from saft_clip.console import say, warn

from .compare import Comparison, compare_outcomes, settled
from .environment import NOTICEABLE_LOAD, watch_load
from .memory import MeasurementError
from .models import Setting
from .outcome import Timing
from .ratios import Ratio, ratio, ratio_of_runs
from .registry import CASES
from .result_file import ResultError, outcome_of

#: Rounds of each group.
ROUNDS = 15

#: What interleaved rounds of the same code may differ by.
THRESHOLD = 0.02

#: The operations of the data path; whole training steps are compared if they are named.
DEFAULT_CASES = ("accumulate_topk", "gather_scatter", "sparse_adamw", "sampled_grad", "delta")

_ROOT = Path(__file__).parent.parent
_LIBRARY = Path("saft_kernels", "libsaft_kernels.so")
_NATIVE_SOURCES = ("csrc", "cmake", "CMakeLists.txt", "setup.py")

#: Seconds between two turns: threads of the one process that wait for work give up their cores.
_SETTLE = 0.02


def compare_revisions(
    base: str,
    head: str | None,
    cases: Sequence[str],
    setting: Setting,
    *,
    rounds: int = ROUNDS,
    threshold: float = THRESHOLD,
) -> tuple[str, Comparison]:
    """Measure two revisions in turns and compare them.

    Args:
        base: a revision of this checkout.
        head: another; None: the working tree as it is.
        cases: names.
        setting: to measure on.
        rounds: of each group.
        threshold: a time within 1 +- this did not change.

    Returns:
        A title, and what was found.

    Raises:
        ResultError: outside a git checkout, or if there is no such revision.
        MeasurementError: if a revision cannot be built, or the benchmarks do not run on it.
    """
    require_checkout()
    commits = [None if each is None else commit_of(each) for each in (base, head)]
    labels = [base, head or "the working tree"]
    title = f"{labels[1]} ({_described(head)}) against {base} ({_described(base)}), "
    with _terminated_like_interrupted(), ExitStack() as stack, watch_load() as load:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="saft-compare-")))
        (folder / "bench").symlink_to(Path(__file__).parent, target_is_directory=True)
        options = {"setting": asdict(setting), "rounds": rounds}
        sides = [
            worker(label, stack.enter_context(checked_out(label, commit, folder)), folder, options)
            for label, commit in zip(labels, commits, strict=True)
        ]
        found = _compare_twice(cases, sides, threshold)
    if load.others is not None and load.others > NOTICEABLE_LOAD:
        found.remarks.append(
            f"Other programs used {load.others:.0%} of the processors meanwhile: the intervals are "
            "wider for it, and hide what an idle machine would show."
        )
    return f"{title}{rounds} rounds in turns.", found


@contextmanager
def _terminated_like_interrupted() -> Iterator[None]:
    """Let SIGTERM do what Ctrl-C does, so that nothing is left behind then, either."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


# Revisions ----------------------------------------------------------------------------------------


def _git(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["git", "-C", str(_ROOT), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise ResultError(
            f"revisions cannot be compared: git does not run ({error.strerror})"
        ) from error


def require_checkout() -> None:
    """Make sure that these benchmarks lie in a git checkout of this package.

    Raises:
        ResultError: if they do not.
    """
    top = _git("rev-parse", "--show-toplevel").stdout.strip()
    if not top or Path(top).resolve() != _ROOT.resolve():
        raise ResultError(
            f"{_ROOT} is no git checkout, so there are no revisions to compare; clone the "
            "repository and run `python -m bench compare` there"
        )


def commit_of(revision: str) -> str:
    """The commit that a revision names.

    Raises:
        ResultError: if there is none.
    """
    done = _git("rev-parse", "--verify", "--quiet", "--end-of-options", revision + "^{commit}")
    if done.returncode != 0:
        raise ResultError(f"there is no revision {revision!r} in {_ROOT}")
    return done.stdout.strip()


def _described(revision: str | None) -> str:
    """Its short commit; of the working tree with ``-dirty`` if it differs from its commit."""
    which = ["--dirty"] if revision is None else [commit_of(revision)]
    return _git("describe", "--always", "--exclude=*", *which).stdout.strip()


@contextmanager
def checked_out(label: str, commit: str | None, folder: Path) -> Iterator[Path]:
    """A folder with a built commit, within a block; the working tree if there is no commit.

    Args:
        label: of the revision, for messages.
        commit: to check out.
        folder: that the new folder is made in.

    Raises:
        MeasurementError: if it cannot be checked out or built.
    """
    if commit is None:
        _require_library()
        yield _ROOT
        return
    root = Path(tempfile.mkdtemp(dir=folder)) / "checkout"
    try:
        done = _git("worktree", "add", "--detach", str(root), commit)
        if done.returncode != 0:
            raise MeasurementError(f"{label} cannot be checked out: {_last_line(done.stderr)}")
        _provide_library(label, commit, root)
        yield root
    finally:
        _git("worktree", "remove", "--force", str(root))


def _require_library() -> None:
    """Make sure that the working tree is built; warn if its sources changed since then."""
    library = _ROOT / _LIBRARY
    if not library.is_file():
        raise MeasurementError("the working tree is not built; run `make build` first")
    sources = [path for path in (_ROOT / "csrc").rglob("*") if path.is_file()]
    newest = max(sources, key=lambda path: path.stat().st_mtime)
    if newest.stat().st_mtime > library.stat().st_mtime:
        name = newest.relative_to(_ROOT)
        warn(f"{name} is newer than the library of the working tree; is it built (`make build`)?")


def _provide_library(label: str, commit: str, root: Path) -> None:
    """Build the library of a revision, or take the working tree's if it is the same."""
    library = _ROOT / _LIBRARY
    changed = _git("diff", "--quiet", commit, "--", *_NATIVE_SOURCES).returncode != 0
    added = _git("ls-files", "--others", "--exclude-standard", "--", *_NATIVE_SOURCES).stdout
    if library.is_file() and not changed and not added:
        shutil.copy(library, root / _LIBRARY)
        return
    say(f"building {label} ({commit[:12]})")
    _build(label, root)


def _build(label: str, root: Path) -> None:
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            command, cwd=root, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        with _ended(process):
            code = process.wait()
        log.seek(0)
        lines = log.read().splitlines()
    if code != 0:
        errors = [line.strip() for line in lines if "error" in line.lower()]
        reason = next(iter(errors + lines[-1:]), f"exit code {code}")
        raise MeasurementError(f"{label} cannot be built: {reason}")


@contextmanager
def _ended(process: subprocess.Popen[Any]) -> Iterator[None]:
    """At the end of the block, end the process with all that it started."""
    try:
        yield
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[-1].strip()


# Processes ----------------------------------------------------------------------------------------


class Worker:
    """A process that works between a message and its answer, and at no other time.

    Args:
        label: of what it runs, for messages.
        command: starts it.
        folder: that it runs in.
        environment: that it runs with.
    """

    def __init__(
        self, label: str, command: Sequence[str], folder: Path, environment: Mapping[str, str]
    ) -> None:
        self.label = label
        self._command, self._folder, self._environment = command, folder, environment
        self._process: subprocess.Popen[str] | None = None
        self._running = ExitStack()

    def start(self) -> None:
        """Start it anew; :meth:`require_ready` before anything is asked of it."""
        self.close()
        with ExitStack() as stack:
            self._errors = stack.enter_context(tempfile.TemporaryFile("w+"))
            process = stack.enter_context(
                subprocess.Popen(
                    self._command,
                    cwd=self._folder,
                    env=self._environment,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=self._errors,
                    text=True,
                    start_new_session=True,  # Ctrl-C is for the process that compares
                )
            )
            stack.enter_context(_ended(process))
            self._running = stack.pop_all()
        self._process = process

    def require_ready(self) -> None:
        """Wait until it has started.

        Raises:
            MeasurementError: if it ends, or does not find what it needs.
        """
        assert self._process is not None
        answer = self._hear(self._process)
        if "ready" not in answer:
            self.close()
            raise MeasurementError(
                f"the benchmarks do not run on {self.label}: {answer.get('failed')}"
            )

    def ask(self, **message: Any) -> dict[str, Any]:
        """Send a message and wait for the answer; ``failed`` if the process ends instead."""
        try:
            if self._process is None:
                self.start()
                self.require_ready()
        except MeasurementError as error:
            return {"failed": str(error)}
        assert self._process is not None
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # why it ended is said below
            os.write(self._process.stdin.fileno(), f"{json.dumps(message)}\n".encode())
        return self._hear(self._process)

    def _hear(self, process: subprocess.Popen[str]) -> dict[str, Any]:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("{"):  # what an import prints is none
                answer: dict[str, Any] = json.loads(line)
                return answer
        code = process.wait()
        self._errors.seek(0)
        said = _last_line(self._errors.read())
        self.close()
        return {"failed": f"its process ended with exit code {code}" + (f": {said}" * bool(said))}

    def close(self) -> None:
        """End the process."""
        self._process = None
        self._running.close()


def worker(label: str, root: Path, folder: Path, options: Mapping[str, Any]) -> Worker:
    """The process for a revision; not started yet.

    Args:
        label: of the revision.
        root: its folder.
        folder: holds these benchmarks and nothing else that could be imported.
        options: of :mod:`.revision_worker`.
    """
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join((str(root), str(root / "python"))),
        "TMPDIR": str(folder),  # what it leaves there when it is killed goes, too
    }
    environment.pop("PYTHONSAFEPATH", None)  # the benchmarks are found in the folder it runs in
    environment.pop("SAFT_LIBRARY", None)  # every revision has a library of its own
    command = [sys.executable, "-m", "bench.revision_worker", str(root), json.dumps(options)]
    return Worker(label, command, folder, environment)


# Turns --------------------------------------------------------------------------------------------


@dataclass
class Progress:
    """A line for each group when it is done."""

    group: str | None = None
    rounds: int = 0
    start: float = 0.0

    def reached(self, group: str | None) -> None:
        """Another round of a group is next; None: no more."""
        if group != self.group:
            if self.group is not None:
                seconds = time.perf_counter() - self.start
                say(f"{self.group}: {self.rounds} rounds of both, {seconds:.0f} s")
            self.group, self.rounds, self.start = group, 0, time.perf_counter()
        self.rounds += 1


def run_in_turns(
    case: str, workers: Sequence[Worker], shuffle: Callable[[list[Worker]], None]
) -> list[dict[str, Any]]:
    """Let both run the case, a round at a time.

    Args:
        case: its module.
        workers: of base and head.
        shuffle: draws the order of the two in a round.

    Returns:
        The last answer of each. ``reached``: it came to another group than the other one did.
    """
    answers = {each: each.ask(case=case) for each in workers}
    progress = Progress()
    while (group := _common_group(list(answers.values()))) is not None:
        progress.reached(group)
        order = list(workers)
        shuffle(order)
        for each in order:
            time.sleep(_SETTLE)
            answers[each] = each.ask(go=True)
    progress.reached(None)
    for each, answer in answers.items():
        if "reached" in answer:
            each.ask(stop=True)
    return [answers[each] for each in workers]


def _common_group(answers: Sequence[Mapping[str, Any]]) -> str | None:
    groups = {answer.get("reached") for answer in answers}
    return groups.pop() if len(groups) == 1 else None


def _compare_twice(cases: Sequence[str], workers: Sequence[Worker], threshold: float) -> Comparison:
    found = _compare_cases(cases, workers, threshold)
    doubtful = list(dict.fromkeys(change.case for change in found.worse))
    if not doubtful:
        return found
    say(f"again, in new processes, since something looks worse: {', '.join(doubtful)}")
    again = _compare_cases(doubtful, workers, threshold)
    second = {(each.case, each.group, each.name): each for each in again.changes}
    keys = [(each.case, each.group, each.name) for each in found.changes]
    found.changes = [
        settled(change, second[key]) if key in second else change
        for key, change in zip(keys, found.changes, strict=True)
    ]
    found.failures += again.failures
    found.remarks.append(f"Measured twice, since something looked worse: {', '.join(doubtful)}.")
    return found


def _compare_cases(cases: Sequence[str], workers: Sequence[Worker], threshold: float) -> Comparison:
    """Compare all of them in the same two processes."""
    found = Comparison()
    shuffle = random.Random().shuffle
    with ExitStack() as stack:
        for each in workers:
            stack.callback(each.close)
            each.start()
        for each in workers:
            each.require_ready()
        for name in cases:
            say(f"{name}: {CASES[name].summary}")
            module = CASES[name].run.__module__.partition(".")[2]
            answers = run_in_turns(module, workers, shuffle)
            found += compare_answers(name, workers, answers, threshold)
    return found


def compare_answers(
    case: str, workers: Sequence[Worker], answers: Sequence[Mapping[str, Any]], threshold: float
) -> Comparison:
    """What the last answers of base and head say of a case."""
    if all("outcome" in answer for answer in answers):
        before, after = (outcome_of(answer["outcome"]) for answer in answers)
        return compare_outcomes(case, before, after, _ratio, threshold)
    base_failed, head_failed = ("failed" in answer for answer in answers)
    reasons = [
        f"{each.label}: {answer['failed']}"
        for each, answer in zip(workers, answers, strict=True)
        if "failed" in answer
    ] or [
        f"{each.label} came to {answer.get('reached', 'the end')}"
        for each, answer in zip(workers, answers, strict=True)
    ]
    sentence = f"{case} was not compared: {'; '.join(reasons)}."
    if head_failed and not base_failed:
        return Comparison(failures=[sentence])
    return Comparison(remarks=[sentence])


def _ratio(head: Timing, base: Timing) -> Ratio:
    """Of paired rounds; some cases time in a way of their own, and as often as they like."""
    paired = len(head.seconds) == len(base.seconds)
    return ratio(head, base) if paired else ratio_of_runs(head, base)

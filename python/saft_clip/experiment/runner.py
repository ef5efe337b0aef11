"""Runs what an experiment needs and does not have yet, in as many processes as asked.

An experiment's folder::

    plan.yaml           what is compared, as it was last run
    trials/, cells/     the runs: what ``saft finetune`` writes, but for weights of whole models
    failures/           for each run that failed: why
    logs/               what the runs said
    report.html, results.csv, trials.csv, densities.csv, tables.md, tables.tex, tables.csv
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from saft_clip.console import console, progress, say, warn
from saft_clip.cores import usable_cores
from saft_clip.domains.extras import require
from saft_clip.errors import CheckpointError, ConfigError
from saft_clip.experiment.cells import Cell, Contest, final_cells, trial_cells
from saft_clip.experiment.inputs import check_inputs
from saft_clip.experiment.plan import Plan
from saft_clip.experiment.record import FAILURES, PLAN, choose, failure_file
from saft_clip.experiment.retrieval import has_retrieval, save_retrieval
from saft_clip.results import read_results
from saft_clip.run_folder import RunFolder, write_json
from saft_clip.run_lock import RunLock
from saft_clip.train import Known, finetune
from saft_kernels.errors import FileWriteError, SaftError
from saft_kernels.files import make_folder

#: Characters that are kept of an error: the page takes no more.
_MOST = 5_000

#: Of a whole model; not kept.
_WEIGHTS = "model.safetensors"


def run_experiment(plan: Plan, folder: Path, *, processes: int = 1, keep: bool = False) -> int:
    """Run every trial and cell that is not finished yet.

    A run that fails is recorded, and the others go on; it is tried again the next time. After an
    interruption, the same call goes on where it was stopped.

    Args:
        plan: what to run. It may be larger than the last time: what is there is not run again.
        folder: for everything; made if it is missing.
        processes: runs at the same time; each gets its share of the cores.
        keep: keep the weights of whole models that methods write, too.

    Returns:
        How many trials and cells failed.

    Raises:
        ConfigError: if the folder holds a run of ``saft finetune``.
        ModelError, DataError: if what the plan names is missing or does not suit it.
        LockedError: if another process is at work in the folder.
        FileWriteError: if the folder cannot be written to.
        MissingExtraError: if the package that starts the processes is not installed.
        KeyboardInterrupt: after Ctrl-C or SIGTERM; the same call goes on.
    """
    pool_module = require("pebble", "pebble", extra="lab", why="experiments")
    require("scipy.stats", "scipy", extra="lab", why="experiments")  # which the answers need
    if RunFolder(folder).started():
        raise ConfigError(f"{folder} holds a run of saft finetune: give another --output")
    check_inputs(plan)
    make_folder(folder)
    with RunLock(folder) as lock, _terminated_like_interrupted():
        lock.acquire()
        plan.save(folder / PLAN)
        context = multiprocessing.get_context("spawn")
        pool = pool_module.ProcessPool(
            processes,
            initializer=_start_worker,
            initargs=[
                max(1, usable_cores() // processes),
                gpus(),
                context.Value("i", 0),
                os.getpid(),
            ],
            context=context,
        )
        try:
            failed = _run_all(pool, plan, folder, keep)
            pool.close()
        except BaseException:
            pool.stop()
            raise
        finally:
            pool.join()
    return failed


def _run_all(pool: Any, plan: Plan, folder: Path, keep: bool) -> int:
    trials = list(trial_cells(plan, folder))
    failed = _run_cells(pool, "trials", trials, folder, keep=False)
    chosen = choose(trials)
    _say_untuned(trials, chosen)
    cells = list(final_cells(plan, folder, chosen))
    failed += _run_cells(pool, "cells", cells, folder, keep)
    if failed:
        warn(
            f"{failed} of {len(trials) + len(cells)} runs failed, see {folder / FAILURES}; the "
            "same command tries them again"
        )
    return failed


def _say_untuned(trials: Sequence[Cell], chosen: Mapping[Contest, Any]) -> None:
    for model, train, method in dict.fromkeys(cell.contest for cell in trials):
        if (model, train, method) not in chosen:
            warn(f"all trials of {method} on {train} ({model}) failed: it is left out")


def _run_cells(pool: Any, what: str, cells: Sequence[Cell], folder: Path, keep: bool) -> int:
    """Run what is missing; the number of those that failed."""
    done = {cell.name for cell in cells if _is_done(cell)}
    missing = [cell for cell in cells if cell.name not in done]
    for name in done:
        failure_file(folder, name).unlink(missing_ok=True)  # of another plan
        if not keep:  # left by a process that was killed
            (folder / name / _WEIGHTS).unlink(missing_ok=True)
    if len(missing) < len(cells):
        say(f"{len(cells) - len(missing)} of {len(cells)} {what} are there already")
    futures = {
        pool.schedule(_work, args=[cell, folder / "logs" / cell.name, keep]): cell
        for cell in missing
    }
    failed = 0
    with progress(what, len(missing), unit="runs", show=bool(missing)) as advance:
        for future in _as_they_end(futures):
            cell = futures[future]
            failure = failure_file(folder, cell.name)
            error = future.exception()
            if error is None:
                failure.unlink(missing_ok=True)
            else:
                failed += 1
                _record_failure(failure, cell, error)
            advance(note=cell.name)
    return failed


def _is_done(cell: Cell) -> bool:
    """Whether nothing is missing; what is broken is run, and says so."""
    try:
        read_results(cell.folder.results)
        return cell.finished() and has_retrieval(cell.folder.path, cell.retrieval)
    except SaftError:
        return False


def _as_they_end(futures: Iterable[Any]) -> Iterator[Any]:
    """Like ``concurrent.futures.as_completed``, which does not let Ctrl-C through for long."""
    left = set(futures)
    while left:
        ended = {future for future in left if future.done()}
        yield from ended
        left -= ended
        time.sleep(0.05)


def _record_failure(file: Path, cell: Cell, error: BaseException) -> None:
    expected = isinstance(error, SaftError)
    message = str(error) if expected else _why(error)
    if isinstance(error, CheckpointError | ConfigError) and cell.folder.started():
        message += f" (in an experiment: remove {cell.folder.path}, and it is run again)"
    warn(f"{cell.name} failed: {' '.join(message.split())}")
    try:
        make_folder(file.parent)
        write_json(
            file,
            {
                "cell": cell.name,
                "command": cell.config.command(),
                "error": message[:_MOST],
                "traceback": None if expected else _traceback(error)[-_MOST:],
            },
        )
    except FileWriteError as refused:  # the others may still have what they need
        warn(str(refused))


def _why(error: BaseException) -> str:
    code = getattr(error, "exitcode", None)
    if code is None:
        return f"{type(error).__name__}: {error}"
    if code == -signal.SIGKILL:
        return "its process was killed (SIGKILL), as happens when memory runs out"
    how = f"signal {-code}" if code < 0 else f"exit code {code}"
    return f"its process died ({how})"


def _traceback(error: BaseException) -> str:
    remote = getattr(error, "traceback", None)
    return str(remote) if remote else "".join(traceback.format_exception(error))


def gpus() -> list[str]:
    """The GPUs that processes take turns with, as ``CUDA_VISIBLE_DEVICES`` calls them."""
    allowed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if allowed is not None:
        return [name for name in allowed.split(",") if name.strip()]
    return [str(number) for number in range(torch.cuda.device_count())]


@contextmanager
def _terminated_like_interrupted() -> Iterator[None]:
    """SIGTERM ends the processes, too, rather than leaving them behind."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    try:
        previous = signal.signal(signal.SIGTERM, interrupt)
    except ValueError:  # not the main thread, which alone can handle signals
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


# In the processes --------------------------------------------------------------------------------

#: Evaluations of the pretrained models, for all cells of this process.
_known: Known = {}


def _start_worker(threads: int, devices: Sequence[str], started: Any, parent: int) -> None:
    """Prepare a process: its share of the cores, a GPU in turn, and an end with its parent."""
    torch.set_num_threads(min(threads, torch.get_num_threads()))  # OMP_NUM_THREADS may be less
    with started.get_lock():
        number, started.value = started.value, started.value + 1
    if devices:  # before anything looks at the GPUs
        os.environ["CUDA_VISIBLE_DEVICES"] = devices[number % len(devices)]
    threading.Thread(target=_end_with, args=[parent], daemon=True).start()


def _end_with(parent: int) -> None:
    """A process whose parent was killed would go on, and keep its lock and its GPU."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _work(cell: Cell, log: Path, keep: bool) -> None:
    """Run one cell; what it says goes to its log."""
    make_folder(log.parent)
    with log.with_name(f"{log.name}.txt").open("a", encoding="utf-8") as file:
        console.file = file
        result = finetune(cell.config, _known)
        if cell.retrieval:
            save_retrieval(cell.config, result, cell.retrieval)
    if not keep:
        (result.output / _WEIGHTS).unlink(missing_ok=True)
    if torch.cuda.is_initialized():  # what the next run of another process may need
        torch.cuda.empty_cache()

"""Two processes never write into the folder of one run, and whoever is gone holds no lock."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import signal
from contextlib import suppress
from pathlib import Path

import pytest

from clip_helpers import SMALL, left_by_a_kill, small_checkpoint, write_folder
from saft_clip import run_lock, train
from saft_clip.config import FinetuneConfig
from saft_clip.demo import run_demo
from saft_clip.errors import ConfigError, LockedError
from saft_clip.run_folder import RunFolder
from saft_clip.run_lock import NAME, RunLock
from saft_clip.train import finetune
from saft_kernels.errors import FileWriteError

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def config(tmp_path):
    weights = small_checkpoint(tmp_path / "small.safetensors")
    pets = write_folder(tmp_path / "pets", {"cat": 3, "dog": 3})
    return FinetuneConfig(
        train_data=str(pets),
        model=SMALL,
        pretrained=str(weights),
        shots=2,
        epochs=1,
        batch_size=2,
        density=0.01,
        precision="fp32",
        output=str(tmp_path / "run"),
    )


def hold(folder, with_child, ready):
    """What another process does: it locks the folder and says so through a pipe."""
    RunLock(Path(folder)).acquire()
    if with_child and os.fork():
        signal.pause()  # the child says so, once its locks are its own affair
    os.write(ready, b"!")
    signal.pause()


@pytest.fixture
def holder():
    """Starts another process that holds the lock of a folder; its number."""
    groups = []

    def start(folder, *, with_child=False):
        said, ready = os.pipe()
        process = os.fork()
        if process == 0:
            try:
                os.setsid()
                hold(folder, with_child, ready)
            finally:
                os._exit(1)
        groups.append(process)
        os.close(ready)
        assert os.read(said, 1)
        os.close(said)
        return process

    yield start
    for process in groups:
        with suppress(ProcessLookupError):  # one that a test has killed
            os.killpg(process, signal.SIGKILL)
        with suppress(ChildProcessError):
            os.waitpid(process, 0)


# The lock


def test_a_second_process_is_refused_and_told_who_is_there(tmp_path, holder):
    process = holder(tmp_path)
    lock = RunLock(tmp_path)
    with pytest.raises(LockedError) as caught:
        lock.acquire()
    assert str(caught.value) == (
        f"{tmp_path} is in use: process {process} on {os.uname().nodename} is writing to it; "
        "wait until that has ended, or give another --output"
    )
    lock.release()  # of somebody else's lock, nothing
    assert (tmp_path / NAME).exists()


def test_a_killed_process_holds_no_lock_not_even_through_its_children(tmp_path, holder):
    process = holder(tmp_path, with_child=True)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    assert (tmp_path / NAME).exists()
    with RunLock(tmp_path) as lock:
        lock.acquire()
        assert str(os.getpid()) in (tmp_path / NAME).read_text()
    assert os.listdir(tmp_path) == []


def test_a_copied_lock_file_is_no_lock(tmp_path, holder):
    """It is the file that is locked, not what it says."""
    holder(tmp_path)
    copy = shutil.copytree(tmp_path, tmp_path.with_name("copy"))
    with RunLock(copy) as lock:
        lock.acquire()


def test_two_locks_of_one_process_exclude_each_other(tmp_path):
    first, second = RunLock(tmp_path), RunLock(tmp_path)
    first.acquire()
    first.acquire()  # again is harmless
    with pytest.raises(LockedError, match=f"process {os.getpid()} "):
        second.acquire()
    first.release()
    first.release()
    second.acquire()
    second.release()
    assert os.listdir(tmp_path) == []


def test_a_lock_that_is_released_while_another_waits_in_front_of_it(tmp_path, monkeypatch):
    """The file that was opened is gone when it is locked: its lock would be worth nothing."""
    first, second = RunLock(tmp_path), RunLock(tmp_path)
    first.acquire()
    flock = fcntl.flock

    def late(descriptor, operation):
        first.release()
        flock(descriptor, operation)

    monkeypatch.setattr(run_lock.fcntl, "flock", late)
    second.acquire()
    monkeypatch.undo()
    with pytest.raises(LockedError):
        first.acquire()
    second.release()


def test_a_release_that_is_interrupted_releases(tmp_path, monkeypatch):
    lock, other = RunLock(tmp_path), RunLock(tmp_path)
    lock.acquire()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", interrupted)
        with pytest.raises(KeyboardInterrupt):
            lock.release()
    other.acquire()
    other.release()


def interrupted(path):
    raise KeyboardInterrupt


def test_a_file_system_without_locks_is_warned_of(tmp_path, monkeypatch, capsys):
    def refuse(descriptor, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(run_lock.fcntl, "flock", refuse)
    with RunLock(tmp_path) as lock:
        lock.acquire()
    assert "cannot be locked (No locks available)" in capsys.readouterr().err
    assert os.listdir(tmp_path) == []


def test_the_holder_is_not_known_on_a_full_disk(tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    first = RunLock(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(run_lock.os, "pwrite", full)
        first.acquire()
    with pytest.raises(LockedError, match="in use: another process is writing to it"):
        RunLock(tmp_path).acquire()
    first.release()


def test_a_folder_that_cannot_be_written_to(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileWriteError, match=r"file could not be written \(Not a directory\)"):
        RunLock(tmp_path / "file").acquire()


# Runs


@pytest.mark.parametrize("resume", [False, True])
def test_a_run_in_a_folder_in_use_is_refused_before_its_work(config, holder, monkeypatch, resume):
    folder = Path(config.output)
    folder.mkdir()
    if resume:
        config.save(folder / "config.yaml")
    process = holder(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.delattr(train, "load_base")
    with pytest.raises(LockedError, match=rf"run is in use: process {process} on"):
        finetune(config.changed(resume=resume))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_folder_that_comes_into_use_while_a_run_is_prepared(config, holder, monkeypatch):
    folder = Path(config.output)
    describe = train.fingerprint_of

    def slowly(model):
        folder.mkdir()
        holder(folder)
        return describe(model)

    monkeypatch.setattr(train, "fingerprint_of", slowly)
    with pytest.raises(LockedError, match="is in use"):
        finetune(config)
    assert [path.name for path in folder.iterdir()] == [NAME]


def test_a_run_that_came_first_meanwhile_is_not_touched(config, monkeypatch):
    """It has even ended: nobody holds the lock any more."""
    describe = train.fingerprint_of

    def slowly(model):
        monkeypatch.undo()
        finetune(config)
        return describe(model)

    monkeypatch.setattr(train, "fingerprint_of", slowly)
    with pytest.raises(ConfigError, match="already holds a finished run"):
        finetune(config.changed(lr=1e-3))
    assert FinetuneConfig.load(Path(config.output) / "config.yaml") == config
    assert finetune(config.changed(resume=True)).artefact.exists()


def test_the_lock_is_held_during_a_run_and_gone_after_it(config, monkeypatch):
    seen = []
    prepare = train.Run.prepare

    def watched(run):
        with pytest.raises(LockedError):
            RunLock(run.folder.path).acquire()
        seen.append(run)
        prepare(run)

    monkeypatch.setattr(train.Run, "prepare", watched)
    finetune(config)
    assert seen
    assert not (Path(config.output) / NAME).exists()


def test_the_lock_is_gone_after_a_failure(config, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(train.Run, "prepare", lambda run: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            finetune(config)
    assert not (Path(config.output) / NAME).exists()
    finetune(config.changed(resume=True))


def test_a_run_goes_on_where_one_was_killed_and_clears_up(config):
    """With its lock file, half-written files, and checkpoints of a run that had just finished."""
    folder = RunFolder(config.output)
    finetune(config)
    (folder.path / NAME).write_text("process 1 on nowhere\n")
    folder.checkpoints.mkdir()
    left_by_a_kill(folder.checkpoints / "step-00000002.safetensors")
    left_by_a_kill(folder.report)
    folder.report.unlink()
    finetune(config.changed(resume=True))
    assert sorted(path.name for path in folder.path.iterdir()) == [
        *("config.yaml", "delta.safetensors", "inputs.json", "mask.safetensors"),
        *("metrics.jsonl", "report.html", "results.json"),
    ]


def test_a_finished_run_is_only_read(config, holder, monkeypatch):
    """Its folder may be read-only by now."""
    first = finetune(config)
    holder(first.output)
    assert finetune(config.changed(resume=True)) == first


def test_two_demos_in_one_folder(tmp_path, holder):
    holder(tmp_path)
    with pytest.raises(LockedError, match="is in use"):
        run_demo(tmp_path)

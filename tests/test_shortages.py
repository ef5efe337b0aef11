"""Disk, memory and data that are not there when they are needed: one sentence, and on it goes."""

from __future__ import annotations

import errno
import multiprocessing
import os
import re
import resource
import shutil
import signal
import subprocess
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from PIL import Image

from clip_helpers import SMALL, small_checkpoint, write_folder, write_image
from crashes.outcome import record
from saft_clip import metrics, train
from saft_clip.cli import main
from saft_clip.config import FinetuneConfig
from saft_clip.data import few_shot, find_duplicates, images, load_dataset
from saft_clip.errors import ConfigError, OutOfMemoryError, WorkerError
from saft_clip.metrics import MetricsLog, read_metrics
from saft_clip.run_folder import describe_data
from saft_clip.shortages import explained_shortages, is_shortage
from saft_clip.train import finetune
from saft_kernels.errors import FileWriteError, SaftError

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A run of two epochs of two steps, validated and evaluated."""
    folder = tmp_path_factory.mktemp("inputs")
    for split in ("train", "val", "test"):
        write_folder(folder / "pets" / split, {"cat": 2, "dog": 2})
    return FinetuneConfig(
        train_data=str(folder / "pets"),
        model=SMALL,
        pretrained=str(small_checkpoint(folder / "small.safetensors")),
        shots=2,
        batch_size=2,
        epochs=2,
        lr=1e-2,
        density=0.01,
        precision="fp32",
        output=str(folder / "undisturbed"),
    )


@pytest.fixture(scope="module")
def undisturbed(inputs):
    """What comes out of that run."""
    return finetune(inputs).output


@pytest.fixture
def config(inputs, tmp_path):
    """The same run in another folder."""
    return inputs.changed(output=str(tmp_path / "run"))


@pytest.fixture
def comes_out_the_same(undisturbed):
    """Resumes a run; its result must be that of the one that nothing stopped."""

    def check(config):
        folder = finetune(config.changed(resume=True)).output
        for name in ("delta.safetensors", "mask.safetensors"):
            assert (folder / name).read_bytes() == (undisturbed / name).read_bytes()
        names = [sorted(path.name for path in run.iterdir()) for run in (folder, undisturbed)]
        assert names[0] == names[1]
        assert record(folder / "metrics.jsonl") == record(undisturbed / "metrics.jsonl")

    return check


@pytest.fixture
def fails(capsys):
    """Runs a command that must fail; returns its one sentence and all that it said before."""

    def run(*arguments):
        capsys.readouterr()
        assert main([str(argument) for argument in arguments]) == 1
        *before, last = capsys.readouterr().err.rstrip("\n").splitlines()
        assert "Traceback" not in "\n".join(before)
        assert last.startswith("saft: ")
        return last, "\n".join(before)

    return run


# Disk; tests/crashes refuses every single call


@contextmanager
def small_disk(folder, kilobytes):
    """A disk of that size at a folder; a function that makes it larger or read-only."""
    folder.mkdir(exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting a small disk needs rights that this process has not")

    def change(option):
        subprocess.run(["mount", "-o", f"remount,{option}", str(folder)], check=True)

    try:
        yield change
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("kilobytes", [12, 180])
def test_a_disk_that_fills_up(config, fails, comes_out_the_same, tmp_path, kilobytes):
    """Before and after the first checkpoint."""
    with small_disk(tmp_path / "disk", kilobytes) as change:
        ours = config.changed(output=str(tmp_path / "disk" / "run"))
        ours.save(tmp_path / "config.yaml")
        said, before = fails("finetune", "--config", tmp_path / "config.yaml")
        assert "could not be written (No space left on device): free some space" in said
        left = [path for path in (tmp_path / "disk").rglob("*") if path.name.startswith(".")]
        assert left == []
        command = f"saft finetune --resume --output {ours.output}"
        assert (command in before) == (Path(ours.output) / "config.yaml").exists()
        change("size=10m")
        comes_out_the_same(ours)


def test_a_disk_that_is_read_only(config, fails, comes_out_the_same, tmp_path, monkeypatch):
    """When a run is to go on; and a finished run on one is read as any other."""
    with small_disk(tmp_path / "disk", 10_000) as change:
        ours = config.changed(output=str(tmp_path / "disk" / "run"))
        stop_after_a_step(ours, monkeypatch)
        change("ro")
        said, _ = fails("finetune", "--resume", "--output", ours.output)
        assert f"{ours.output} could not be written (Read-only file system): choose a" in said
        change("rw")
        comes_out_the_same(ours)
        change("ro")
        assert finetune(ours.changed(resume=True)).artefact.exists()


def stop_after_a_step(config, monkeypatch):
    steps = train.Trainer.steps

    def interrupt(trainer):
        for taken in steps(trainer):
            os.kill(os.getpid(), signal.SIGINT)
            yield taken

    with monkeypatch.context() as patch:
        patch.setattr(train.Trainer, "steps", interrupt)
        with pytest.raises(KeyboardInterrupt):
            finetune(config)


def test_a_record_that_cannot_be_written_says_so_and_can_be_closed(tmp_path, monkeypatch):
    """Half a line is on the disk then; what could not be written is not tried again on closing."""
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.write("train", 1, loss=0.5)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (log.size() + 10, hard))
    try:
        with pytest.raises(FileWriteError, match=r"metrics.jsonl could not be written \(File too"):
            log.write("train", 2, loss=0.25)
        log.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (tmp_path / "metrics.jsonl").read_text().endswith('\n{"kind": "')
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1]


def test_a_record_that_cannot_be_flushed_says_so(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    log = MetricsLog(tmp_path / "metrics.jsonl")
    monkeypatch.setattr(metrics.os, "fsync", full)
    with pytest.raises(FileWriteError, match=r"metrics.jsonl .*No space left on device"):
        log.size()
    log.close()


def test_a_tensorboard_that_cannot_be_written_says_so(tmp_path, monkeypatch):
    log = MetricsLog(tmp_path / "metrics.jsonl", tensorboard=tmp_path / "tensorboard")

    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(log._writer, "add_scalar", full)
    with pytest.raises(FileWriteError, match="No space left on device"):
        log.write("train", 1, loss=0.5)
    monkeypatch.setattr(log._writer, "close", full)
    with pytest.raises(FileWriteError, match="No space left on device"):
        log.close()


def test_missing_tensorboard_leaves_nothing_behind(config, monkeypatch):
    """The command can be given again without it."""

    def missing(folder, step):
        raise ConfigError("--tensorboard needs the tensorboard package")

    monkeypatch.setattr(metrics, "_open_tensorboard", missing)
    with pytest.raises(ConfigError, match="needs the tensorboard package"):
        finetune(config.changed(tensorboard=True))
    assert finetune(config).artefact.exists()


# Memory


class Deadly:
    """A transform that kills the process it runs in, or fails there, when it is called again.

    Args:
        transform: what it does besides.
        after: calls that go well, in each process.
        how: what happens then.
    """

    def __init__(self, transform, after, how):
        self.transform, self.after, self.how = transform, after, how
        self.main = os.getpid()

    def __call__(self, image):
        if os.getpid() != self.main:
            self.after -= 1
            if self.after < 0:
                self.how()
        return self.transform(image)


def killed():
    os.kill(os.getpid(), signal.SIGKILL)


def out_of_memory():
    resource.setrlimit(resource.RLIMIT_AS, (1 << 33, 1 << 33))
    bytearray(1 << 34)


def out_of_memory_in_torch():
    resource.setrlimit(resource.RLIMIT_AS, (1 << 33, 1 << 33))
    torch.empty(1 << 34, dtype=torch.uint8)


def deadly_data(monkeypatch, which, after, how):
    """Let loading processes of one of a run's data sets come to grief."""
    original = train.RunData

    class Data(original):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            dataset = getattr(self, which)
            dataset.transform = Deadly(dataset.transform, after, how)

    monkeypatch.setattr(train, "RunData", Data)


KILLED = r"a process that loads images (was killed \(Killed\)|has died), as happens when memory"
SHORT = "memory ran out in a process that loads images: close other programs, or give fewer"


@pytest.mark.parametrize(
    ("which", "after", "how", "message"),
    [
        ("plain", 1, out_of_memory_in_torch, SHORT),  # selection
        ("train", 4, killed, KILLED),  # a step
        ("validation", 2, out_of_memory, SHORT),
    ],
)
def test_memory_runs_out_in_a_loading_process(
    config, comes_out_the_same, monkeypatch, capsys, which, after, how, message
):
    ours = config.changed(workers=1)
    with monkeypatch.context() as patch:
        deadly_data(patch, which, after, how)
        with pytest.raises((WorkerError, OutOfMemoryError), match=message) as caught:
            finetune(ours)
    assert "\n" not in str(caught.value)
    going_on = f"continue with\n  saft finetune --resume --output {ours.output}\n"
    assert going_on in capsys.readouterr().err
    comes_out_the_same(ours)


def test_the_command_line_says_it_in_one_sentence(config, fails, monkeypatch):
    config.changed(workers=1).save(Path(config.output).with_suffix(".yaml"))
    deadly_data(monkeypatch, "train", 1, killed)
    said, _ = fails("finetune", "--config", Path(config.output).with_suffix(".yaml"))
    assert re.match(f"saft: {KILLED}", said)


def test_memory_that_runs_out_here(config, monkeypatch):
    def short(trainer, *arguments):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    with monkeypatch.context() as patch:
        patch.setattr(train.Trainer, "_backward", short)
        with pytest.raises(OutOfMemoryError, match=r"^memory ran out: close other programs"):
            finetune(config)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), "memory ran out: "),
        (OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)), "memory ran out: "),
        (OSError(errno.EMFILE, os.strerror(errno.EMFILE)), "too many open files: .*ulimit -n"),
        (RuntimeError("unable to allocate shared memory(shm) for file </x>"), "no shared memory"),
        (
            RuntimeError(
                "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that "
                "dataloader's workers are out of shared memory."
            ),
            "there is no shared memory left for images",
        ),
        (RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly"), "images has died, as"),
    ],
)
def test_what_torch_and_python_raise_is_explained(error, expected):
    with pytest.raises(SaftError, match=expected) as caught, explained_shortages():
        raise error
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is error


def test_a_process_that_dies_while_it_sends_is_explained():
    """As happened: the connection is gone, and torch's signal handler has not yet been called."""
    ours, theirs = multiprocessing.Pipe()
    theirs.close()
    with pytest.raises(WorkerError, match="loads images has died, as"), explained_shortages():
        ours.recv()
    with pytest.raises(EOFError), explained_shortages():
        raise EOFError("a file that ends too early, say")


@pytest.mark.parametrize(
    "error", [RuntimeError("a bug"), OSError(errno.EIO, "Input/output error"), FileWriteError("no")]
)
def test_other_errors_stay_what_they_are(error):
    with pytest.raises(type(error)) as caught, explained_shortages():
        raise error
    assert caught.value is error
    assert not is_shortage(error)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OSError(errno.EMFILE, os.strerror(errno.EMFILE)),
        OSError("out of memory error when reading image file"),  # PIL's own
    ],
)
def test_an_image_is_not_called_unreadable_when_memory_is_short(tmp_path, monkeypatch, error):
    """It would be left out of a sample or an evaluation, and the result be another one."""

    def fail(image):
        raise error

    path = write_image(tmp_path / "a.png")
    monkeypatch.setattr(images, "to_rgb", fail)
    with pytest.raises(type(error)):
        images.source_of(str(path)).open()
    root = write_folder(tmp_path / "pets", {"cat": 2, "dog": 2})
    with pytest.raises(type(error)):
        few_shot(load_dataset(str(root), "train", lambda image: image), 1, 0)
    part = images.ImagePart(str(path), "a.png", 0, 10)
    monkeypatch.setattr(images.ImagePart, "_stored", fail)
    with pytest.raises(type(error)):
        part.open()
    dataset = load_dataset(str(root), "train", lambda image: image)
    monkeypatch.setattr(images.ImageFile, "_stored", fail)
    with pytest.raises(type(error)):
        find_duplicates([dataset], decode=False)


# Data that change between two runs


def recolour(folder):
    """Another image of the same size in the same place."""
    path = folder / "cat" / "000.png"
    with Image.open(path) as image:
        rotated = image.rotate(180)
    rotated.save(path)


CHANGES = {
    "another image": recolour,
    "one more": lambda folder: write_image(folder / "cat" / "more.png"),
    "one less": lambda folder: (folder / "dog" / "001.png").unlink(),
    "another name": lambda folder: (folder / "dog" / "001.png").rename(folder / "dog" / "9.png"),
}


@pytest.fixture(scope="module")
def clip(inputs):
    return train.load_base(inputs)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_a_change_of_any_data_is_seen(inputs, clip, tmp_path, split, change):
    root = shutil.copytree(inputs.train_data, tmp_path / "pets")
    config = inputs.changed(train_data=str(root), shots=0)
    before = train.RunData(config, clip).describe()
    CHANGES[change](root / split)
    after = train.RunData(config, clip).describe()
    name = {
        "train": "the training data",
        "val": "the validation data",
        "test": f"the evaluation data {root}",
    }[split]
    assert [key for key in before if before[key] != after[key]] == [name]


def test_a_run_whose_data_changed_is_refused_until_they_are_put_back(
    config, inputs, fails, comes_out_the_same, monkeypatch
):
    stop_after_a_step(config, monkeypatch)
    folder = Path(inputs.train_data) / "test"
    kept = shutil.copytree(folder, folder.with_name("kept"))
    recolour(folder)
    said, _ = fails("finetune", "--resume", "--output", config.output)
    assert (
        f"the evaluation data {inputs.train_data} changed since the run in {config.output}" in said
    )
    assert "put it back as it was, or start again with another --output" in said
    shutil.rmtree(folder)
    kept.rename(folder)
    comes_out_the_same(config)


def test_an_image_that_changed_in_its_middle_is_found_where_content_counts(tmp_path):
    root = write_folder(tmp_path / "pets", {"cat": 1, "dog": 1}, suffix=".bmp")
    path = root / "cat" / "000.bmp"
    Image.new("RGB", (100, 100), "white").save(path)
    dataset = load_dataset(str(root), "train", lambda image: image)
    before = [describe_data(dataset, content=content) for content in (False, True)]
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)
    after = [describe_data(dataset, content=content) for content in (False, True)]
    assert [a == b for a, b in zip(before, after, strict=True)] == [True, False]

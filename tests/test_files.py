"""Writing a file is all or nothing."""

from __future__ import annotations

import errno
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from clip_helpers import left_by_a_kill
from saft_kernels import files
from saft_kernels.errors import FileWriteError, SaftError
from saft_kernels.files import atomic_write, remove_leftovers, sort_metadata


def test_a_new_file_holds_what_was_written(tmp_path: Path) -> None:
    with atomic_write(tmp_path / "a.txt") as temporary:
        assert temporary.parent.parent == tmp_path
        temporary.write_text("new")
    assert (tmp_path / "a.txt").read_text() == "new"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_the_old_content_stays_until_the_block_ends(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    target.write_text("old")
    with atomic_write(target) as temporary:
        temporary.write_text("new")
        assert target.read_text() == "old"
    assert target.read_text() == "new"


def test_what_a_killed_writer_leaves_is_hidden_and_can_be_removed(tmp_path: Path) -> None:
    mine = ["a.safetensors.01ab89ef.tmp", ".tmpAb3dE6", ".b.txt.01ab89ef.tmp", ".a.safetensors.tmp"]
    for name in mine:
        (tmp_path / name).write_text("of somebody else")
    left_by_a_kill(tmp_path / "a.safetensors")
    code = f"""
import os, signal, torch
from safetensors.torch import save_file
from saft_kernels.files import atomic_write
with atomic_write({str(tmp_path / "a.safetensors")!r}) as temporary:
    save_file({{"x": torch.zeros(9)}}, temporary)
    os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-c", code], check=False)
    left = sorted(set(os.listdir(tmp_path)) - set(mine))
    assert len(left) == 2
    assert all(re.fullmatch(r"\.a\.safetensors\.[0-9a-f]{8}\.tmp", name) for name in left)
    remove_leftovers(tmp_path, ["a.*"])
    assert sorted(os.listdir(tmp_path)) == sorted(mine)
    remove_leftovers(tmp_path / "missing", ["a.*"])


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt()])
def test_an_exception_in_the_block_keeps_the_old_file(tmp_path: Path, error: BaseException) -> None:
    target = tmp_path / "a.txt"
    target.write_text("old")

    def write() -> None:
        with atomic_write(target) as temporary:
            temporary.write_text("half")
            raise error

    with pytest.raises(type(error)):
        write()
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_an_existing_file_keeps_its_permissions_and_a_new_one_follows_the_umask(
    tmp_path: Path,
) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    old.write_text("old")
    old.chmod(0o640)
    previous = os.umask(0o027)
    try:
        for target in (old, new):
            with atomic_write(target) as temporary:
                # safetensors replaces the file by one of its own, readable by its owner only
                save_file({"x": torch.ones(3)}, temporary)
    finally:
        os.umask(previous)
    assert stat.S_IMODE(old.stat().st_mode) == 0o640
    assert stat.S_IMODE(new.stat().st_mode) == 0o640
    assert load_file(new)["x"].sum() == 3


def test_a_symbolic_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with atomic_write(tmp_path / "link") as temporary:
        temporary.write_text("new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "new"


@pytest.mark.parametrize(
    ("where", "number", "advice"),
    [
        ("missing/a", errno.ENOENT, "create the folder first"),
        ("file/a", errno.ENOTDIR, "whose parents are folders"),
        ("folder", errno.EISDIR, "not a folder"),
    ],
)
def test_an_impossible_place_is_one_clear_sentence(
    tmp_path: Path, where: str, number: int, advice: str
) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    with pytest.raises(FileWriteError, match=advice) as caught, atomic_write(tmp_path / where):
        pass
    assert str(tmp_path / where) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.errno == number
    assert isinstance(caught.value, SaftError)


def test_a_read_only_folder_is_one_clear_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object) -> int:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(files.os, "open", refuse)  # root may write to any folder
    with (
        pytest.raises(FileWriteError, match="choose a folder that can be written to"),
        atomic_write(tmp_path / "a"),
    ):
        pass


FULL_DISK = """
import resource, sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from saft_kernels.errors import FileWriteError
from saft_kernels.files import atomic_write, sort_metadata

resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
def write_tensors(path): save_file({"x": torch.zeros(10_000)}, path)
def write_bytes(path): path.write_bytes(bytes(10_000))
for write in (write_tensors, write_bytes):
    try:
        with atomic_write(sys.argv[1]) as temporary:
            write(temporary)
    except FileWriteError as error:
        assert "write to a disk that allows files of this size" in str(error), error
    else:
        raise SystemExit("the limit was not hit")
"""


def test_a_write_that_the_disk_refuses_keeps_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "a.safetensors"
    target.write_text("old")
    subprocess.run([sys.executable, "-c", FULL_DISK, str(target)], check=True)
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.safetensors"]


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    target = tmp_path / "a"
    target.write_text("old")
    monkeypatch.setattr(files.os, "fsync", full)
    with (
        pytest.raises(FileWriteError, match=r"No space left on device.*free some space"),
        atomic_write(target) as temporary,
    ):
        temporary.write_text("new")
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["a"]


def test_same_content_gives_the_same_bytes(tmp_path):
    """safetensors writes its metadata in random order."""
    metadata = {"b": 'a "quoted" text', "ä": "ünï\n\t\x01", "c": "3", "a": "1"}
    tensors = {"y": torch.arange(3), "x": torch.zeros(2)}
    contents = set()
    for _ in range(8):
        save_file(tensors, tmp_path / "file", metadata)
        sort_metadata(tmp_path / "file")
        contents.add((tmp_path / "file").read_bytes())
    assert len(contents) == 1
    with safe_open(tmp_path / "file", framework="pt") as file:
        assert file.metadata() == metadata
        assert file.get_tensor("y").tolist() == [0, 1, 2]


def test_sorted_metadata_make_the_same_bytes_and_keep_every_character(tmp_path: Path) -> None:
    texts = {"b": 'quote " \\ é 日 \x00 \x7f \b \f \n \u2028', "a": "1", "c": "", "é": "x"}
    written = set()
    for attempt in range(8):
        path = tmp_path / f"{attempt}.safetensors"
        save_file({"x": torch.arange(5.0)}, path, texts)
        sort_metadata(path)
        written.add(path.read_bytes())
        assert torch.equal(load_file(path)["x"], torch.arange(5.0))
        with safe_open(path, framework="pt") as file:
            assert file.metadata() == texts
    assert len(written) == 1

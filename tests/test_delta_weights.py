"""Files of weights: read without running anything, written whole."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from saft_kernels.delta import extract, open_weights, save_weights
from saft_kernels.errors import FileWriteError, WeightsFileError

WEIGHTS = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(2), "c": torch.zeros(0)}


def assert_weights(found: dict[str, torch.Tensor]) -> None:
    assert found.keys() == WEIGHTS.keys()
    for name, tensor in WEIGHTS.items():
        assert torch.equal(found[name], tensor)
        assert found[name].dtype == tensor.dtype


def test_both_kinds_of_files(tmp_path: Path) -> None:
    save_file(WEIGHTS, tmp_path / "a.safetensors")
    save_file(WEIGHTS, tmp_path / "no-suffix")
    torch.save(WEIGHTS, tmp_path / "a.pt")
    torch.save(WEIGHTS, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    for file in tmp_path.iterdir():
        assert_weights(open_weights(file))


@pytest.mark.parametrize("key", ["state_dict", "model"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "_orig_mod.module."])
def test_what_training_puts_around_them(key: str, prefix: str, tmp_path: Path) -> None:
    wrapped = {f"{prefix}{name}": tensor for name, tensor in WEIGHTS.items()}
    content = {key: wrapped, "epoch": 3, "optimizer": {"state": {0: torch.ones(2)}}}
    torch.save(content, tmp_path / "checkpoint.pt")
    if prefix == "_orig_mod.module.":  # the outer wrapper comes off last
        assert open_weights(tmp_path / "checkpoint.pt").keys() == {
            f"module.{name}" for name in WEIGHTS
        }
    else:
        assert_weights(open_weights(tmp_path / "checkpoint.pt"))


def test_a_prefix_that_only_some_have_stays(tmp_path: Path) -> None:
    torch.save({"module.a": torch.ones(1), "b": torch.ones(1)}, tmp_path / "a.pt")
    assert open_weights(tmp_path / "a.pt").keys() == {"module.a", "b"}


class Evil:
    """What a pickle can do to those who load it."""

    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self):
        return os.mkdir, (str(self.victim),)


@pytest.mark.parametrize("zipped", [True, False])
def test_nothing_in_a_pickle_is_run(zipped: bool, tmp_path: Path) -> None:
    content = {"a": torch.ones(2), "hook": Evil(tmp_path / "owned")}
    torch.save(content, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    (tmp_path / "b.pt").write_bytes(pickle.dumps(Evil(tmp_path / "owned")))
    for name in ("a.pt", "b.pt"):
        with pytest.raises(WeightsFileError, match="holds more than tensors"):
            open_weights(tmp_path / name)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    "content", [b"", b"x", b"{}", bytes(100), b"\x80\x02." * 9, b"PK\x03\x04xx"]
)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors", ""])
def test_broken_files_are_one_sentence(content: bytes, suffix: str, tmp_path: Path) -> None:
    file = tmp_path / f"weights{suffix}"
    file.write_bytes(content)
    with pytest.raises(WeightsFileError) as error:
        open_weights(file)
    assert str(file) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_files_that_were_cut_short(suffix: str, share: float, tmp_path: Path) -> None:
    file = tmp_path / f"weights{suffix}"
    if suffix == ".pt":
        torch.save(WEIGHTS, file)
    else:
        save_file(WEIGHTS, file)
    os.truncate(file, int(share * file.stat().st_size))
    with pytest.raises(WeightsFileError, match=str(file)):
        open_weights(file)


@pytest.mark.parametrize("content", [[1, 2], {"a": 1}, torch.ones(2), {}])
def test_files_without_tensors_by_name(content: object, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(WeightsFileError, match="holds no tensors by name"):
        open_weights(tmp_path / "a.pt")


def test_missing_file_and_folder(tmp_path: Path) -> None:
    for path in (tmp_path / "missing.pt", tmp_path / "missing.safetensors", tmp_path):
        with pytest.raises(WeightsFileError, match="cannot be read"):
            open_weights(path)


_PEAK = """
import resource, sys
from saft_kernels.delta import extract, open_weights
base, tuned = map(open_weights, sys.argv[1:])
def anonymous():
    text = open("/proc/self/status").read()
    return int(text.partition("RssAnon:")[2].split()[0])
before = anonymous()
resource.setrlimit(resource.RLIMIT_DATA, ((before + 60_000) * 1024 * 4, -1))
found = extract(tuned, base)
print(anonymous() - before, found.delta.nnz)
"""


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_two_large_files_need_little_memory(suffix: str, tmp_path: Path) -> None:
    """They stay in their files: what is compared at a time is a megabyte or some."""
    base = {f"layer{i}": torch.randn(2_000_000) for i in range(8)}  # 64 MB
    tuned = {name: tensor.clone() for name, tensor in base.items()}
    tuned["layer3"][5] = 1e3
    for name, tensors in (("base", base), ("tuned", tuned)):
        file = tmp_path / f"{name}{suffix}"
        save_file(tensors, file) if suffix == ".safetensors" else torch.save(tensors, file)
    files = [str(tmp_path / f"{name}{suffix}") for name in ("base", "tuned")]
    done = subprocess.run(
        [sys.executable, "-c", _PEAK, *files], capture_output=True, text=True, check=True
    )
    grown, nnz = map(int, done.stdout.split())
    assert nnz == 1
    assert grown < 48_000  # kB, of 128 MB in the files


def test_written_weights_are_read_again(tmp_path: Path) -> None:
    tied = torch.randn(4, 4)
    tensors = {"a": tied, "b": tied, "view": tied[1:3], "t": tied.t(), "n": torch.tensor(3)}
    file = tmp_path / "w.safetensors"
    save_weights(file, tensors)
    found = load_file(file)
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor), name
    first = file.read_bytes()
    save_weights(file, tensors)
    assert file.read_bytes() == first
    assert extract(open_weights(file), tensors).delta.nnz == 0


def test_what_cannot_be_written_leaves_the_old_file(tmp_path: Path) -> None:
    with pytest.raises(FileWriteError):
        save_weights(tmp_path / "missing" / "w.safetensors", WEIGHTS)

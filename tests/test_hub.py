"""Deltas in repositories of the hub; huggingface_hub is stood in for, and nothing is sent."""

from __future__ import annotations

import inspect
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled

from saft_clip import hub
from saft_clip.cli import main
from saft_clip.errors import HubError
from saft_kernels.delta import SparseDelta
from saft_kernels.errors import DeltaFormatError
from small_deltas import tuned_pair

#: What is stood in for.
API, DOWNLOAD = huggingface_hub.HfApi, huggingface_hub.hf_hub_download


class Hub:
    """Repositories as folders; takes what huggingface_hub's own functions take."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.private: dict[str, bool] = {}
        self.messages: list[str] = []

    def create_repo(self, *args: Any, **kwargs: Any) -> None:
        given = bound(API.create_repo, *args, **kwargs)
        assert given["exist_ok"]
        self.private.setdefault(given["repo_id"], given["private"])
        (self.root / given["repo_id"]).mkdir(parents=True, exist_ok=True)

    def file_exists(self, *args: Any, **kwargs: Any) -> bool:
        given = bound(API.file_exists, *args, **kwargs)
        return (self.root / given["repo_id"] / given["filename"]).exists()

    def create_commit(self, *args: Any, **kwargs: Any) -> huggingface_hub.CommitInfo:
        given = bound(API.create_commit, *args, **kwargs)
        for operation in given["operations"]:
            with operation.as_file() as file:
                (self.root / given["repo_id"] / operation.path_in_repo).write_bytes(file.read())
        self.messages.append(given["commit_message"])
        return huggingface_hub.CommitInfo(
            f"https://huggingface.co/{given['repo_id']}/commit/0", given["commit_message"], "", "0"
        )

    def download(self, *args: Any, **kwargs: Any) -> str:
        given = bound(DOWNLOAD, *args, **kwargs)
        path = self.root / given["repo_id"] / given["filename"]
        if not path.exists():
            raise OfflineModeIsEnabled("there is no such file\nlook it up")
        return str(path)


def bound(function: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """Arguments by name; fails as the function itself would if they do not fit it."""
    signature = inspect.signature(function)
    first = [None] if "self" in signature.parameters else []
    return dict(signature.bind(*first, *args, **kwargs).arguments)


@pytest.fixture
def remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    remote = Hub(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: remote)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", remote.download)
    return remote


@pytest.fixture
def file(tmp_path: Path) -> Path:
    _, _, delta = tuned_pair()
    delta.metadata |= {"model": "ViT-B-16", "license": "mit", "notes": "a | b\nc"}
    delta.save(tmp_path / "mine.safetensors")
    return tmp_path / "mine.safetensors"


def test_what_is_pushed_is_pulled(remote: Hub, file: Path, tmp_path: Path) -> None:
    address = hub.push(file, "me/birds", private=True, message="first")
    assert address == "https://huggingface.co/me/birds/commit/0"
    assert (remote.private, remote.messages) == ({"me/birds": True}, ["first"])
    hub.pull("me/birds", tmp_path / "got.safetensors")
    assert (tmp_path / "got.safetensors").read_bytes() == file.read_bytes()


def test_card_says_what_it_is_and_stays(remote: Hub, file: Path) -> None:
    hub.push(file, "me/birds", name="v1.safetensors")
    card = remote.root / "me/birds/README.md"
    text = card.read_text()
    assert text.startswith("---\nlicense: mit\ntags:\n- saft\n")
    assert "saft delta pull me/birds --file v1.safetensors" in text
    assert "| notes | a \\| b c |" in text
    huggingface_hub.ModelCard(text).validate = None  # it parses
    card.write_text("mine")
    hub.push(file, "me/birds")
    assert card.read_text() == "mine"


def test_what_is_no_delta_is_not_sent(remote: Hub, tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"no delta, this")
    with pytest.raises(DeltaFormatError):
        hub.push(tmp_path / "x.safetensors", "me/birds")
    assert not remote.root.exists()


def test_what_is_no_delta_is_not_kept(remote: Hub, file: Path, tmp_path: Path) -> None:
    hub.push(file, "me/birds")
    (remote.root / "me/birds/delta.safetensors").write_bytes(b"something else")
    (tmp_path / "got.safetensors").write_text("as it was")
    with pytest.raises(DeltaFormatError):
        hub.pull("me/birds", tmp_path / "got.safetensors")
    assert (tmp_path / "got.safetensors").read_text() == "as it was"


def test_refusals_are_one_sentence(
    remote: Hub, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(HubError, match=r"could not be had from 'me/none': there is no such file$"):
        hub.pull("me/none", tmp_path / "got.safetensors")

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise HFValidationError("Repo id must be 'name'.\nmore")

    monkeypatch.setattr(remote, "create_repo", refuse)
    with pytest.raises(
        HubError, match=r"could not be uploaded to 'a/b/c': Repo id must be 'name'$"
    ):
        hub.push(file, "a/b/c")


def test_a_hub_that_cannot_be_reached_is_one_sentence(file: Path) -> None:
    """The real client, which raises errors of its HTTP library then; nobody listens at the port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TRANSFORMERS_"))}
    done = subprocess.run(
        [sys.executable, "-m", "saft_clip", "delta", "push", str(file), "me/birds"],
        env={**kept, "HF_ENDPOINT": address, "HF_TOKEN": "none", "NO_PROXY": "127.0.0.1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "could not be uploaded to 'me/birds'" in done.stderr
    assert "Traceback" not in done.stderr


def test_commands(
    remote: Hub, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["delta", "push", str(file), "me/birds", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["commit"].endswith("me/birds/commit/0")
    output = tmp_path / "got.safetensors"
    assert main(["delta", "pull", "me/birds", "--output", str(output)]) == 0
    assert SparseDelta.load(output).nnz == SparseDelta.load(file).nnz
    assert main(["delta", "pull", "me/none", "--output", str(output)]) == 1
    assert capsys.readouterr().err.startswith("wrote")

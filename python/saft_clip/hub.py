"""Deltas in repositories of the Hugging Face hub."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from saft_clip.errors import HubError
from saft_kernels.delta import SparseDelta
from saft_kernels.files import atomic_write

#: The name of a delta in a repository, unless it is asked for otherwise.
FILE = "delta.safetensors"

#: The hub's answers, and what happens on the way to it: errors of the client's own library (httpx,
#: httpx2 or requests, by its version), which the hub's derive from.
_REFUSED: tuple[Any, ...] = (*HfHubHTTPError.__bases__, HFValidationError, OSError)


def push(
    file: Path,
    repository: str,
    *,
    name: str = FILE,
    private: bool = False,
    message: str | None = None,
) -> str:
    """Upload a delta, and a card for it if the repository has none.

    The repository is made if need be. The token is huggingface_hub's (``hf auth login``, or
    ``HF_TOKEN``).

    Args:
        file: the delta; it is read whole and checked first.
        repository: ``user/name``.
        name: of the file there.
        private: make a repository that others cannot see.
        message: of the commit.

    Returns:
        The address of the commit.

    Raises:
        DeltaFormatError: if the file is no whole delta.
        HubError: if the hub refuses or cannot be reached.
    """
    delta = SparseDelta.load(file)
    api = huggingface_hub.HfApi()
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        operations = [huggingface_hub.CommitOperationAdd(name, file)]
        if not api.file_exists(repository, "README.md"):
            card = _card(delta, repository, name).encode()
            operations.append(huggingface_hub.CommitOperationAdd("README.md", card))
        commit = api.create_commit(
            repository, operations, commit_message=message or f"Delta of {delta.nnz:,} entries"
        )
    except _REFUSED as error:
        raise HubError(
            f"{file} could not be uploaded to {repository!r}: {_reason(error)}"
        ) from error
    return str(commit.commit_url)


def pull(repository: str, output: Path, *, name: str = FILE, revision: str | None = None) -> Path:
    """Download a delta and check it.

    Args:
        repository: ``user/name``.
        output: the file to write.
        name: of the file there.
        revision: branch, tag or commit.

    Raises:
        DeltaFormatError: if what is there is no whole delta; nothing is written then.
        HubError: if the hub refuses or cannot be reached, or has no such file.
        FileWriteError: if it cannot be written.
    """
    try:
        cached = huggingface_hub.hf_hub_download(repository, name, revision=revision)
    except _REFUSED as error:
        raise HubError(f"{name} could not be had from {repository!r}: {_reason(error)}") from error
    SparseDelta.load(cached)
    with atomic_write(output) as temporary:
        shutil.copyfile(cached, temporary)
    return output


def _reason(error: Exception) -> str:
    """The first line of an error that says something, and no address of a request."""
    text: Any = getattr(error, "server_message", None) or str(error) or type(error).__name__
    lines = [line.strip() for line in str(text).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__).rstrip(".")


def _card(delta: SparseDelta, repository: str, name: str) -> str:
    """What the repository's page says: the model card of the hub, as Markdown."""
    about = delta.metadata
    base = f"{about.get('model', '?')}, {about.get('pretrained', '?')}"
    rows = "\n".join(f"| {key} | {_cell(value)} |" for key, value in about.items())
    licence = f"license: {about['license']}\n" if about.get("license") else ""
    return f"""---
{licence}tags:
- saft
- sparse-fine-tuning
- clip
---
# {repository.rpartition("/")[2]}

A sparse delta: {delta.nnz:,} changed entries ({delta.density:.3g} of the candidates) of {base}.

```sh
pip install saft-kernels[clip]
saft delta pull {repository} --file {name} --output {name}
saft evaluate --delta {name} --data photos/
```

| | |
|---|---|
{rows}
"""


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())

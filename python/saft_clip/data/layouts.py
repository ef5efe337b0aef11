"""Which kind of data a user's spec names."""

from __future__ import annotations

from pathlib import Path

from saft_clip.data import coop
from saft_clip.data.builtin import Builtin
from saft_clip.data.csv_file import CsvFile
from saft_clip.data.domainnet import DomainNet
from saft_clip.data.folder import Folder
from saft_clip.data.imagenet import ImageNet
from saft_clip.data.listing import Layout
from saft_clip.data.shards import Shards
from saft_clip.data.spec import BUILTIN, SEPARATOR, TORCHVISION
from saft_clip.data.torchvision_sets import TorchvisionSet
from saft_clip.errors import DataError


def recognise(source: str) -> Layout:
    """Tell what kind of data is there.

    Args:
        source: one of

            - a folder of class folders, ``<class name>/xxx.jpg``, or of ``train``, ``val`` and
              ``test`` folders of those;
            - the folder of one of CoOp's data sets, or a split file in CoOp's format, its images
              beside it or in one folder beside it; ``SPLIT.json::FOLDER`` names any other folder
              (:mod:`saft_clip.data.coop`);
            - a folder of ImageNet or of one of its variants (:mod:`saft_clip.data.imagenet`);
            - ``ROOT/sketch``, one domain of DomainNet (:mod:`saft_clip.data.domainnet`);
            - ``FILE.csv`` or ``FILE.tsv`` (:mod:`saft_clip.data.csv_file`);
            - ``FILE.tar``, ``shards-{000..003}.tar`` or a folder of such archives
              (:mod:`saft_clip.data.shards`);
            - ``torchvision:NAME:ROOT`` (:mod:`saft_clip.data.torchvision_sets`);
            - ``builtin:<domain>``, images that ship with this package or are rendered by it
              (:mod:`saft_clip.domains`).

    Raises:
        DataError: if there is no such data, or it is of no kind that is known.
        DomainError: if there is no such built-in domain.
    """
    if source.startswith(BUILTIN):
        return Builtin(source.removeprefix(BUILTIN))
    if source.startswith(TORCHVISION):
        return TorchvisionSet(source)
    if CsvFile.names(source):
        return CsvFile(source)
    if Shards.names(source) and not Path(source).is_dir():
        return Shards(source)
    if SEPARATOR in source or source.endswith(".json"):
        return coop.SplitFile(source)
    return _of_folder(_folder(source))


def _of_folder(root: Path) -> Layout:
    split_file = coop.find_split_file(root)
    if split_file is not None:
        return coop.SplitFile(str(split_file))
    aircraft = coop.Aircraft.find(root)
    if aircraft is not None:
        return coop.Aircraft(aircraft)
    return DomainNet.find(root) or ImageNet.find(root) or Shards.find(root) or Folder(root)


def _folder(source: str) -> Path:
    path = Path(source).expanduser()
    if not path.exists():
        raise DataError(
            f"there is no folder {source}; give a folder of class folders, or other data that "
            "docs/data.md lists"
        )
    if not path.is_dir():
        raise DataError(
            f"{source} is neither a folder of class folders nor a file of a kind that is known: "
            ".json, .csv, .tsv or .tar"
        )
    return path

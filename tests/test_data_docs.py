"""docs/data.md says what the code does."""

import re
from pathlib import Path

from saft_clip.data.coop import PUBLISHED
from saft_clip.data.corruptions import CORRUPTIONS
from saft_clip.data.torchvision_sets import RECIPES

PAGE = (Path(__file__).parent.parent / "docs" / "data.md").read_text()


def block(name):
    return PAGE.split(f"<!-- {name} -->")[1].split(f"<!-- /{name} -->")[0]


def test_coops_data_sets():
    rows = re.findall(r"`split_zhou_(\w+).json` \| `([^`]+)` \| (.+) \|", block("coop"))
    assert rows == [(name, one.folder, one.template) for name, one in PUBLISHED.items()]


def test_torchvisions_data_sets():
    assert re.findall(r"\w+", block("torchvision")) == list(RECIPES)


def test_corruptions():
    names = re.findall(r"[a-z_]+(?=[,.;])", block("corruptions"))
    assert names == list(CORRUPTIONS)


def test_files_of_code_are_there():
    for path in re.findall(r"\]\(\.\./([^)]+)\)", PAGE):
        assert (Path(__file__).parent.parent / path).is_file(), path

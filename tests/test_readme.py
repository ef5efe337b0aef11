"""What the README shows, works."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_python_example_runs_as_it_stands(tmp_path):
    program = "\n".join(re.findall(r"```python\n(.*?)```", README, re.DOTALL))
    (tmp_path / "example.py").write_text(program)
    done = subprocess.run(
        [sys.executable, "example.py"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("SparseDelta(nnz=192")
    assert (tmp_path / "tuned.safetensors").is_file()


def test_links_lead_to_files():
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")):
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_make_targets_named_in_the_readme_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"(?:^|`)make ([a-z-]+)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


#: Blocks that the benchmarks write: page and name of its markers.
GENERATED = [
    (page.relative_to(ROOT).as_posix(), name)
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
    for name in re.findall(r"<!-- (bench[a-z-]*):begin -->", page.read_text())
]


@pytest.mark.parametrize(("page", "name"), GENERATED)
def test_what_benchmarks_write_was_written(page, name):
    text = (ROOT / page).read_text()
    _, inside = text.split(f"<!-- {name}:begin -->")
    block, _, _ = inside.partition(f"<!-- {name}:end -->")
    assert block.strip(), "run make bench-docs; saft bench --update README.md writes the answer"

"""What files claim is bounded, and what they say cannot do anything but be read."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from saft_kernels import untrusted
from saft_kernels.untrusted import is_file, is_name, open_safetensors, parse_json, quoted, shown


def test_a_file_is_opened(tmp_path: Path) -> None:
    save_file({"x": torch.ones(3)}, tmp_path / "file", {"a": "b"})
    with open_safetensors(tmp_path / "file") as file:
        assert file.metadata() == {"a": "b"}
        assert file.get_tensor("x").tolist() == [1, 1, 1]


def test_a_header_is_not_read_if_it_claims_too_much(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes((untrusted.MAX_HEADER + 1).to_bytes(8, "little") + b"{}")
    with (
        pytest.raises(SafetensorError, match="claims a header of 33,554,433 bytes"),
        open_safetensors(tmp_path / "file"),
    ):
        pass


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, reason in (
        (tmp_path / "pipe", "no regular file"),
        (Path("/dev/zero"), "no regular file"),
        (tmp_path, "Is a directory"),
        (tmp_path / "none", "No such file"),
    ):
        with pytest.raises(OSError, match=reason), open_safetensors(path):
            pass


@pytest.mark.parametrize(
    "text",
    [
        *("[" * 100_000, "[" + "[]," * 2000 + "[]]", "[" + '{"a":{}},' * 3000 + "0]"),
        *("9" * 5000, "{", "", '"', '"' + '\\"' * 100_000),
    ],
)
def test_json_that_would_take_too_much_is_refused_like_any_that_is_none(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse_json(text)


def test_brackets_in_texts_do_not_count() -> None:
    value = {"a": "[" * 10_000 + '"{' + "\\", "b": [[], {}]}
    assert parse_json(json.dumps(value)) == value


def test_names_are_those_that_a_message_can_hold() -> None:
    assert is_name("a" * 1000)
    assert is_name("é\n")
    assert not is_name("a" * 1001)
    assert not is_name("\0" * 300)  # four characters each
    assert not is_name(None)


def test_a_path_that_cannot_be_one_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    assert is_file(tmp_path / "a")
    assert not any(map(is_file, (tmp_path, "a\0b", "x" * 5000)))


def test_text_is_shown_in_one_line_that_steers_no_terminal() -> None:
    assert shown("a\n b\t\x1b[31mc\x7f\u2028\ud800") == r"a b \x1b[31mc\x7f \ud800"
    assert shown("é" * 400) == "é" * 299 + "…"
    assert shown("\0" * 400, 10) == r"\x00\x00\…"
    assert quoted("a\x1b" + "x" * 200) == repr("a\x1b" + "x" * 98)
    assert quoted(None) == "None"

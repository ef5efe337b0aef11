"""The build: its switches and what it says when something is missing."""

from __future__ import annotations

import importlib.util
import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import setuptools
import torch

from ptxsim.cuda_support import nvcc
from saft_kernels import backends, ops

ROOT = Path(__file__).parent.parent
TORCH = Path(torch.__file__).parent


def configure(
    folder: Path, *options: str, path: str | None = None
) -> subprocess.CompletedProcess[str]:
    tools = Path(sys.executable).parent
    command = [
        str(tools / "cmake"), "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tools / 'ninja'}",
        "-S", str(ROOT), "-B", str(folder), f"-DSAFT_TORCH_ROOT={TORCH}", *options,
    ]  # fmt: skip
    environment = dict(os.environ, PATH=path or os.environ["PATH"])
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture
def path_without_nvcc(tmp_path: Path) -> str:
    """A PATH that holds the compiler and what it needs, and no nvcc."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("cc", "c++", "gcc", "g++", "ld", "as", "ar", "nm", "ranlib", "sh", "uname"):
        found = shutil.which(name)
        if found:
            (tools / name).symlink_to(found)
    return str(tools)


def test_cuda_on_without_nvcc_is_an_error(tmp_path, path_without_nvcc):
    failed = configure(tmp_path / "build", "-DSAFT_CUDA=ON", path=path_without_nvcc)
    assert failed.returncode != 0
    assert "SAFT_CUDA=ON, but nvcc is not on PATH" in failed.stderr


def test_cuda_auto_without_nvcc_builds_for_the_cpu(tmp_path, path_without_nvcc):
    done = configure(tmp_path / "build", path=path_without_nvcc)
    assert done.returncode == 0, done.stderr
    assert "CUDA kernels: off (nvcc not found)" in done.stdout


@pytest.mark.skipif(nvcc() is None, reason="needs nvcc")
def test_ptx_is_of_the_newest_architecture_asked_for(tmp_path):
    done = configure(tmp_path / "build", "-DSAFT_CUDA_ARCHITECTURES=100;90;80;90")
    assert done.returncode == 0, done.stderr
    assert ": sm_80 sm_90 sm_100, PTX of compute_100" in done.stdout


@pytest.mark.parametrize(
    ("environment", "options"),
    [
        ({}, ["-DSAFT_CUDA=AUTO", "-USAFT_CUDA_ARCHITECTURES"]),
        ({"SAFT_CUDA": "ON", "SAFT_CUDA_ARCHITECTURES": "80;90"},
         ["-DSAFT_CUDA=ON", "-DSAFT_CUDA_ARCHITECTURES=80;90"]),
    ],
)  # fmt: skip
def test_the_environment_says_what_is_built_for_gpus(monkeypatch, environment, options):
    for name in ("SAFT_CUDA", "SAFT_CUDA_ARCHITECTURES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    commands = []
    module = runpy.run_path(str(ROOT / "setup.py"))
    build = module["CMakeBuild"](setuptools.Distribution({"name": "a", "version": "1"}))
    monkeypatch.setattr(build, "run_tool", commands.append)
    build.ensure_finalized()
    build.build_extension(module["CMakeExtension"]())
    assert [option for option in commands[0] if "SAFT_CUDA" in option] == options


def test_unknown_cuda_switch_is_an_error(tmp_path):
    failed = configure(tmp_path / "build", "-DSAFT_CUDA=maybe")
    assert "must be AUTO, ON or OFF" in failed.stderr


def compilations(folder: Path, sanitizers: str) -> tuple[set[str], list[str]]:
    """The sources of the library, and what compiles them."""
    options = ["-DCMAKE_EXPORT_COMPILE_COMMANDS=ON", "-DSAFT_CUDA=OFF"]
    done = configure(folder, *options, f"-DSAFT_SANITIZE={sanitizers}")
    assert done.returncode == 0, done.stderr
    entries = json.loads((folder / "compile_commands.json").read_text())
    sources = {str(Path(entry["file"]).relative_to(ROOT)) for entry in entries}
    return sources, [entry["command"] for entry in entries]


@pytest.mark.parametrize(
    ("sanitizers", "added"),
    [
        ("address;undefined", {"tests/sanitized/unchecked.cpp"}),
        ("thread", {"tests/sanitized/unchecked.cpp", "tests/sanitized/threads.cpp"}),
    ],
)
def test_sanitizers_see_every_object_of_the_library(tmp_path, sanitizers, added):
    sources, commands = compilations(tmp_path / "checked", sanitizers)
    flags = f"-fsanitize={sanitizers.replace(';', ',')} -fno-sanitize-recover=all"
    assert all(flags in command for command in commands)
    usual_sources, usual_commands = compilations(tmp_path / "usual", "")
    assert not any("-fsanitize" in command for command in usual_commands)
    assert sources - usual_sources == added


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["-DSAFT_SANITIZE=memory", "-DSAFT_CUDA=OFF"],
            "address;undefined or thread, not 'memory'",
        ),
        (["-DSAFT_SANITIZE=thread"], "for the kernels of the CPU alone. Set SAFT_CUDA=OFF"),
    ],
)
def test_sanitizers_that_cannot_be_had_are_an_error(tmp_path, options, message):
    failed = configure(tmp_path / "build", *options)
    assert failed.returncode != 0
    assert message in " ".join(failed.stderr.split())


def test_the_usual_library_has_no_sanitizers():
    assert backends.build_info()["sanitizers"] == ""


def test_wrong_torch_folder_is_an_error(tmp_path):
    failed = configure(tmp_path / "build", f"-DSAFT_TORCH_ROOT={tmp_path}")
    assert "Install torch first" in failed.stderr


def test_torch_older_than_the_stable_abi_target_is_an_error(tmp_path):
    header = tmp_path / "include" / "torch" / "headeronly" / "version.h"
    header.parent.mkdir(parents=True)
    header.write_text("#define TORCH_VERSION_MAJOR 2\n\n#define TORCH_VERSION_MINOR 10\n")
    failed = configure(tmp_path / "build", f"-DSAFT_TORCH_ROOT={tmp_path}")
    assert failed.returncode != 0
    assert "torch 2.11 or later is needed, 2.10 was found" in " ".join(failed.stderr.split())


def test_missing_torch_is_one_clear_sentence(monkeypatch):
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    module = runpy.run_path(str(ROOT / "setup.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="torch is not installed in the environment"):
        module["torch_root"]()


def test_old_setuptools_is_one_clear_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "setuptools.command.bdist_wheel", None)
    with pytest.raises(SystemExit, match="setuptools 77 or later is needed"):
        runpy.run_path(str(ROOT / "setup.py"))


def test_messages_name_files_of_the_checkout_and_not_where_it_was_built():
    with pytest.raises(RuntimeError, match=r"(^|\s)csrc/cpu/index_values\.cpp"):
        ops.gather(torch.zeros(3), torch.tensor([5]))
    library = backends.LIBRARY.read_bytes()
    assert str(ROOT).encode() not in library
    assert str(TORCH).encode() not in library


def test_symbols_shared_between_instruction_sets_fail_the_build(tmp_path):
    source = tmp_path / "leak.cpp"
    source.write_text(
        "inline int leak() { static int n; return ++n; }\nint use() { return leak(); }"
    )
    subprocess.run(["c++", "-O0", "-c", source, "-o", tmp_path / "leak.o"], check=True)
    check = [
        str(Path(sys.executable).parent / "cmake"), f"-DNM={shutil.which('nm')}",
        f"-DOBJECTS={tmp_path / 'leak.o'}", "-P", str(ROOT / "cmake" / "check_isa_object.cmake"),
    ]  # fmt: skip
    failed = subprocess.run(check, capture_output=True, text=True, check=False)
    assert failed.returncode != 0
    assert "leak" in failed.stderr

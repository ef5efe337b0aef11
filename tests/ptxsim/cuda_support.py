"""CUDA C++ -> PTX with nvcc, and PTX out of built libraries."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from .cache import cache_dir, cached, digest, replace_file, run_compiler
from .errors import CompileError
from .module import Module


@functools.cache
def cuda_home() -> Path | None:
    """Root of the CUDA toolkit: $CUDA_HOME, or what the nvcc in $PATH (perhaps a wrapper) names."""
    if home := os.environ.get("CUDA_HOME"):
        return Path(home)
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return None
    dry = subprocess.run([nvcc, "--dryrun", "x.cu"], capture_output=True, text=True, check=False)
    top = re.search(r"^#\$ TOP=(.+)$", dry.stderr, re.MULTILINE)
    return Path(top.group(1).strip()).resolve() if top else Path(nvcc).resolve().parent.parent


def nvcc() -> Path | None:
    """The CUDA compiler, if there is one."""
    home = cuda_home()
    path = home / "bin" / "nvcc" if home else None
    return path if path and path.exists() else None


@functools.cache
def _nvcc_version(path: Path) -> str:
    return subprocess.run([path, "--version"], capture_output=True, text=True, check=True).stdout


# ---------------------------------------------------------------- nvcc
def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _included(makefile: Path, source: Path) -> dict[str, str]:
    """Hashes of the headers a source includes, the toolkit's and the system's excepted."""
    text = makefile.read_text().replace("\\\n", " ").split(":", 1)[1]
    skipped = (str(cuda_home()), "/usr/")
    paths = {Path(p).resolve() for p in text.split()} - {source.resolve()}
    return {str(p): _hash(p) for p in sorted(paths) if not str(p).startswith(skipped)}


def _lookup(entry: Path) -> str | None:
    """The PTX of a cache entry, unless one of the headers has changed."""
    try:
        data = json.loads(entry.read_text())
        fresh = all(_hash(Path(p)) == known for p, known in data["included"].items())
    except OSError:
        return None
    return data["ptx"] if fresh else None


def compile_ptx(source: str | Path, sm: int = 80, flags: Sequence[str] = ()) -> str:
    """PTX of a .cu file (a Path) or of CUDA source (a str).

    Cached by source, included headers, flags and compiler version.
    """
    compiler = nvcc()
    if compiler is None:
        raise CompileError("nvcc is not in $PATH; set CUDA_HOME")
    is_file = isinstance(source, Path)
    text = source.read_text() if is_file else source
    where = str(source.resolve()) if is_file else ""
    key = digest(text, str(sm), where, _nvcc_version(compiler), *flags)
    entry = cache_dir() / f"cuda-{key}.json"
    if (ptx := _lookup(entry)) is not None:
        return ptx
    with tempfile.TemporaryDirectory() as tmp:
        path = source if is_file else Path(tmp) / "source.cu"
        if not is_file:
            path.write_text(text)
        out, makefile = Path(tmp) / "out.ptx", Path(tmp) / "out.d"
        standard = [] if any("-std" in flag for flag in flags) else ["-std=c++17"]
        command = [str(compiler), "-ptx", f"-arch=compute_{sm}", *standard, *flags]
        run_compiler([*command, "-MD", "-MF", str(makefile), str(path), "-o", str(out)])
        ptx, included = out.read_text(), _included(makefile, path)
    replace_file(entry, json.dumps({"included": included, "ptx": ptx}))
    return ptx


def load_cuda(source: str | Path, sm: int = 80, flags: Sequence[str] = ()) -> Module:
    """Compiles CUDA C++; the kernels are translated when they are launched."""
    return Module(compile_ptx(source, sm, flags))


# ---------------------------------------------------------------- built libraries
def cuobjdump() -> Path:
    """The cuobjdump in $PATH, else the one bundled with Triton."""
    if tool := shutil.which("cuobjdump"):
        return Path(tool)
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def extract_ptx(library: str | Path, tool: str | Path | None = None) -> dict[str, str]:
    """PTX embedded in a shared library, object file or fatbin: file name -> text."""
    path = Path(library).resolve()

    def make(out: Path) -> None:
        with tempfile.TemporaryDirectory() as tmp:
            command = [str(tool or cuobjdump()), "-xptx", "all", str(path)]
            run_compiler(command, cwd=tmp)
            texts = {p.name: p.read_text() for p in sorted(Path(tmp).glob("*.ptx"))}
        out.write_text(json.dumps(texts))

    return json.loads(cached(f"library-{digest(path.name, _hash(path))}.json", make).read_text())


def load_library(library: str | Path, sm: int | None = None) -> Module:
    """Translates the PTX embedded in a built library; `sm` picks one of several targets."""
    texts = extract_ptx(library)
    if sm is not None:
        texts = {n: t for n, t in texts.items() if re.search(rf"^\.target sm_{sm}\b", t, re.M)}
    if len(texts) != 1:
        raise ValueError(f"{library}: {len(texts)} PTX texts match, pick one of {list(texts)}")
    return Module(next(iter(texts.values())))

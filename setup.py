"""Builds the compiled library with CMake and Ninja; everything else is in pyproject.toml."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # a new virtual environment of Python 3.11 has 65
    sys.exit(
        f"saft-kernels: setuptools 77 or later is needed, {setuptools.__version__} was found; run "
        '`pip install --upgrade "setuptools>=77"` first.'
    )

ROOT = Path(__file__).parent.resolve()


def torch_root() -> Path:
    """The installed torch, found without importing it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        sys.exit(
            "saft-kernels: torch is not installed in the environment that builds the package; "
            'run `pip install torch "setuptools>=77" cmake ninja` first, then install with '
            "--no-build-isolation."
        )
    return Path(spec.origin).parent


def cuda_options() -> list[str]:
    """What CMake is told of CUDA: as the environment says, and nothing of an earlier build."""
    architectures = os.environ.get("SAFT_CUDA_ARCHITECTURES")
    return [
        f"-DSAFT_CUDA={os.environ.get('SAFT_CUDA', 'AUTO')}",
        f"-DSAFT_CUDA_ARCHITECTURES={architectures}"
        if architectures
        else "-USAFT_CUDA_ARCHITECTURES",
    ]


class CMakeExtension(Extension):
    """A library that CMake builds; setuptools only needs to know where it goes."""

    def __init__(self) -> None:
        super().__init__(name="saft_kernels.libsaft_kernels", sources=[])


class CMakeBuild(build_ext):
    """Runs CMake in build/ and puts the library into the package."""

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).parent.resolve()
        build = ROOT / "build" / "cmake"
        build.mkdir(parents=True, exist_ok=True)
        options = [
            f"-DSAFT_TORCH_ROOT={torch_root()}",
            f"-DSAFT_VERSION={self.distribution.get_version()}",
            *cuda_options(),
            f"-DCMAKE_INSTALL_PREFIX={target}",
            "-DCMAKE_BUILD_TYPE=Release",
        ]
        self.run_tool(["cmake", "-G", "Ninja", "-S", str(ROOT), "-B", str(build), *options])
        self.run_tool(["cmake", "--build", str(build)])
        self.run_tool(["cmake", "--install", str(build)])

    def run_tool(self, command: list[str]) -> None:
        environment = dict(os.environ)
        # cmake and ninja live beside the Python that builds, which need not be on PATH.
        environment["PATH"] = (
            f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', '')}"
        )
        try:
            subprocess.run(command, check=True, env=environment)
        except FileNotFoundError:
            sys.exit(
                f"saft-kernels: {command[0]} is not installed; run `pip install cmake ninja` first."
            )
        except subprocess.CalledProcessError:
            sys.exit(
                "saft-kernels: the compiled library could not be built; the messages above say why."
            )


class AnyPythonWheel(bdist_wheel):
    """The library uses no CPython symbol: one wheel per platform serves every Python 3."""

    def get_tag(self) -> tuple[str, str, str]:
        _, _, platform = super().get_tag()
        return "py3", "none", platform


setup(
    ext_modules=[CMakeExtension()],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": AnyPythonWheel},
)

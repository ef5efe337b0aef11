"""ptxsim: run CUDA and Triton kernels on the CPU, for numerical tests without a GPU."""

from .cuda_support import compile_ptx, extract_ptx, load_cuda, load_library
from .errors import CompileError, KernelError, PtxError, UnsupportedError
from .launch import LaunchOptions, defaults
from .module import Module
from .parser import Param
from .triton_support import SimulatedTriton, TritonKernel, compile_triton

__all__ = [
    "CompileError",
    "KernelError",
    "LaunchOptions",
    "Module",
    "Param",
    "PtxError",
    "SimulatedTriton",
    "TritonKernel",
    "UnsupportedError",
    "compile_ptx",
    "compile_triton",
    "defaults",
    "extract_ptx",
    "load_cuda",
    "load_library",
]

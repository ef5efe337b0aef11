"""The operations in Triton: for GPUs for which nothing was compiled, AMD's included.

One file per operation, as in ``csrc/cuda``, with the same algorithms; :mod:`.library` registers
them and :mod:`.launch` is the one place that starts kernels.
"""

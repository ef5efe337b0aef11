"""One module per operation of the data path, and others for whole steps, runs and real masks.

Each has a function ``run(setting) -> Outcome``. To add one, write such a module and list it in
:mod:`bench.registry`.
"""

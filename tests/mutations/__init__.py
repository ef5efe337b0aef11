"""Does the suite notice? One fault at a time is planted in a kernel, and some test must fail.

``faults.py`` lists the faults, ``__main__.py`` plants them (``python -m mutations`` in ``tests/``),
``result.json`` holds what came out of the last full run.
"""

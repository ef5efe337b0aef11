"""Hostile and broken files: is there one that a loader does not refuse, or serve, properly?

``targets`` says what is read and what must hold then, ``mutations`` makes files of valid ones,
``children`` runs them out of harm's way, and ``__main__`` runs many: ``python -m fuzz`` in
``tests/``. The README beside this file tells the rest.
"""

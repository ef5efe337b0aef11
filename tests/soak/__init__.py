"""Training for long: random models, masks, dtypes, interruptions; memory flat, results right.

``cd tests && python -m soak --minutes 60`` is the documented run (``docs/reliability.md``);
``test_soak.py`` runs a few cycles.
"""

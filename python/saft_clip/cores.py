"""How many processor cores there are for this process."""

from __future__ import annotations

import os


def usable_cores() -> int:
    """How many this process may use, where the system tells."""
    allowed = getattr(os, "sched_getaffinity", None)
    return len(allowed(0)) if allowed else os.cpu_count() or 1

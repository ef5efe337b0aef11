"""``python -m saft_clip`` is the ``saft`` command."""

import sys

from saft_clip.cli import main

sys.exit(main())

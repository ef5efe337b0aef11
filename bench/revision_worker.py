"""The process that runs cases over one revision; :mod:`.revisions` starts two and takes turns.

``python -m bench.revision_worker REVISION OPTIONS`` reads one JSON message a line from stdin and
answers each with one on stdout. It works between a message and its answer only, so that whoever
asks decides which of two such processes runs:

======================== ==========================================================================
message                  answer
======================== ==========================================================================
(none, at the start)     ``ready``, or ``failed``: why the benchmarks do not run on this revision
``case``: its module     that of the first ``go``
``go``                   ``reached``: the group whose next round waits for a ``go``; at the case's
                         end ``outcome``, or ``failed``: why there is none
``stop``                 ``failed``: the rest of the case is left out
======================== ==========================================================================

The benchmarks are those of the checkout that compares; ``saft_kernels`` and ``saft_clip`` are the
revision's. A case is imported when it is asked for: a revision may lack what others need.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, TextIO

import torch

import saft_clip
import saft_kernels
from saft_kernels import backends
from saft_kernels.errors import SaftError

from .harness import Effort, Pace, paced
from .models import Setting
from .result_file import outcome_record


class StoppedError(SaftError):
    """The rest of a case is left out."""


class Channel:
    """Messages to and from whoever asks."""

    def __init__(self, incoming: TextIO, outgoing: TextIO) -> None:
        self._incoming, self._outgoing = incoming, outgoing

    def tell(self, **message: Any) -> None:
        """Answer."""
        print(json.dumps(message), file=self._outgoing, flush=True)

    def hear(self) -> dict[str, Any]:
        """Wait for the next message; end with whoever would send it."""
        line = self._incoming.readline()
        if not line:
            sys.exit()
        message: dict[str, Any] = json.loads(line)
        return message

    @contextmanager
    def turn(self, group: str) -> Iterator[None]:
        """Run a round of the group when it is time (:attr:`.harness.Pace.turn`)."""
        self.tell(reached=group)
        if "stop" in self.hear():
            raise StoppedError("it was stopped")
        yield


def standard_channel() -> Channel:
    """Messages through stdin and stdout; whatever else is printed goes to stderr from now on."""
    outgoing = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return Channel(sys.stdin, outgoing)


def require_revision(root: Path) -> None:
    """Make sure that no installed package won over the revision's.

    Raises:
        ImportError: if one did.
    """
    for package in (saft_kernels, saft_clip):
        found = Path(str(package.__file__)).resolve()
        if not found.is_relative_to(root.resolve()):
            raise ImportError(f"{package.__name__} is that of {found.parent}, not the revision's")


def serve(channel: Channel, setting: Setting, rounds: int) -> None:
    """Run one case after another until nobody asks any more."""
    torch.set_num_threads(setting.threads or torch.get_num_threads())
    chosen = backends.use_backend(setting.backend) if setting.backend else nullcontext()
    with chosen, paced(Pace(rounds, channel.turn)):
        channel.tell(ready=True)
        while True:
            channel.tell(**_run(channel.hear()["case"], setting))


def _run(module: str, setting: Setting) -> dict[str, Any]:
    try:
        case = importlib.import_module(f"{__package__}.{module}")
        return {"outcome": outcome_record(case.run(setting))}
    except SaftError as error:  # a wrong result, or why there is none
        return {"failed": str(error)}
    except Exception as error:  # of code that this process exists to try
        traceback.print_exc()
        return {"failed": f"{type(error).__name__}: {error}"}


def setting_of(record: dict[str, Any]) -> Setting:
    """The setting, from its record in JSON."""
    efforts = {name: Effort(**record[name]) for name in ("kernels", "steps")}
    return Setting(**{**record, **efforts})


def main() -> None:
    """Serve the revision and the options of the command line."""
    channel = standard_channel()
    options = json.loads(sys.argv[2])
    try:
        require_revision(Path(sys.argv[1]))
        serve(channel, setting_of(options["setting"]), options["rounds"])
    except Exception as error:
        channel.tell(failed=f"{type(error).__name__}: {error}")
        raise


if __name__ == "__main__":
    main()

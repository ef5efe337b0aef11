"""What is trained on and what is evaluated on: the protocols of the papers.

A protocol turns data sets into tasks. A task is one data set to train on and those that the result
is evaluated on, each in a role: ``in`` (in distribution), ``shifted``, ``base``, ``new``,
``source`` or ``target``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from saft_clip.data import BUILTIN, divided, parse_spec, resolved
from saft_clip.errors import ConfigError
from saft_kernels.untrusted import near_matches, shown

#: Roles of what was trained on, and of everything else.
OWN = ("in", "source", "base")
OTHERS = ("shifted", "target", "new")


@dataclass(frozen=True)
class Task:
    """One data set to train on, and what the result is evaluated on.

    Attributes:
        train: as it is given to ``saft finetune``.
        roles: data set -> its role, in the order of tables.
    """

    train: str
    roles: dict[str, str]


@dataclass(frozen=True)
class Protocol:
    """A way to compare methods.

    Attributes:
        name: what the command line calls it.
        title: what pages call it.
        source: the paper's table or figure that it repeats.
        own: roles of the data set that is trained on, by what is put behind its name.
        others: the role of the further data sets; "" if there are none.
        mean: what the mean over the further data sets is called.
    """

    name: str
    title: str
    source: str
    own: dict[str, str]
    others: str = ""
    mean: str = ""

    def tasks(self, train: Sequence[str], evaluate: Sequence[str]) -> list[Task]:
        """A task for each data set to train on; the others are evaluated on as they are."""
        return [
            Task(
                data + next(iter(self.own)),
                {data + suffix: role for suffix, role in self.own.items()}
                | {other: self.others for other in evaluate if not _same(other, data)},
            )
            for data in train
        ]

    def check(self, train: Sequence[str], evaluate: Sequence[str]) -> None:
        """Make sure that these data sets suit the protocol.

        Raises:
            ConfigError: if some are missing, or there are some that it does not use.
        """
        if self.others and all(_same(other, data) for data in train for other in evaluate):
            raise ConfigError(
                f"{self.name} evaluates on other data than it trains on, and none are given: name "
                "them (--eval-data, or evaluate in the plan)"
            )
        if not self.others and evaluate:
            raise ConfigError(
                f"{self.name} evaluates on the data sets that it trains on only: leave out "
                f"{shown(evaluate[0])}"
            )
        for data in train if self.name == "base-to-new" else ():
            if divided(data)[1]:
                raise ConfigError(f"{self.name} divides the classes of {shown(data)} itself")


_IN, _SHIFTED = "in", "shifted"

PROTOCOLS: dict[str, Protocol] = {
    protocol.name: protocol
    for protocol in (
        Protocol(
            "shift", "Distribution shift", "SAFT, Fig. 1",
            {"": _IN}, _SHIFTED, "mean of shifted",
        ),
        Protocol(
            "base-to-new", "From base classes to new ones", "SAFT, Table 2",
            {"#base": "base", "#new": "new"},
        ),
        Protocol(
            "cross-dataset", "From one data set to others", "SAFT, Table 3",
            {"": "source"}, "target", "mean of targets",
        ),
        Protocol(
            "sparsity", "How many parameters", "SAFT, Fig. 5",
            {"": _IN}, _SHIFTED, "mean of shifted",
        ),
        Protocol(
            "ablation", "Which parameters", "SAFT, Tables 4, 5 and 10 to 12",
            {"": _IN}, _SHIFTED, "mean of shifted",
        ),
    )
}  # fmt: skip


def find_protocol(name: str) -> Protocol:
    """The protocol of that name.

    Raises:
        ConfigError: if there is none; the message names them all.
    """
    if name not in PROTOCOLS:
        hint = near_matches(str(name), PROTOCOLS) or ":"
        raise ConfigError(
            f"there is no protocol {shown(repr(name))}{hint} they are {', '.join(PROTOCOLS)}"
        )
    return PROTOCOLS[name]


def _same(data: str, other: str) -> bool:
    """Whether two specs name the same data, however their paths are written."""
    ours, theirs = parse_spec(data), parse_spec(other)
    return (ours.corruption, ours.half, resolved(ours.source)) == (
        theirs.corruption, theirs.half, resolved(theirs.source),
    )  # fmt: skip


def is_builtin(data: str) -> bool:
    """Whether a data set ships with the package."""
    return data.startswith(BUILTIN)

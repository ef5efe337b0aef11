"""JSON that no library would write: keys given twice, numbers without end, brackets without end."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from fuzz.choices import Choices


class Object(list[Any]):
    """A JSON object as a list of [key, value], of which several may have the same key.

    A mutation may put something else among them, which makes JSON of no kind.
    """

    def pairs(self) -> Iterator[list[Any]]:
        """Its [key, value]."""
        return (item for item in self if isinstance(item, list) and len(item) == 2)

    def get(self, key: str) -> Any:
        """The last value under a key; None without one."""
        return {str(other): value for other, value in self.pairs()}.get(key)

    def put(self, key: str, value: Any) -> None:
        """Give a key a value, in place of all that it had."""
        self[:] = [item for item in self if not isinstance(item, list) or item[:1] != [key]]
        self.append([key, value])


#: What whoever takes a mutated tree for a proper one must expect.
IMPROPER = (
    TypeError,
    ValueError,
    KeyError,
    IndexError,
    AttributeError,
    ArithmeticError,
    RecursionError,
)


@dataclass(frozen=True)
class Raw:
    """Text that stands for itself, JSON or not."""

    text: str


#: What stands where something else was expected.
ODD: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 7, 255, 256, 65536),
    *(2**31 - 1, 2**31, 2**32, 2**40, 2**40 + 1, 2**53, 2**63 - 1, 2**63, 2**64 - 1, 2**64),
    *(-(2**31), -(2**63), 10**30, -(10**30), 0.5, -0.5, 1e308, 1e-320),
    *(Raw("1e999"), Raw("-1e999"), Raw("NaN"), Raw("-Infinity"), Raw("1" * 5000), Raw("-0")),
    *(Raw("1.0"), Raw("1e2"), Raw("01"), Raw("+1"), Raw("0x10"), Raw(""), Raw("{"), Raw('"')),
    *("", " ", "\0", "a", "0", "-1", "nan", "inf", "é", "日本", "\ud800", "\U0001f600"),
    *("\x1b[31m", "a\nb", "\u2028", "\x7f", "../../etc/passwd", "{}", "%s", "$x_$", "[red]"),
    *("__metadata__", "dict", "list", "tuple", "tensor", "x" * 2000, "<script>", "\\", '"'),
    *(Raw("[" * 60 + "]" * 60), Raw("[" * 5000 + "]" * 5000), Raw("[" * 100_000)),
    *(Raw('{"a":' * 3000 + "1" + "}" * 3000), Raw("[" + "0," * 3000 + "0]")),
)


def parse(text: str | bytes) -> Any:
    """JSON with every key that it has."""
    return json.loads(text, object_pairs_hook=lambda pairs: Object(map(list, pairs)))


def dump(value: Any) -> str:
    """The inverse of :func:`parse`; whatever :class:`Raw` holds is written as it is."""
    if isinstance(value, Raw):
        return value.text
    if isinstance(value, Object):
        return "{" + ",".join(map(_item, value)) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(dump, value)) + "]"
    return json.dumps(value)


def _item(item: Any) -> str:
    if isinstance(item, list) and len(item) == 2:
        return f"{_key(item[0])}:{dump(item[1])}"
    return dump(item)


def _key(key: Any) -> str:
    return dump(key) if isinstance(key, str | Raw) else dump(dump(key))


def plain(value: Any) -> Any:
    """The tree in dicts and lists, as a reader has it; raw texts become None."""
    if isinstance(value, Object):
        return {str(key): plain(one) for key, one in value.pairs()}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    return None if isinstance(value, Raw) else value


def mutate(choices: Choices, value: Any) -> Any:
    """Change, move, leave out or repeat one or two things in a tree, which is no longer the same.

    Returns:
        The tree; another one, if it was replaced as a whole.
    """
    root = [value]
    for _ in range(choices.integer(1, 2)):
        if root:
            choices.pick(_CHANGES)(choices, root, *_somewhere(choices, root))
    return root[0] if root else None


def _somewhere(choices: Choices, root: list[Any]) -> tuple[list[Any], int]:
    """A value and where it stands, ``holder[position]``; long lists are not likelier than short."""
    holder, at = root, choices.integer(0, len(root) - 1)
    while isinstance(holder[at], list) and holder[at] and not choices.one_in(4):
        holder = holder[at]
        at = choices.integer(0, len(holder) - 1)
    return holder, at


def _replace(choices: Choices, root: list[Any], holder: list[Any], at: int) -> None:
    holder[at] = choices.pick(ODD)


def _tweak(choices: Choices, root: list[Any], holder: list[Any], at: int) -> None:
    value = holder[at]
    if isinstance(value, str):
        holder[at] = _other_text(choices, value)
    elif isinstance(value, int | float) and abs(value) < 1e40:  # neither NaN nor infinity
        holder[at] = choices.pick([value + 1, value - 1, -value, value * 2, value / 2, str(value)])
    else:
        holder[at] = choices.pick(ODD)


def _other_text(choices: Choices, text: str) -> str:
    at = choices.integer(0, len(text))
    character = chr(choices.pick([0, 10, 27, 34, 92, 48, 57, 97, 233, 0x2028, 0xD800, 0x1F600]))
    return choices.pick([
        text[:at] + character + text[at:],
        text[:at] + text[at + 1 :],
        text[:at],
        text + text,
        text.upper(),
    ])  # fmt: skip


def _leave_out(choices: Choices, root: list[Any], holder: list[Any], at: int) -> None:
    del holder[at]


def _repeat(choices: Choices, root: list[Any], holder: list[Any], at: int) -> None:
    times = choices.pick([1, 1, 1, 2, 70]) if len(holder) < 1000 else 1
    holder[at:at] = [copy.deepcopy(holder[at]) for _ in range(times)]


def _exchange(choices: Choices, root: list[Any], holder: list[Any], at: int) -> None:
    other, its = _somewhere(choices, root)
    mine, theirs = copy.deepcopy(holder[at]), copy.deepcopy(other[its])
    holder[at] = theirs
    if its < len(other):
        other[its] = mine


def _copy_here(choices: Choices, root: list[Any], holder: list[Any], at: int) -> None:
    other, its = _somewhere(choices, root)
    holder[at] = copy.deepcopy(other[its])


def _wrap(choices: Choices, root: list[Any], holder: list[Any], at: int) -> None:
    value = holder[at]
    holder[at] = choices.pick([[value], Object([["a", value]]), [value, copy.deepcopy(value)]])


Change = Callable[[Choices, list[Any], list[Any], int], None]
_CHANGES: tuple[Change, ...] = (
    *(_replace, _replace, _tweak, _tweak, _leave_out, _repeat, _exchange, _copy_here, _wrap),
)

"""What is read back from JSON must have the form that was written, before any of it is used.

A form is a predicate (:func:`is_text` and so on), a dict of them for an object with at least these
keys, ``{str: form}`` for an object with any keys, or ``[form]`` for a list.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from saft_clip.errors import CheckpointError
from saft_kernels.untrusted import shown

#: Bounds on what a run writes, far above any: what is drawn and laid out takes time.
_MAX_TEXT = 10_000
_MAX_ITEMS = 10_000

Form = Callable[[Any], bool] | dict[Any, Any] | list[Any]


def is_text(value: Any) -> bool:
    """Text of a length that can be shown."""
    return isinstance(value, str) and len(value) <= _MAX_TEXT


def is_name(value: Any) -> bool:
    """Text that can be the name of a file."""
    return is_text(value) and bool(value) and not set(value) & {"/", "\\", "\0"}


def is_flag(value: Any) -> bool:
    """True or false."""
    return isinstance(value, bool)


def is_count(value: Any) -> bool:
    """A whole number from 0."""
    return type(value) is int and 0 <= value < 1 << 62


def is_number(value: Any) -> bool:
    """A number that can be computed with."""
    return type(value) in (int, float) and abs(value) < 1e40  # NaN is not


def is_positive(value: Any) -> bool:
    """A number above 0."""
    return is_number(value) and value > 0


def is_share(value: Any) -> bool:
    """A number from 0 to 1."""
    return is_number(value) and 0 <= value <= 1


def optional(form: Form) -> Form:
    """That, or null."""
    return lambda value: value is None or next(_misfits(value, form, ""), None) is None


def one_of(*values: Any) -> Form:
    """One of these."""
    return lambda value: any(type(value) is type(one) and value == one for one in values)


def require_form(value: Any, form: Form, where: str) -> None:
    """Make sure that a value has a form.

    Args:
        value: as parsed from JSON.
        form: see above.
        where: the file, for the message.

    Raises:
        CheckpointError: naming the place that has not.
    """
    place = next(_misfits(value, form, ""), None)
    if place is not None:
        what = shown(place) or "its content"
        raise CheckpointError(
            f"{where} is not what this release writes: {what} is wrong or missing"
        )


def _misfits(value: Any, form: Form, place: str) -> Iterator[str]:
    """The places at which a value does not have a form."""
    if isinstance(form, dict):
        parts = _parts_of_object(value, form)
    elif isinstance(form, list):
        parts = _parts_of_list(value, form[0])
    else:
        parts = [] if form(value) else None
    if parts is None:
        yield place
        return
    for key, part, its in parts:
        yield from _misfits(part, its, f"{place}.{key}" if place else str(key))


Parts = list[tuple[Any, Any, Form]]


def _parts_of_object(value: Any, form: dict[Any, Form]) -> Parts | None:
    if not isinstance(value, dict):
        return None
    if form.keys() == {str}:
        entries = [(key, part, form[str]) for key, part in value.items() if is_text(key)]
        return entries if len(entries) == len(value) <= _MAX_ITEMS else None
    return [(key, value.get(key, _MISSING), its) for key, its in form.items()]


def _parts_of_list(value: Any, form: Form) -> Parts | None:
    if not isinstance(value, list) or len(value) > _MAX_ITEMS:
        return None
    return [(number, part, form) for number, part in enumerate(value)]


_MISSING = object()

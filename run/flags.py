"""Flags that are the fields of a dataclass: declared there once, with their types and defaults, and read from there.

    steps: int = flag(10, "training", "optimizer steps", Bounds("be at least 1", low=1))

is --steps under the heading "training", an integer of at least 1, and 10 where it is not given.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import NoneType
from typing import Any, Literal, get_args, get_origin


@dataclass(frozen=True)
class Bounds:
    """What a number of the command line must be, in words too. above, below: excluded; low, high: included.

    NaN and inf never hold.
    """

    words: str
    low: float = -math.inf
    above: float = -math.inf
    below: float = math.inf
    high: float = math.inf

    def hold(self, value: float) -> bool:
        return math.isfinite(value) and self.above < value < self.below and self.low <= value <= self.high


@dataclass(frozen=True)
class Flag:
    """What --help and the parser need to know of a field besides its name, type and default.

    group: its heading in --help. bounds: which a number may be, whatever the others are. choices: those of a Literal
    need not be named again.
    """

    group: str
    help: str | None = None
    bounds: Bounds | None = None
    choices: Iterable[str] | None = None
    metavar: str | tuple[str, ...] | None = None


def flag(default: Any, *about: Any, **more: Any) -> Any:
    """A field that is a flag of the same name. about, more: see Flag."""
    return field(default=default, metadata={"flag": Flag(*about, **more)})


def how_to_read(kind: Any, about: Flag) -> dict[str, Any]:
    """add_argument's part of a field: of a T, a Literal, several of T, a switch, or one of them or None."""
    inner = get_args(kind)
    if NoneType in inner:
        return how_to_read(next(one for one in inner if one is not NoneType), about)
    if kind is bool:
        return {"action": "store_true"}
    if get_origin(kind) is Literal:
        return {"choices": inner}
    if get_origin(kind) is tuple:
        return {"type": inner[0], "nargs": len(inner), "metavar": about.metavar}
    return {"type": kind, "choices": about.choices, "metavar": about.metavar}


def command_line(values: Mapping[str, object]) -> list[str]:
    """The flags that ask for these values, by name. False and None leave a flag out."""
    words: list[str] = []
    for name, value in values.items():
        if value is None or value is False:
            continue
        words.append(f"--{name}")
        if isinstance(value, list | tuple):
            words += map(str, value)
        elif value is not True:
            words.append(str(value))
    return words

"""Read whole numbers as people write them."""

import argparse
import re
from fractions import Fraction
from typing import Any

_FORM = re.compile(r"([+-]?[0-9][0-9_]*(?:\.[0-9]+)?(?:e[+-]?[0-9]{1,2})?)([kmgb]?)", re.IGNORECASE)
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "b": 10**9}
_LONGEST = 40  # characters; numbers that are useful have fewer
_EXAMPLES = "give one such as 1000000, 1_000_000, 1e6 or 1M"


class NotWhole(argparse.ArgumentTypeError, ValueError):
    """A value that is no whole number. argparse reports the one base class, jsonargparse the other, for YAML files."""


def whole_number(given: Any) -> int:
    """Return the integer that a flag or a line of YAML gives, such as 1000000, 1_000_000, 1e6, 1M or 1.5M.

    K, M, and G or B stand for 10^3, 10^6 and 10^9.

    Raises:
        NotWhole: It is none, or 2^63 or more.
    """
    text = str(given).strip()
    match = _FORM.fullmatch(text) if len(text) <= _LONGEST and not isinstance(given, bool) else None
    try:
        value = Fraction(match[1]) * _UNITS[match[2].lower()] if match else None
    except ValueError:  # misplaced underscores
        value = None
    if value is None or value.denominator != 1:
        shown = text if len(text) <= _LONGEST else text[:_LONGEST] + "..."
        raise NotWhole(f"{shown!r} is not a whole number; {_EXAMPLES}")
    if abs(value) >= 2**63:
        raise NotWhole(f"{text} is too large; give a number below 2^63")
    return int(value)


def optional_whole_number(given: Any) -> int | None:
    """Return as ``whole_number``, or None for null."""
    return None if given in (None, "null") else whole_number(given)

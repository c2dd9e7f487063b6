"""Sizes in bytes, as people write them."""

from __future__ import annotations

import operator
import re
from fractions import Fraction

_BINARY = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40, "P": 1 << 50}
_DECIMAL = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "P": 10**15}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(?:([KMGTP])(I?B)?|B)?\s*", re.IGNORECASE | re.ASCII)
_MOST = 2**63 - 1


def parse_bytes(value: int | str, name: str) -> int:
    """Bytes from `1024`, `"12GiB"`, `"512 MB"` or `"1.5g"`; errors name `name`.

    KB, MB, GB are powers of ten; KiB, MiB, GiB and the bare letters K, M, G powers of two.
    """
    if isinstance(value, str):
        size = _parse_text(value, name)
    elif isinstance(value, bool):
        raise TypeError(f"{name} must be a size such as 1024 or '12GiB', not {value!r}")
    else:
        try:
            size = operator.index(value)
        except TypeError:
            raise TypeError(
                f"{name} must be a size such as 1024 or '12GiB', not {value!r}"
                f" ({type(value).__name__})"
            ) from None
    if size < 0:
        raise ValueError(f"{name} must not be negative, got {value!r}")
    if size > _MOST:
        raise ValueError(f"{name} is larger than any memory: {value!r}")
    return size


def _parse_text(text: str, name: str) -> int:
    match = _SIZE.fullmatch(text)
    if match is None:
        raise ValueError(
            f"{name} must be a number of bytes, with a unit such as '12GiB' or '512 MB',"
            f" got {text!r}"
        )
    factors = _DECIMAL if (match[3] or "").upper() == "B" else _BINARY
    return int(Fraction(match[1]) * factors[(match[2] or "").upper()])


def format_bytes(size: int) -> str:
    """`"12.0 GiB"`; whole bytes below one KiB."""
    if size < 1024:
        return f"{size} B"
    scaled, units = size / 1024, ["PiB", "TiB", "GiB", "MiB", "KiB"]
    while scaled >= 1023.95 and len(units) > 1:  # what rounds to 1024.0 is 1.0 of the next unit
        scaled /= 1024
        units.pop()
    return f"{scaled:.1f} {units[-1]}"

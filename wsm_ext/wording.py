"""Names and values in messages: short, and safe to show on a terminal."""

from __future__ import annotations

from collections.abc import Sequence

_MOST_CHARACTERS = 300


def shown(value: object) -> str:
    """`repr`, but for long ones."""
    text = repr(value[:_MOST_CHARACTERS] if isinstance(value, str) else value)
    return text if len(text) <= _MOST_CHARACTERS else text[:_MOST_CHARACTERS] + "..."


def printable(error: Exception) -> str:
    """What an error says, and no control characters that it quotes of a file."""
    text = str(error)[:_MOST_CHARACTERS]
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def first_of(items: Sequence[str], most: int, separator: str = ", ") -> str:
    """The first `most` of the items, and how many more there are."""
    text = separator.join(items[:most])
    more = len(items) - most
    return f"{text}{separator.lstrip(',')}and {more} more" if more > 0 else text

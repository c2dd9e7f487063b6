"""Which forwards in a module's `__dict__` are ours, and what stood there before."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

_before: weakref.WeakKeyDictionary[Callable[..., Any], Callable[..., Any] | None]
_before = weakref.WeakKeyDictionary()


def remember(wrapper: Callable[..., Any], before: Callable[..., Any] | None) -> None:
    _before[wrapper] = before


def without_wrapper(held: dict[str, Any]) -> Callable[..., Any] | None:
    """The forward of the module's own, or its user's, in its `__dict__`; None if there is none."""
    forward: Callable[..., Any] | None = held.get("forward")
    return None if forward is None else _before.get(forward, forward)

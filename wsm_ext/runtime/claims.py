"""No module is streamed twice: not by itself, nor with a module around it or inside it."""

from __future__ import annotations

import threading
import weakref
from typing import Protocol

from torch import nn


class Claimant(Protocol):
    @property
    def module(self) -> nn.Module: ...


_lock = threading.Lock()
_claimants: weakref.WeakSet[Claimant] = weakref.WeakSet()


def claim(claimant: Claimant) -> None:
    """Raises ValueError, naming the other one, if a weight of the module has been claimed."""
    with _lock:
        mine = {id(inner): name for name, inner in claimant.module.named_modules()}
        for other in list(_claimants):
            _check_apart(claimant.module, mine, other.module)
        _claimants.add(claimant)


def release(claimant: Claimant) -> None:
    with _lock:
        _claimants.discard(claimant)


def _check_apart(module: nn.Module, mine: dict[int, str], other: nn.Module) -> None:
    if other is module:
        raise ValueError("the module is streamed already: close() it first")
    for theirs, inner in other.named_modules():
        # What holds no weights, an activation say, may be shared.
        if id(inner) in mine and any(True for _ in inner.parameters()):
            ours = mine[id(inner)]
            its = f"its module {ours!r} is" if ours else "it is"
            part = f"module {theirs!r} of a {type(other).__name__}" if theirs else "a module"
            raise ValueError(
                f"this {type(module).__name__} cannot be streamed: {its} {part} that is streamed"
                " already: close() that one first"
            )

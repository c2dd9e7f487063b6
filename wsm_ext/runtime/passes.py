"""One pass at a time: whose turn it is, and where a pass begins and ends."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from .. import _engine
from ..modules.dynamo import never_compiled


def current_task() -> int:
    """The backward (autograd's graph task) that this thread works for; -1 outside of all."""
    return torch._C._current_graph_task_id()


def out_of_memory(error: torch.OutOfMemoryError) -> torch.OutOfMemoryError:
    """The error of a forward, with what can be done about it."""
    return torch.OutOfMemoryError(
        f"{error}\nThe streamed weights keep what they were given: shrink('1GiB') of the streamed"
        " module gives device memory back, and workload=(batch, tokens) makes stream() leave room"
        " for a forward of that size"
    )


class Passes:
    """Entered by every wrapped forward and by a backward, begun by the outermost.

    A turn belongs to a thread, or to a backward: its nodes may run on several threads, and its end
    may come on another one than its begin.
    """

    def __init__(
        self, engine: _engine.Engine, current_stream: Callable[[], int], limit_s: float
    ) -> None:
        self._engine = engine
        self._stream = current_stream
        self._limit_s = limit_s
        self._process = os.getpid()
        self._turn = threading.Lock()
        self._owner: int | None = None  # a thread
        self._tasks: set[int] = set()  # backwards that are under way
        self._turns = 0
        self.depth = 0

    @contextmanager
    def between(self) -> Iterator[None]:
        """Held while no other thread is in a pass."""
        self._acquire_turn()
        try:
            yield
        finally:
            self._release_turn()

    @never_compiled
    def enter(self, task: int | None = None) -> None:
        """`task`: the backward that begins; it stays inside until it leaves."""
        self._acquire_turn()
        try:
            if self.depth == 0:
                self._engine.begin_pass(self._stream())
            self.depth += 1
        except BaseException:
            self._release_turn()
            raise
        if task is not None:
            self._tasks.add(task)

    @never_compiled
    def leave(self, task: int | None = None) -> None:
        if task is not None:
            self._tasks.discard(task)
        try:
            self.depth -= 1
            if self.depth == 0:
                self._engine.end_pass(self._stream())
        finally:
            self._release_turn()

    def explain(self, error: torch.OutOfMemoryError) -> None:
        """Out of the outermost forward: says what can be done when device memory runs out."""
        if self.depth == 1:
            raise out_of_memory(error) from error

    def inside(self) -> bool:
        """Whether this thread is in the middle of a pass."""
        return self.depth > 0 and self._mine()

    def _mine(self) -> bool:
        if self._owner == threading.get_ident():
            return True
        return bool(self._tasks) and current_task() in self._tasks

    def _acquire_turn(self) -> None:
        if os.getpid() != self._process:  # a forked child has not the thread whose turn it was
            self._turn, self._process = threading.Lock(), os.getpid()
            self._owner, self._turns = None, 0
        if not self._mine():
            if not self._turn.acquire(timeout=self._limit_s):
                raise TimeoutError(
                    f"another thread has been in a forward of this streamed model for"
                    f" {self._limit_s:g} s. If that forward waits for this thread, it cannot go on:"
                    " call the units of one model from one thread"
                )
            self._owner = threading.get_ident()
        self._turns += 1

    def _release_turn(self) -> None:
        self._turns -= 1
        if self._turns == 0:
            self._owner = None
            self._turn.release()

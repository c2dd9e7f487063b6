"""Streams the weights again for a backward pass, in the order in which its nodes run.

What autograd saves of a streamed parameter is a view of the arena. Its address never changes, so
all that a backward needs is the unit's bytes in their place while the unit's nodes run:

    forward of u   makes the nodes a, b, c; u is released
    backward       u is taken | c | b | a | u is given back, the unit before it is taken | ...

- Whatever a unit's forward gives was made by a node; a hook before that node takes the unit.
- Of the nodes that are ready, autograd runs the one that was made last. So when the nodes of
  another unit begin, those of the one before have all run.
- A forward that runs inside a backward (gradient checkpointing) may need the place of a unit that
  is held for nodes. It gets it, and the unit is taken again when that forward has ended.
- Should a node run all the same while its unit is not there, autograd says so: the version of what
  it has saved is wrong then (streamed_unit.py). Only what hooks have packed escapes that check.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from ..modules.dynamo import never_compiled
from ..modules.tensor_tree import tensors_in
from .passes import Passes, current_task
from .streamed_unit import StreamedUnit


class Backward:
    """What the backwards that are under way hold. Used only by those whose turn it is."""

    def __init__(
        self,
        units: dict[int, StreamedUnit],
        passes: Passes,
        current_stream: Callable[[], int],
        check_frozen: Callable[[], None],
        end_lingering: Callable[[], None],
    ) -> None:
        self._units = units
        self._passes = passes
        self._current_stream = current_stream
        self._check_frozen = check_frozen
        self._end_lingering = end_lingering
        # By backward, outermost first: the units whose nodes run, each inside the one before it.
        self._chains: dict[int, tuple[int, ...]] = {}
        self._held: dict[int, int] = {}  # a unit, and the stream that it was taken on
        self._over = False

    # -- in the forward ----------------------------------------------------------------------------

    @staticmethod
    @never_compiled
    def nodes_of(values: Any) -> dict[Any, None]:
        """The nodes that made these tensors, and those that they are views of."""
        nodes: dict[Any, None] = {}
        for tensor in tensors_in(values):
            if not tensor.requires_grad:
                continue
            base = tensor._base
            for node in (tensor.grad_fn, None if base is None else base.grad_fn):
                if node is not None:
                    nodes[node] = None
        return nodes

    @never_compiled
    def expect(self, nodes: Iterable[Any], chain: tuple[int, ...]) -> None:
        """Before any of the nodes runs, take the last unit of the chain, and those it lies in."""
        for node in nodes:
            # Where a unit gives what a unit inside it gave, the inner one's chain is the longer.
            if self not in node.metadata:
                node.metadata[self] = True
                node.register_prehook(functools.partial(self._before_nodes, chain))

    # -- in the backward ---------------------------------------------------------------------------

    @never_compiled
    def _before_nodes(self, chain: tuple[int, ...], *_: Any) -> None:
        if torch.is_grad_enabled():
            raise RuntimeError(
                f"create_graph=True: a second derivative through the streamed unit"
                f" {self._units[chain[-1]].name!r} is not supported. Close the streamed module"
                " first, or keep the module resident"
            )
        task = self.join()
        self._end_lingering()
        self._chains[task] = chain
        self._let_go_of_the_rest()
        for unit in chain:
            if unit not in self._held:
                self._make_way(unit)
                self._hold(unit)

    def join(self) -> int:
        """Enters the backward of this thread as a pass, unless it is one; gives its number."""
        task = current_task()
        if self._over:
            raise RuntimeError(
                "the streamed module was closed or resized between a forward and its backward; run"
                " the forward again"
            )
        if task not in self._chains:
            self._passes.enter(task)
            self._chains[task] = ()
            try:
                self._check_frozen()
                torch.autograd.Variable._execution_engine.queue_callback(_End(self, task))
            except BaseException:
                self.end(task)
                raise
        return task

    def end(self, task: int) -> None:
        if self._chains.pop(task, None) is None:
            return
        try:
            self._end_lingering()
            self._let_go_of_the_rest()
            self.resume(())  # for a backward that this one ran inside of
        finally:
            self._passes.leave(task)

    def dissolve(self) -> None:
        self._over = True
        self._check_frozen = self._end_lingering = lambda: None

    # -- around a forward inside a backward --------------------------------------------------------

    @property
    def under_way(self) -> bool:
        return bool(self._chains)

    @never_compiled
    def before_forward(self, unit: int) -> None:
        """Gives back what cannot be there beside the unit."""
        self._make_way(unit)

    @never_compiled
    def keep(self, unit: int) -> None:
        """Holds the unit of a forward that ends now, for nodes that were not announced: those of a
        checkpoint whose values left it by another way than its outputs."""
        wanted = self._wanted()
        self._let_go_of_the_rest()
        if unit not in wanted and not self._any_overlaps(unit, wanted):
            self._hold(unit)

    @never_compiled
    def resume(self, active: Sequence[int]) -> None:
        """Takes again what nodes need, beside the units whose forwards run."""
        if not self._chains:
            return
        wanted = self._wanted()
        for unit in reversed(wanted):
            if unit in self._held or self._any_overlaps(unit, active):
                continue
            if not self._any_overlaps(unit, [held for held in self._held if held in wanted]):
                self._make_way(unit)
                self._hold(unit)

    def in_the_way_of(self, unit: int) -> bool:
        return self._any_overlaps(unit, self._held)

    # -- inside ------------------------------------------------------------------------------------

    def _wanted(self) -> dict[int, None]:
        return {unit: None for chain in self._chains.values() for unit in chain}

    def _any_overlaps(self, unit: int, others: Iterable[int]) -> bool:
        return any(self._units[unit].overlaps(self._units[other]) for other in others)

    def _make_way(self, unit: int) -> None:
        for held in list(self._held):
            if self._units[unit].overlaps(self._units[held]):
                self._let_go(held)

    def _let_go_of_the_rest(self) -> None:
        wanted = self._wanted()
        for held in list(self._held):
            if held not in wanted:
                self._let_go(held)

    def _hold(self, unit: int) -> None:
        stream = self._current_stream()
        self._units[unit].acquire(stream)
        self._held[unit] = stream

    def _let_go(self, unit: int) -> None:
        # On the stream of its nodes: the end of a backward may run on another one.
        self._units[unit].release(self._held.pop(unit))


class _End:
    """Called at the end of a backward. One that fails lets go of it instead."""

    def __init__(self, backward: Backward, task: int) -> None:
        self._backward = backward
        self._task = task

    def __call__(self) -> None:
        self._backward.end(self._task)

    def __del__(self) -> None:
        self._backward.end(self._task)
